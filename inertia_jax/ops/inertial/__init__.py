"""Inertial convolution, in the window and in the tiled reading."""
