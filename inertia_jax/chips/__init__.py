"""Accelerators that are not there: what their compiler says of a program."""
