"""Whether probabilities can be taken at their word, and one number that repairs them."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from vitjax.errors import InputError, suggest
from vitjax.medical.metrics.inputs import (
    as_classes,
    as_labels,
    as_numbers,
    as_probabilities,
    as_weights,
    listed,
    same_shape,
)

KINDS = ("softmax", "sigmoid")
LOWEST, HIGHEST = 0.01, 100.0  # temperatures
HALVINGS = 60
SMALLEST = float(np.finfo(np.float64).eps)  # what a probability of 0 costs is not infinite


def _solve(slope: Any) -> float:
    """The temperature at which a slope that rises with it is zero, or the end it points to."""
    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if slope(np.exp(-middle)) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def _softmax_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    right = np.take_along_axis(logits, targets[:, None], 1)
    margins = logits - right  # the right class at 0
    if not margins.any():
        return 1.0
    return _solve(lambda sharpness: (special.softmax(sharpness * margins, 1) * margins).sum())


def _sigmoid_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    if not 0 < targets.sum() < len(targets) or not logits.any():
        return 1.0
    return _solve(lambda sharpness: ((special.expit(sharpness * logits) - targets) * logits).sum())


def fit_temperature(logits: Any, targets: Any, kind: str = "softmax") -> Any:
    """The temperature that minimises the negative log-likelihood; give it validation data.

    Logits are divided by it, so no order and no argmax changes. The likelihood is convex in its
    inverse: its slope is bisected, in the logarithm of the temperature, between 0.01 and 100.

    Args:
      logits: finite. "softmax": `[N, C]`; "sigmoid": `[N]` or `[N, L]`.
      targets: "softmax": classes `[N]`; "sigmoid": 0, 1 or NaN (left out), of the logits' shape.

    Returns:
      A float, or `[L]`, one for each label. It is 1 where the data say nothing: no example, one
      value of a label only, or logits that are all the same.

    Source: Guo et al. 2017.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}; {suggest(kind, KINDS)}")
    values = as_numbers(logits, "logits", (2,) if kind == "softmax" else (1, 2))
    if not np.isfinite(values).all():
        raise InputError("logits must be finite")
    if kind == "softmax":
        classes = as_classes(targets, values.shape[1], "targets")
        if len(classes) != len(values):
            raise InputError(f"shapes disagree: logits {values.shape}, targets {classes.shape}")
        return _softmax_temperature(values, classes)
    truth = as_labels(targets, "targets", (1, 2))
    same_shape(logits=values, targets=truth)
    columns = zip(np.atleast_2d(values.T), np.atleast_2d(truth.T), strict=True)
    found = [_sigmoid_temperature(x[~np.isnan(y)], y[~np.isnan(y)]) for x, y in columns]
    return found[0] if values.ndim == 1 else np.array(found)


def apply_temperature(logits: Any, temperature: Any) -> Float[np.ndarray, "..."]:
    """Logits divided by a temperature, or by one for each column."""
    divisor = np.asarray(temperature, np.float64)
    if not (np.isfinite(divisor) & (divisor > 0)).all():
        raise InputError(f"temperatures must be positive, got {listed(divisor.ravel())}")
    values = as_numbers(logits, "logits", (1, 2))
    if divisor.ndim and divisor.shape != values.shape[1:]:
        raise InputError(f"shapes disagree: logits {values.shape}, temperatures {divisor.shape}")
    return values / divisor


def _predicted(
    probabilities: Any, labels: Any, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A probability of each case, whether what it promises came true, and the case's weight."""
    values = as_probabilities(probabilities)
    if values.ndim == 2:
        classes = as_classes(labels, values.shape[1], "labels")
        if len(classes) != len(values):
            raise InputError(
                f"shapes disagree: labels {classes.shape}, probabilities {values.shape}"
            )
        right = values.argmax(1) == classes
        return values.max(1), right.astype(np.float64), as_weights(weights, len(classes))
    truth = as_labels(labels)
    same_shape(labels=truth, probabilities=values)
    known = ~np.isnan(truth)
    return values[known], truth[known], as_weights(weights, len(truth))[known]


def bin_of(probabilities: np.ndarray, num_bins: int) -> np.ndarray:
    """The number of the bin of each: equal widths, each with its upper end; 0 is in the first."""
    if num_bins < 1:
        raise InputError(f"num_bins must be at least 1, got {num_bins}")
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], probabilities)


def expected_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, weights: Any = None
) -> float:
    """The mean gap between promised and observed frequency over bins, by the weight in each.

    Args:
      probabilities: `[N]` of the positive class, with labels 0, 1 or NaN; or `[N, C]`, of which
        the largest is taken, with classes `[N]`.

    Returns:
      NaN without cases.

    Source: Guo et al. 2017. Of a binary task the positive class is taken, not the likelier one.
    """
    p, truth, factors = _predicted(probabilities, labels, weights)
    gaps = np.bincount(bin_of(p, num_bins), factors * (p - truth), num_bins)
    total = factors.sum()
    return float(np.abs(gaps).sum() / total) if total else float("nan")


def classwise_ece(probabilities: Any, labels: Any, num_bins: int = 15) -> Float[np.ndarray, " C"]:
    """The expected calibration error of each column, as a binary task by itself.

    Args:
      probabilities: `[N, C]`.
      labels: classes `[N]`, or 0, 1 and NaN `[N, C]`.
    """
    values = as_probabilities(probabilities, dims=(2,))
    if np.ndim(labels) == 2:
        truth = as_labels(labels, dims=(2,))
    else:
        classes = as_classes(labels, values.shape[1], "labels")
        truth = (classes[:, None] == np.arange(values.shape[1])).astype(np.float64)
    same_shape(labels=truth, probabilities=values)
    pairs = zip(values.T, truth.T, strict=True)
    return np.array([expected_calibration_error(p, y, num_bins) for p, y in pairs])


def _each(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and truth `[N, C]`, or `[N]` of the known cases."""
    values = as_probabilities(probabilities)
    if values.ndim == 2:
        classes = as_classes(labels, values.shape[1], "labels")
        truth = (classes[:, None] == np.arange(values.shape[1])).astype(np.float64)
    else:
        truth = as_labels(labels)
    same_shape(labels=truth, probabilities=values)
    known = ~np.isnan(truth) if values.ndim == 1 else slice(None)
    return values[known], truth[known]


def brier(probabilities: Any, labels: Any, weights: Any = None) -> float:
    """The mean squared error of probabilities, 0 to 1; of `[N, C]` summed over classes, 0 to 2.

    Args:
      probabilities: `[N]` with labels 0, 1 or NaN; or `[N, C]` with classes `[N]`.
    """
    values, truth = _each(probabilities, labels)
    errors = (values - truth) ** 2
    return _mean(errors if errors.ndim == 1 else errors.sum(1), labels, weights)


def negative_log_likelihood(probabilities: Any, labels: Any, weights: Any = None) -> float:
    """The mean of -ln of the probability that was given to what is true, in nats.

    A probability counts as at least 2.2e-16, so that one certain mistake is not infinite.

    Args:
      probabilities: `[N]` with labels 0, 1 or NaN; or `[N, C]` with classes `[N]`.
    """
    values, truth = _each(probabilities, labels)
    of_truth = (
        np.where(truth == 1, values, 1 - values) if values.ndim == 1 else (values * truth).sum(1)
    )
    return _mean(-np.log(np.maximum(of_truth, SMALLEST)), labels, weights)


def _mean(costs: np.ndarray, labels: Any, weights: Any) -> float:
    """Over the cases whose label is known; NaN without."""
    truth = np.asarray(labels, np.float64)
    factors = as_weights(weights, len(truth))[~np.isnan(truth)]
    return float(factors @ costs / factors.sum()) if factors.sum() else float("nan")


@dataclasses.dataclass(frozen=True)
class ReliabilityRow:
    """One bin: probabilities above `low` and up to `high`; 0 is in the first bin.

    Attributes:
      count: of cases; mean_probability, observed: promised and true frequency, NaN of no case.
    """

    low: float
    high: float
    count: int
    mean_probability: float
    observed: float


def reliability_table(probabilities: Any, labels: Any, num_bins: int = 15) -> list[ReliabilityRow]:
    """Promised against observed frequency, as expected_calibration_error bins them."""
    p, truth, _ = _predicted(probabilities, labels, None)
    bins = bin_of(p, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    means = [
        np.divide(sums, counts, out=np.full(num_bins, np.nan), where=counts > 0)
        for sums in (np.bincount(bins, p, num_bins), np.bincount(bins, truth, num_bins))
    ]
    edges = np.linspace(0, 1, num_bins + 1)
    columns = (edges[:-1], edges[1:], counts, *means)
    return [ReliabilityRow(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
