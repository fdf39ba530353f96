"""The training program: `python -m train VERB`."""
