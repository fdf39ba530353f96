"""A module that is a program, which ends when it is imported."""

import sys

sys.exit("usage: own_exit")
