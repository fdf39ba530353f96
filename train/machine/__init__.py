"""Devices, processes, memory and compiler flags of the machine."""
