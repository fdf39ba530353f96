"""A checkpoint's network in the formats of other programs."""
