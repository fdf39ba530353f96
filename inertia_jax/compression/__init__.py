"""Compression of trained networks: (model, variables) -> (model, variables)."""
