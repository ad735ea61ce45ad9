"""What a device can do, and how to compute and compile on it."""
