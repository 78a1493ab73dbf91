"""Weights of other libraries, in and out: one file a format."""
