"""Many runs at once: sweeps and pipelines."""
