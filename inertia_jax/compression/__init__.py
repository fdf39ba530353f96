"""Trained networks made smaller or faster: (model, variables) -> (model, variables)."""
