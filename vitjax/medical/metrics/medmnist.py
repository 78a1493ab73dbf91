"""AUC and ACC as the official evaluator of MedMNIST computes them, and its result files.

Source: medmnist 3.0.2, evaluator.py, in our own words.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.metrics.inputs import as_numbers
from vitjax.medical.metrics.ranking import auroc

MULTI_LABEL = "multi-label, binary-class"
BINARY = "binary-class"
TASKS = ("multi-class", BINARY, "ordinal-regression", MULTI_LABEL)
SPLITS = ("train", "val", "test")
SMALLEST = 28  # the size that file names leave out
CUT = 0.5


def _column(values: np.ndarray, name: str) -> np.ndarray:
    """`[N]` of `[N]` or `[N, 1]`."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise InputError(f"{name} must be of shape (N,) or (N, 1), got {values.shape}")
    return values


def evaluate(task: str, labels: Any, scores: Any) -> dict[str, float]:
    """AUC and ACC of one data set.

    Args:
      task: as MedMNIST names it. Binary takes the last column of scores that have several; it and
        multi-label count a score strictly above 0.5 as positive. Multi-class and ordinal take the
        largest score for the ACC, and the plain mean of one-versus-rest AUROCs over the columns.
      labels: `[N]` or `[N, 1]`; `[N, L]` for multi-label.
      scores: `[N, C]`; for binary also `[N]`; `[N, L]` for multi-label.

    Returns:
      {"auc", "acc"}; the AUC is NaN if a class does not occur.

    Raises:
      InputError: no such task, or labels and scores that do not go together.
    """
    if task not in TASKS:
        raise InputError(f"unknown MedMNIST task {task!r}; {suggest(task, TASKS)}")
    truth, values = as_numbers(labels, "labels", (1, 2)), as_numbers(scores, "scores", (1, 2))
    if len(truth) != len(values):
        raise InputError(f"shapes disagree: labels {truth.shape}, scores {values.shape}")
    if not len(truth) or not (np.isfinite(truth).all() and np.isfinite(values).all()):
        raise InputError("labels and scores must be finite numbers, and at least one of each")
    if task == MULTI_LABEL:
        if truth.shape != values.shape or truth.ndim != 2:
            raise InputError(
                f"shapes disagree: labels {truth.shape}, scores {values.shape}; both must be (N, L)"
            )
        pairs = list(zip(truth.T, values.T, strict=True))
        auc = sum(auroc(*pair) for pair in pairs) / len(pairs)
        acc = sum(float(np.mean(known == (p > CUT))) for known, p in pairs) / len(pairs)
        return {"auc": auc, "acc": acc}
    truth = _column(truth, "labels")
    if task == BINARY:
        last = values if values.ndim == 1 else values[:, -1]
        return {"auc": auroc(truth, last), "acc": float(np.mean(truth == (last > CUT)))}
    if values.ndim != 2:
        raise InputError(f"scores must be of shape (N, C), got {values.shape}")
    columns = range(values.shape[1])
    auc = sum(auroc(truth == number, values[:, number]) for number in columns) / len(columns)
    return {"auc": auc, "acc": float(np.mean(truth == values.argmax(1)))}


def result_file_name(
    flag: str, size: int | None, split: str, auc: float, acc: float, run: str | int
) -> str:
    """Such as `octmnist_64_test_[AUC]0.672_[ACC]0.892@3.csv`; the size is left out if it is 28."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; {suggest(split, SPLITS)}")
    if any(sign in f"{flag}{run}" for sign in "@/\\"):
        raise InputError(f"neither flag nor run may hold @, / or \\: {flag!r}, {run!r}")
    suffix = "" if size in (None, SMALLEST) else f"_{size}"
    return f"{flag}{suffix}_{split}_[AUC]{auc:.3f}_[ACC]{acc:.3f}@{run}.csv"


def write_results(
    folder: str | Path,
    flag: str,
    size: int | None,
    split: str,
    task: str,
    labels: Any,
    scores: Any,
    run: str | int,
) -> Path:
    """Writes what the official evaluator reads: rows `index,score,...` without a header.

    Scores are written in the shortest digits that give back the same number in their own type.
    """
    found = evaluate(task, labels, scores)
    path = Path(folder) / result_file_name(flag, size, split, found["auc"], found["acc"], run)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.asarray(scores)
    rows = table[:, None] if table.ndim == 1 else table
    with open(path, "w", newline="") as file:
        for index, row in enumerate(rows):
            file.write(",".join([str(index), *(str(value) for value in row)]) + "\n")
    return path
