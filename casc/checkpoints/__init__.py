"""casc's checkpoints, and those of other programs in and out."""
