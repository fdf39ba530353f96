"""Linen modules for anyone's network, used like `nn.Conv`."""
