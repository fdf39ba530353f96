"""Tucker-2 and low-rank factors of kernels, and rules for their ranks."""
