"""Which weight of a PyTorch network is which variable of a Flax network."""
