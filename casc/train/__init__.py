"""Training: state, schedule, checkpoints and the loop."""
