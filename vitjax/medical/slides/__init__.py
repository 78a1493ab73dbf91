"""Whole-slide images: tissue, tiles, bags of features, and models that learn from bags."""
