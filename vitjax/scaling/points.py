"""Points to fit a law of one variable to: checked, sorted, in normalised logarithms."""

import dataclasses
from typing import Any

import numpy as np

from vitjax.errors import InputError

SHOWN = 20  # row numbers that an error lists
SAME = 0.01  # sizes closer than this in ln N are one size


def check_positive(**columns: Any) -> dict[str, np.ndarray]:
    """The columns as float64 arrays of one length.

    Raises:
      InputError: they differ in length, or hold anything but positive finite numbers; names the
        rows, counted from 0.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        try:
            arrays[name] = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be numbers: {error}") from error
        if arrays[name].ndim != 1:
            raise InputError(f"{name} must have one dimension, got shape {arrays[name].shape}")
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise InputError(f"the columns must be of one length: {listed}")
    for name, values in arrays.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            rows = ", ".join(f"{i} ({values[i]:g})" for i in bad[:SHOWN])
            raise InputError(
                f"{name} must be positive and finite; {len(bad)} of {len(values)} rows are not "
                f"(counted from 0): {rows}"
            )
    return arrays


def num_levels(logs: np.ndarray) -> int:
    """How many different scales there are, those within SAME of each other counted once."""
    return 1 + int((np.diff(np.sort(logs)) > SAME).sum()) if len(logs) else 0


@dataclasses.dataclass(frozen=True)
class Points:
    """Sorted by x.

    Attributes:
      x, y: as given, [N].
      groups: [N], the run or trunk that each point belongs to, as 0, 1, ...
      x_ref, y_ref: geometric means; u = ln(x / x_ref) and v = ln(y / y_ref).
      scale: a first estimate of the noise in v, from a cubic in u: what residuals are measured in.
    """

    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    x_ref: float
    y_ref: float
    scale: float

    @property
    def u(self) -> np.ndarray:
        return np.log(self.x / self.x_ref)

    @property
    def v(self) -> np.ndarray:
        return np.log(self.y / self.y_ref)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def num_scales(self) -> int:
        """How many different x there are."""
        return len(np.unique(self.x))

    @property
    def num_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def is_grouped(self) -> bool:
        return self.num_groups < len(self)


def noise_scale(u: np.ndarray, v: np.ndarray) -> float:
    """A first estimate of the noise in v, from a cubic in u (less where points are few)."""
    degree = min(3, len(np.unique(u)) - 2)
    residual = v - np.polyval(np.polyfit(u, v, max(degree, 0)), u)
    free = max(len(u) - max(degree, 0) - 1, 1)
    return max(float(np.sqrt((residual**2).sum() / free)), 1e-6)


def make_points(x: Any, y: Any, groups: Any = None) -> Points:
    """Checks and sorts.

    Raises:
      InputError: not positive, of different lengths, or fewer than four different x.
    """
    columns = check_positive(x=x, y=y)
    xs, ys = columns["x"], columns["y"]
    labels = np.arange(len(xs)) if groups is None else np.asarray(groups)
    if labels.shape != xs.shape:
        raise InputError(f"groups must name one run for each of {len(xs)} points")
    distinct = np.unique(xs)
    if len(distinct) < 4:
        listed = ", ".join(f"{v:g}" for v in distinct)
        raise InputError(
            f"a law needs at least 4 different x, got {len(distinct)} ({listed}) in {len(xs)} "
            "points: add runs at other scales"
        )
    order = np.lexsort((ys, xs))
    xs, ys, labels = xs[order], ys[order], np.unique(labels[order], return_inverse=True)[1]
    x_ref, y_ref = (float(np.exp(np.log(v).mean())) for v in (xs, ys))
    scale = noise_scale(np.log(xs / x_ref), np.log(ys / y_ref))
    return Points(xs, ys, labels, x_ref, y_ref, scale)
