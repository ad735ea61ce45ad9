"""Weights from elsewhere: files, URLs and the formats of other projects."""
