"""Networks as modules of PyTorch: source code that runs without this library."""
