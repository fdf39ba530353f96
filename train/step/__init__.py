"""The compiled training step and what it moves."""
