"""Sweeps for scaling laws: plan many runs from a budget, run them, collect one table.

config.py    the sweep's config: `get_sweep()` of a file in configs/scaling/
shapes.py    the ladder of legal shapes, exact parameters and FLOPs of each
draft.py     which runs are asked for: isoFLOP, star, data, learning rate, seeds, hold-out
plan.py      budgets, trunks and branches, totals and notes
cells.py     one run: its facts, and the training config that carries it out
show.py      the plan as tables for people
targets.py   memory and hours of every cell on devices that need not be there
fork.py      a branch's run directory, started from its trunk's checkpoint
attempts.py  how each cell ended, and which process works on it
worker.py    trains cells one after the other
run.py       starts workers, watches them
arrays.py    the same as job arrays of SLURM and Kubernetes
collect.py   appends what has ended to runs.csv
table.py     plan.json, plan.csv and runs.csv: reading and writing
verb.py      `vitjax sweep`
"""
