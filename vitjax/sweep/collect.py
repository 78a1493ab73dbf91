"""Appends to runs.csv what has ended since."""

import fcntl
from pathlib import Path
from typing import Any

from vitjax.sweep import attempts
from vitjax.sweep.cells import Cell
from vitjax.sweep.plan import Plan
from vitjax.sweep.table import FIRST_COLUMNS, append_runs, columns_of, read_attempts


def row_of(cell: Cell, attempt: dict[str, Any]) -> dict[str, Any]:
    """One line of runs.csv: what the cell is, how its attempt ended, every metric with its n."""
    known = {name: getattr(cell, name) for name in FIRST_COLUMNS if hasattr(cell, name)}
    told = {name: attempt[name] for name in FIRST_COLUMNS if name in attempt}
    row = known | told | {"budget": cell.budget}
    metrics = attempt["metrics"]
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        if kind == "eval" and not name.endswith("/examples"):
            dataset = rest.rpartition("/")[0]
            row |= {name: value, f"{name}:n": metrics.get(f"eval/{dataset}/examples")}
    if "train/loss" in metrics:
        row |= {"train/loss": metrics["train/loss"], "train/loss:n": cell.batch_size}
    return row


def collect(workdir: Path, plan: Plan) -> int:
    """Appends a row for every attempt that runs.csv does not have; returns how many.

    Rows are never changed: of a cell that was tried again, the last row counts.
    """
    path = workdir / "runs.csv"
    cells = {cell.id: cell for cell in plan.cells}
    with (workdir / "runs.lock").open("a") as lock:  # two collections would append the same rows
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = set()
        if path.exists():
            known = {(row["cell"], row["attempt"]) for row in read_attempts(path)}
        new = [a for a in attempts.every(workdir) if (a["cell"], a["attempt"]) not in known]
        rows = [row_of(cells[a["cell"]], a) for a in new if a["cell"] in cells]
        if rows or not path.exists():
            append_runs(path, columns_of(plan), rows)
    return len(rows)
