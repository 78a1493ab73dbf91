"""Metrics of medical benchmarks, with intervals that respect patients; plain numpy, float64.

`labels` are 0 or 1, `[N]` or `[N, L]`; NaN is unknown, and leaves that example out for that label.
`scores` are higher where more positive. What is undefined, as an AUROC of one class, is NaN; what
is no label, score or weight at all is an InputError.
"""
