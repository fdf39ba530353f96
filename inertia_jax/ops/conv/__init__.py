"""Ordinary convolutions, and how they are computed on CPU."""
