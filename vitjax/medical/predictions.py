"""predictions.csv: what the chosen preset says of each image, beside what is known of it."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from vitjax.medical.cohort import Cohort
from vitjax.medical.privacy import hashed
from vitjax.medical.scoring import probabilities
from vitjax.medical.transfer import Outcome, Transfer


def write(transfer: Transfer, outcomes: Sequence[Outcome], splits: Sequence[str]) -> Path:
    """Writes a row an image: id, split, unit, group (hashed), truth, probabilities.

    A column `NAME` holds the probability of a class, the mean over the outcomes (the seeds); the
    truth stands in `true_SET`, or in `true_NAME` where a set has several labels. Blank is unknown,
    or could not be read. Names of several sets' classes begin with the set's. In cross-validation
    an image is in "val" as the outcomes say that held it out, in "train" as those that did not.
    """
    cohort, path = transfer.cohort, transfer.workdir / "predictions.csv"
    several = len(cohort.label_sets) > 1
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        truths, names = _names(cohort, several)
        writer.writerow(["id", "split", "unit", "group", *truths, *names])
        for split in splits:
            rows, means = _means(transfer, outcomes, split)
            for row, p in zip(rows.tolist(), means, strict=True):
                unit = cohort.ids[row] if cohort.units is None else cohort.units[row]
                group = hashed(str(cohort.groups[row]), cohort.name)
                chances = ["" if np.isnan(v) else f"{v:.6g}" for v in p]
                writer.writerow(
                    [cohort.ids[row], split, unit, group, *_truth(cohort, row), *chances]
                )
    os.replace(part, path)
    return path


def _means(
    transfer: Transfer, outcomes: Sequence[Outcome], split: str
) -> tuple[Int[np.ndarray, " R"], Float[np.ndarray, "R P"]]:
    """The images of a split, of whichever outcomes, and their mean probabilities."""
    cohort = transfer.cohort
    sums, counts = np.zeros(()), np.zeros((len(cohort), 1))
    for outcome in outcomes:
        rows = cohort.rows(split, outcome.seed)
        found = probabilities(cohort.label_sets, transfer.logits(outcome, split))
        values = np.concatenate([found[s.name] for s in cohort.label_sets], 1)
        sums = sums if sums.ndim else np.zeros((len(cohort), values.shape[1]))
        sums[rows] += values
        counts[rows] += 1
    rows = np.flatnonzero(counts)
    return rows, sums[rows] / counts[rows]


def _names(cohort: Cohort, several: bool) -> tuple[list[str], list[str]]:
    truths, names = [], []
    for s in cohort.label_sets:
        before = f"{s.name}: " if several else ""
        classes = [before + c for c in s.classes]
        names += classes
        truths += [f"true_{c}" for c in classes] if s.kind == "multi" else [f"true_{s.name}"]
    return truths, names


def _truth(cohort: Cohort, row: int) -> list[str]:
    found = []
    for s in cohort.label_sets:
        values = np.atleast_1d(cohort.labels[s.name][row])
        if s.kind == "multi":
            found += ["" if np.isnan(v) else f"{v:g}" for v in values]
        else:
            found.append("" if np.isnan(values[0]) else s.classes[int(values[0])])
    return found
