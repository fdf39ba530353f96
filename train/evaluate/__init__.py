"""Evaluation of variables, networks and checkpoints."""
