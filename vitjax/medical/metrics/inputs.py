"""What metrics accept: checked once, as float64 or int64 arrays."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vitjax.errors import InputError

SHOWN = 5  # offending values that an error lists


def listed(names: Any) -> str:
    """The first few of some names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def as_numbers(values: Any, name: str, dims: tuple[int, ...] = (1,)) -> Float[np.ndarray, "..."]:
    """float64; InputError unless they are numbers in one of the allowed numbers of dimensions."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error
    if numbers.ndim not in dims:
        allowed = " or ".join(map(str, dims))
        raise InputError(f"{name} must have {allowed} dimensions, got shape {numbers.shape}")
    return numbers


def same_shape(**arrays: np.ndarray) -> None:
    """InputError, naming the shapes, unless all are of one shape."""
    if len({array.shape for array in arrays.values()}) > 1:
        raise InputError(
            "shapes disagree: " + ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        )


def as_weights(weights: Any, count: int) -> Float[np.ndarray, " N"]:
    """Weights of `count` cases; ones if None. InputError if negative or not finite."""
    if weights is None:
        return np.ones(count)
    numbers = as_numbers(weights, "weights")
    if len(numbers) != count:
        raise InputError(f"shapes disagree: weights {numbers.shape}, cases ({count},)")
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(bad):
        raise InputError(
            f"weights must be finite and not negative; rows (from 0) {listed(bad)} are not"
        )
    return numbers


def as_labels(
    labels: Any, name: str = "labels", dims: tuple[int, ...] = (1,)
) -> Float[np.ndarray, "..."]:
    """0.0, 1.0 and NaN for unknown; InputError if anything else."""
    numbers = as_numbers(labels, name, dims)
    bad = numbers[~(np.isnan(numbers) | (numbers == 0) | (numbers == 1))]
    if len(bad):
        raise InputError(f"{name} must be 0, 1 or NaN (unknown), got {listed(np.unique(bad))}")
    return numbers


def known_cases(
    labels: Any, scores: Any, weights: Any = None
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Labels, scores and weights of the cases whose label is known.

    Raises:
      InputError: shapes disagree, a label is none, a weight is negative, or the score of a known
        case is NaN.
    """
    truth, values = as_labels(labels), as_numbers(scores, "scores")
    same_shape(labels=truth, scores=values)
    factors = as_weights(weights, len(truth))
    known = ~np.isnan(truth)
    bad = np.flatnonzero(known & np.isnan(values))
    if len(bad):
        raise InputError(f"scores are NaN in rows (from 0) {listed(bad)}")
    return truth[known], values[known], factors[known]


def as_classes(
    classes: Any, num_classes: int | None = None, name: str = "classes"
) -> Int[np.ndarray, " N"]:
    """int64; InputError unless whole numbers from 0 to num_classes - 1."""
    numbers = as_numbers(classes, name)
    whole = np.isfinite(numbers) & (numbers >= 0) & (numbers == np.floor(numbers))
    if num_classes is not None:
        whole &= numbers < num_classes
    if not whole.all():
        most = "" if num_classes is None else f" to {num_classes - 1}"
        raise InputError(
            f"{name} must be whole numbers from 0{most}, got {listed(np.unique(numbers[~whole]))}"
        )
    return numbers.astype(np.int64)


def as_probabilities(
    values: Any, name: str = "probabilities", dims: tuple[int, ...] = (1, 2)
) -> Float[np.ndarray, "..."]:
    """InputError unless all lie in 0 to 1."""
    numbers = as_numbers(values, name, dims)
    bad = numbers[~((numbers >= 0) & (numbers <= 1))]
    if len(bad):
        raise InputError(f"{name} must lie in 0 to 1, got {listed(bad)}")
    return numbers
