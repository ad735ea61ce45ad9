"""The detector as functions of tensors, from stored pixels to losses and detections."""
