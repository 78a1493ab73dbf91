"""Data: sources (random access), transforms (host), augment (device), loader (order and shards)."""
