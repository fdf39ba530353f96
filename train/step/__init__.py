"""The compiled training step and its state."""
