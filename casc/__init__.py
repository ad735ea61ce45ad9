"""Cascade Mask R-CNN as pure functions that torch.compile captures whole."""

__version__ = "0.1.0"
