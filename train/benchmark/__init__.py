"""Measurements of speed and memory; no other part of the program imports them."""
