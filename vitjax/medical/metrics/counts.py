"""Metrics of decisions: accuracies, F1, kappa, and rates at a threshold chosen on validation."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from vitjax.errors import InputError
from vitjax.medical.metrics.inputs import as_classes, as_weights, known_cases, same_shape
from vitjax.medical.metrics.ranking import mean_of_defined, roc_curve

RULES = ("specificity", "sensitivity")
ROUNDING = 1e-12  # a rate this close to its target has reached it
KAPPA_WEIGHTS = ("linear", "quadratic")


def _ratio(part: Any, whole: Any) -> np.ndarray:
    """NaN where the whole is nothing."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def confusion(
    classes: Any, predicted: Any, num_classes: int, weights: Any = None
) -> Float[np.ndarray, "C C"]:
    """How many cases, or what weight, of each class (row) were given each class (column)."""
    truth = as_classes(classes, num_classes)
    given = as_classes(predicted, num_classes, "predicted")
    same_shape(classes=truth, predicted=given)
    counts = np.bincount(
        truth * num_classes + given, as_weights(weights, len(truth)), num_classes**2
    )
    return counts.reshape(num_classes, num_classes)


def _confusion_of_all(classes: Any, predicted: Any, weights: Any) -> Float[np.ndarray, "C C"]:
    truth, given = as_classes(classes), as_classes(predicted, name="predicted")
    most = max(truth.max(initial=0), given.max(initial=0))
    return confusion(truth, given, int(most) + 1, weights)


def accuracy(classes: Any, predicted: Any, weights: Any = None) -> float:
    """The share of cases whose class was predicted; NaN without cases."""
    truth, given = as_classes(classes), as_classes(predicted, name="predicted")
    same_shape(classes=truth, predicted=given)
    factors = as_weights(weights, len(truth))
    return float(_ratio(factors @ (truth == given), factors.sum()))


def balanced_accuracy(classes: Any, predicted: Any, weights: Any = None) -> float:
    """The mean recall over the classes that occur."""
    table = _confusion_of_all(classes, predicted, weights)
    return mean_of_defined(_ratio(np.diag(table), table.sum(1)))


def f1(
    classes: Any,
    predicted: Any,
    num_classes: int,
    average: str | None = None,
    weights: Any = None,
) -> Any:
    """The harmonic mean of precision and recall.

    Args:
      average: None for each class, `[C]`, NaN for one that neither occurs nor is predicted;
        "macro" for the mean over the others.
    """
    if average not in (None, "macro"):
        raise InputError(f"average must be None or 'macro', got {average!r}")
    table = confusion(classes, predicted, num_classes, weights)
    each = _ratio(2 * np.diag(table), table.sum(0) + table.sum(1))
    return each if average is None else mean_of_defined(each)


def cohen_kappa(a: Any, b: Any, num_classes: int, weights: str | None = None) -> float:
    """Agreement of two raters beyond chance.

    Args:
      a, b: the classes that each gave, `[N]`.
      weights: how a disagreement by d classes counts: None alike, "linear" d, "quadratic" d^2.

    Returns:
      NaN if chance alone makes them agree, as when both give one and the same class only.

    Source: Cohen 1960 and 1968.
    """
    if weights is not None and weights not in KAPPA_WEIGHTS:
        raise InputError(f"weights must be None, 'linear' or 'quadratic', got {weights!r}")
    table = confusion(a, b, num_classes)
    distance = np.abs(np.subtract.outer(np.arange(num_classes), np.arange(num_classes)))
    cost = {None: distance > 0, "linear": distance, "quadratic": distance**2}[weights]
    chance = np.outer(table.sum(1), table.sum(0))
    return float(1 - _ratio((cost * table).sum() * table.sum(), (cost * chance).sum()))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A score from which on a case is positive, and the data that it was chosen on.

    Attributes:
      value: `score >= value` is positive; NaN if the data hold one class only.
      rule: "youden", or as "specificity>=0.9".
      sensitivity, specificity: on those data, not to be reported as results.
      n, positives: of those data.
    """

    value: float
    rule: str
    sensitivity: float
    specificity: float
    n: int
    positives: int


def choose_threshold(labels: Any, scores: Any, rule: str | tuple[str, float]) -> Threshold:
    """Chooses a threshold; give it validation data, never the data to report on.

    Args:
      rule: "youden", the largest sensitivity + specificity, the higher threshold of equals;
        ("specificity", 0.9), the lowest threshold with at least that specificity; or
        ("sensitivity", 0.9), the highest with at least that sensitivity.

    Raises:
      InputError: no such rule, or a target outside 0 to 1.
    """
    kind, target = (rule, 0.0) if isinstance(rule, str) else rule
    if (kind != "youden") if isinstance(rule, str) else (kind not in RULES):
        raise InputError(
            f"unknown rule {rule!r}; allowed: 'youden', ('specificity', x), ('sensitivity', x)"
        )
    if not 0 <= target <= 1:
        raise InputError(f"the {kind} to reach must lie in 0 to 1, got {target:g}")
    name = "youden" if isinstance(rule, str) else f"{kind}>={target:g}"
    truth, values, _ = known_cases(labels, scores)
    fpr, tpr, thresholds = roc_curve(truth, values)
    n, positives = len(truth), int(truth.sum())
    if not 0 < positives < n:
        nan = float("nan")
        return Threshold(nan, name, nan, nan, n, positives)
    if kind == "youden":
        at = int(np.argmax(tpr - fpr))
    elif kind == "specificity":
        at = int(np.flatnonzero(1 - fpr >= target - ROUNDING)[-1])
    else:
        at = int(np.flatnonzero(tpr >= target - ROUNDING)[0])
    # The infinite first threshold as a finite one: just above all scores.
    value = np.nextafter(thresholds[1], np.inf) if at == 0 else thresholds[at]
    return Threshold(float(value), name, float(tpr[at]), float(1 - fpr[at]), n, positives)


def rates_at(
    labels: Any, scores: Any, threshold: float, weights: Any = None
) -> dict[str, float | int]:
    """Sensitivity, specificity, ppv, npv, fpr, fnr, n and positives; `>= threshold` is positive.

    A rate out of no case is NaN, and so are all rates at a threshold that is NaN.
    """
    truth, values, factors = known_cases(labels, scores, weights)
    if np.isnan(threshold):
        factors = np.zeros_like(factors)
    above = values >= threshold
    true_positive, false_positive = factors @ (above * truth), factors @ (above * (1 - truth))
    false_negative, true_negative = factors @ (~above * truth), factors @ (~above * (1 - truth))
    parts = {
        "sensitivity": (true_positive, false_negative),
        "specificity": (true_negative, false_positive),
        "ppv": (true_positive, false_positive),
        "npv": (true_negative, false_negative),
        "fpr": (false_positive, true_negative),
        "fnr": (false_negative, true_positive),
    }
    rates: dict[str, float | int] = {
        name: float(_ratio(part, part + rest)) for name, (part, rest) in parts.items()
    }
    return rates | {"n": len(truth), "positives": int(truth.sum())}
