"""How well scores rank: ROC and precision-recall, with ties, case weights and unknown labels."""

from typing import Any

import numpy as np
from jaxtyping import Float

from vitjax.errors import InputError
from vitjax.medical.metrics.inputs import (
    as_classes,
    as_labels,
    as_numbers,
    known_cases,
    same_shape,
)

Vector = Float[np.ndarray, " _"]


def _sums_above(labels: Vector, scores: Vector, weights: Vector) -> tuple[Vector, Vector, Vector]:
    """Weights of positives and of negatives at or above each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], (weights * labels)[order]
    last = np.ones(len(ordered), bool)  # of those with one score
    last[:-1] = ordered[1:] != ordered[:-1]
    above = np.cumsum(weights[order] - positive)
    return np.cumsum(positive)[last], above[last], ordered[last]


def auroc(labels: Any, scores: Any, weights: Any = None) -> float:
    """The probability that a positive case scores higher than a negative one; ties count half.

    Args:
      labels, scores: `[N]`.
      weights: `[N]`, not negative; ones if None.

    Returns:
      NaN if the positives or the negatives weigh nothing.
    """
    true, false, _ = _sums_above(*known_cases(labels, scores, weights))
    if not len(true) or not true[-1] or not false[-1]:
        return float("nan")
    heights = true + np.append(0, true[:-1])
    return float((np.diff(false, prepend=0) * heights).sum() / (2 * true[-1] * false[-1]))


def average_precision(labels: Any, scores: Any, weights: Any = None) -> float:
    """The precision at each distinct score, averaged by the recall that it adds; no interpolation.

    Returns:
      NaN if the positives weigh nothing.

    Source: as scikit-learn's average_precision_score.
    """
    true, false, _ = _sums_above(*known_cases(labels, scores, weights))
    if not len(true) or not true[-1]:
        return float("nan")
    total = true + false
    precision = np.divide(true, total, out=np.zeros_like(true), where=total > 0)
    return float((np.diff(true, prepend=0) * precision).sum() / true[-1])


def roc_curve(labels: Any, scores: Any) -> tuple[Vector, Vector, Vector]:
    """Every point of the ROC curve, from (0, 0) to (1, 1).

    Returns:
      False positive rates, true positive rates and thresholds (the first is infinite), falling.
      A rate whose class does not occur is NaN.
    """
    true, false, thresholds = _sums_above(*known_cases(labels, scores))
    rates = []
    for sums in (false, true):
        total = sums[-1] if len(sums) and sums[-1] else np.nan
        rates.append(np.append(0, sums) / total)
    return rates[0], rates[1], np.append(np.inf, thresholds)


def precision_recall_curve(labels: Any, scores: Any) -> tuple[Vector, Vector, Vector]:
    """Every point of the precision-recall curve, laid out as scikit-learn does.

    Returns:
      Precisions and recalls, `[T + 1]`, and rising thresholds, `[T]`; the last point, of no
      threshold, is precision 1 and recall 0. Recalls are NaN if there is no positive.
    """
    true, false, thresholds = _sums_above(*known_cases(labels, scores))
    recall = true / (true[-1] if len(true) and true[-1] else np.nan)
    precision = true / (true + false)
    return np.append(precision[::-1], 1), np.append(recall[::-1], 0), thresholds[::-1]


def auroc_per_label(labels: Any, scores: Any, weights: Any = None) -> Float[np.ndarray, " L"]:
    """The AUROC of each column of labels and scores `[N, L]`, each over its own known cases."""
    truth, values = as_labels(labels, dims=(2,)), as_numbers(scores, "scores", (2,))
    same_shape(labels=truth, scores=values)
    return np.array([auroc(*pair, weights) for pair in zip(truth.T, values.T, strict=True)])


def mean_of_defined(values: Any) -> float:
    """The mean of those that are not NaN; NaN if there is none."""
    numbers = as_numbers(values, "values")
    known = numbers[~np.isnan(numbers)]
    return float(known.mean()) if len(known) else float("nan")


def macro_auroc(labels: Any, scores: Any, weights: Any = None) -> float:
    """The mean AUROC over the labels for which it is defined; labels and scores are `[N, L]`."""
    return mean_of_defined(auroc_per_label(labels, scores, weights))


def one_vs_rest_auroc(
    classes: Any, probabilities: Any, weights: Any = None
) -> Float[np.ndarray, " C"]:
    """The AUROC of each class against all others.

    Args:
      classes: `[N]`, from 0 to C - 1.
      probabilities: `[N, C]`, or any other scores.
    """
    values = as_numbers(probabilities, "probabilities", (2,))
    truth = as_classes(classes, values.shape[1])
    if len(truth) != len(values):
        raise InputError(f"shapes disagree: classes {truth.shape}, probabilities {values.shape}")
    return np.array(
        [auroc(truth == number, values[:, number], weights) for number in range(values.shape[1])]
    )
