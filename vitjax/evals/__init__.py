"""Evaluators, one file each.

An evaluator takes what is static in its constructor and jits there, once. Calling it with a train
state gives named numbers; sums and counts are taken under a padding mask and divided at the end, so
every example counts exactly once.
"""
