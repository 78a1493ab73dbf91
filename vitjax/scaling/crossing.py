"""Where two recipes or architectures break even, over data size, compute or parameters."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vitjax.errors import InputError
from vitjax.scaling.plain import plain
from vitjax.scaling.resample import check_level, percentile_interval

GRID = 512


@runtime_checkable
class Curve(Protocol):
    """A fit of one variable: predictions [N], and those of its resamples [R, N], for x [N]."""

    def predict(self, x: Any, /) -> np.ndarray: ...

    def samples_predict(self, x: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where two curves meet within a range.

    Attributes:
      x: the first meeting point; None where there is none.
      low, high: its interval. 0 or infinite: within the level, they meet below or above the range,
        or not at all. None without x.
      share_crossing: of the resamples that meet within the range.
      num_crossings: of the fits; above one the curves are too close to call, or wave.
      better_below, better_above: "a" or "b", the lower curve at the two ends.
    """

    x: float | None
    low: float | None
    high: float | None
    share_crossing: float
    num_crossings: int
    better_below: str
    better_above: str
    range: tuple[float, float]
    level: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


def _first_meeting(logs: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """ln x where each row of the gap [R, N] first changes its sign; NaN where it never does."""
    changes = np.diff(np.sign(gap), axis=1) != 0
    first = changes.argmax(1)
    rows = np.arange(len(gap))
    left, right = gap[rows, first], gap[rows, first + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(left == right, 0.0, left / (left - right))
    met = logs[first] + part * (logs[first + 1] - logs[first])
    return np.where(changes.any(1), met, np.nan)


def crossing(fit_a: Curve, fit_b: Curve, low: float, high: float, level: float = 0.9) -> Crossing:
    """The x at which b becomes better than a, or the other way round; lower values are better.

    Args:
      fit_a, fit_b: fits of independent runs, each with resamples of its own.
      low, high: where to look. A crossing far beyond both fits' data is an extrapolation.
    """
    check_level(level)
    if not 0 < low < high:
        raise InputError(f"the range {low:g} to {high:g} must be above 0 and rising")
    x = np.geomspace(low, high, GRID)
    logs = np.log(x)
    gap = np.log(np.asarray(fit_a.predict(x))) - np.log(np.asarray(fit_b.predict(x)))
    many_a, many_b = np.asarray(fit_a.samples_predict(x)), np.asarray(fit_b.samples_predict(x))
    count = min(len(many_a), len(many_b))
    gaps = np.log(many_a[:count]) - np.log(many_b[:count])
    met = _first_meeting(logs, np.concatenate([gap[None], gaps]))
    found, samples = met[0], met[1:]
    names = {True: "a", False: "b"}
    ends = names[bool(gap[0] < 0)], names[bool(gap[-1] < 0)]
    share = float(np.isfinite(samples).mean()) if count else 0.0
    common = {
        "share_crossing": share,
        "num_crossings": int((np.diff(np.sign(gap)) != 0).sum()),
        "better_below": ends[0],
        "better_above": ends[1],
        "range": (float(low), float(high)),
        "level": level,
    }
    if not np.isfinite(found):
        note = f"no crossing in the range: {ends[0]} is better all over it"
        if share > 0.05:
            note += f", though {share:.0%} of the resamples cross"
        return Crossing(x=None, low=None, high=None, note=note, **common)
    # A resample without a meeting says on which side of the range it would be.
    starts_as_fit = (gaps[:, 0] < 0) == (gap[0] < 0)
    places = np.where(np.isfinite(samples), np.exp(samples), np.where(starts_as_fit, np.inf, 0.0))
    bottom, top = percentile_interval(places, level) if count else (np.nan, np.nan)
    note = "" if share >= level else f"only {share:.0%} of the resamples cross in the range"
    return Crossing(x=float(np.exp(found)), low=float(bottom), high=float(top), note=note, **common)
