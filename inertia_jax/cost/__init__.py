"""Parameters and multiply-accumulates of a network."""
