"""The CheXpert benchmark: five labels, scored by study, and always found by their names."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.metrics.inputs import as_labels, as_numbers, listed
from vitjax.medical.metrics.ranking import auroc

LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
STUDY = "Study"
_STUDY = re.compile(r"(?:^|/)(patient\d+/study\d+)(?:/|$)")


def study_of(path: str) -> str:
    """`patient64741/study1` of the path of an image or a study, whatever folder it starts with.

    Patient numbers are not used twice across splits, so the split is left out.

    Raises:
      InputError: the path holds no patient and study.
    """
    found = _STUDY.search(path.replace("\\", "/"))
    if not found:
        raise InputError(f"no study in {path!r}; it must hold patientNNNNN/studyN")
    return found[1]


def aggregate(keys: Any, scores: Any, how: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """One score for all rows of a key: of images to studies, of patches to slides.

    Args:
      keys: `[N]`, any names or numbers.
      scores: `[N]` or `[N, L]`; a NaN makes the score of its key NaN.
      how: "max" or "mean".

    Returns:
      The keys, sorted, `[K]`, and their scores, `[K]` or `[K, L]`.
    """
    values, names = as_numbers(scores, "scores", (1, 2)), np.asarray(keys)
    if names.shape != values.shape[:1]:
        raise InputError(f"shapes disagree: keys {names.shape}, scores {values.shape}")
    if how not in ("max", "mean"):
        raise InputError(f"unknown way to aggregate {how!r}; {suggest(how, ('max', 'mean'))}")
    unique, codes = np.unique(names, return_inverse=True)
    if not len(unique):
        return unique, values
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(unique)))
    if how == "max":
        return unique, np.maximum.reduceat(values[order], starts)
    counts = np.diff(np.append(starts, len(codes)))
    sums = np.add.reduceat(values[order], starts)
    return unique, sums / (counts if values.ndim == 1 else counts[:, None])


def _rows_of(labels: Mapping[str, Any], scores: Mapping[str, Any]) -> slice | np.ndarray:
    """Which rows of the scores are the studies of the labels, in their order."""
    if STUDY not in labels or STUDY not in scores:
        return slice(None)
    wanted = [study_of(str(name)) for name in labels[STUDY]]
    given = [study_of(str(name)) for name in scores[STUDY]]
    for name, studies in (("study_labels", wanted), ("study_scores", given)):
        twice = sorted(study for study, count in Counter(studies).items() if count > 1)
        if twice:
            raise InputError(f"{name}: studies occur twice: {listed(twice)}")
    different = sorted(set(wanted) ^ set(given))
    if different:
        raise InputError(f"studies are in only one of labels and scores: {listed(different)}")
    row_of = {study: row for row, study in enumerate(given)}
    return np.array([row_of[study] for study in wanted], np.int64)


def five_label_auroc(
    study_labels: Mapping[str, Any], study_scores: Mapping[str, Any]
) -> dict[str, float]:
    """The AUROC of the five labels of the benchmark, by name, and their "mean".

    Args:
      study_labels, study_scores: a column `[N]` for each name, in any order; further columns are
        not looked at. Where both have a column `Study`, rows are matched by it; otherwise both
        must be in one order.

    Returns:
      The mean is NaN if one of the five is: a mean over fewer is another metric.

    Raises:
      InputError: a label has no column, or the studies differ.
    """
    for name, table in (("study_labels", study_labels), ("study_scores", study_scores)):
        missing = [label for label in FIVE if label not in table]
        if missing:
            raise InputError(f"{name} has no column {missing[0]!r}; {suggest(missing[0], table)}")
    rows = _rows_of(study_labels, study_scores)
    found = {
        name: auroc(as_labels(study_labels[name], name), as_numbers(study_scores[name], name)[rows])
        for name in FIVE
    }
    return found | {"mean": float(np.mean(list(found.values())))}
