"""The thin training loop, checkpoints and logs."""
