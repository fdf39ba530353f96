"""Networks made ready to run elsewhere: BatchNorm folded, one file exported."""
