"""Who a model fails: metrics by subgroup at one common threshold, and the gaps between them."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.medical.metrics.calibration import bin_of
from vitjax.medical.metrics.inputs import as_labels, as_probabilities, listed, same_shape
from vitjax.medical.metrics.intervals import (
    GroupDraws,
    Interval,
    RankedAuroc,
    any_positive,
    percentile_interval,
)

INSUFFICIENT = "insufficient"
UNKNOWN = "Unknown"
BLANK = ("", "nan", "<na>", "none", "unknown")
ALL = "all"
METRICS = ("auroc", "fpr", "fnr", "ece")
GAPS = {"auroc": min, "fpr": max, "fnr": max}  # and which end of each is the worst
NUM_BINS = 15
_AGE = re.compile(r"(?:^|[^a-z])age(?:[^a-z]|$)")


@dataclasses.dataclass(frozen=True)
class SubgroupRow:
    """The metrics of one subgroup, each an Interval, or "insufficient".

    Attributes:
      column, value: as "Sex" and "Female"; "all" and "all" for all cases.
      n, positives, num_groups: cases with a known label, and the patients they are from.
      fpr, fnr: at the common threshold. ece: of the positive class, 15 bins.
    """

    column: str
    value: str
    n: int
    positives: int
    num_groups: int
    prevalence: float
    auroc: Interval | str
    fpr: Interval | str
    fnr: Interval | str
    ece: Interval | str


@dataclasses.dataclass(frozen=True)
class GapRow:
    """How far apart the subgroups of one column are.

    Attributes:
      metric: "auroc", "fpr", "fnr", or "equalised_odds", the larger of the gaps of fpr and fnr.
      gap: the largest minus the smallest value, and the interval of the difference between those
        two subgroups; "insufficient" with fewer than two subgroups to compare. The two were
        picked by their distance, so among many subgroups the gap is too large by chance.
      worst, best: the two subgroups.
      subgroups: that were compared, Unknown among them if it is large enough.
    """

    column: str
    metric: str
    gap: Interval | str
    worst: str | None
    best: str | None
    subgroups: tuple[str, ...]


def is_age(column: str) -> bool:
    """True of "Age", "PatientAge", "age_approx" and "AGE_AT_CXR", not of "image" or "stage"."""
    return bool(_AGE.search(re.sub("([a-z])([A-Z])", r"\1_\2", column).lower()))


def _texts(values: Any) -> list[str]:
    """One text for each value; UNKNOWN for what is blank."""
    found = []
    for value in np.asarray(values, object):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip()
        found.append(UNKNOWN if text.lower() in BLANK else text)
    return found


def _bin_ages(column: str, texts: Sequence[str], bins: Sequence[float]) -> list[str] | None:
    """The bin of each age, as "[18, 40)"; None if none is a number, as of bins already."""
    edges = np.asarray(bins, np.float64)
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise InputError(f"age_bins must be rising edges, at least two, got {tuple(bins)}")
    ages, wrong = np.full(len(texts), np.nan), set()
    for row, text in enumerate(texts):
        if text != UNKNOWN:
            try:
                ages[row] = float(text)
            except ValueError:
                wrong.add(text)
    if wrong:
        if np.isnan(ages).all():
            return None
        raise InputError(f"{column}: {listed(sorted(wrong))} are no ages, as others are")
    outside = ages[(ages < edges[0]) | (ages >= edges[-1])]
    if len(outside):
        raise InputError(
            f"{column}: ages {listed(np.unique(outside))} lie outside age_bins, "
            f"[{edges[0]:g}, {edges[-1]:g})"
        )
    names = [f"[{low:g}, {high:g})" for low, high in itertools.pairwise(edges)]
    place = np.searchsorted(edges, ages, side="right") - 1
    return [UNKNOWN if np.isnan(age) else names[at] for age, at in zip(ages, place, strict=True)]


def subgroups(column: str, values: Any, age_bins: Sequence[float]) -> dict[str, np.ndarray]:
    """A mask for each value of a column, in order, Unknown last; ages are binned.

    Raises:
      InputError: an age lies outside the bins, or only some are numbers.
    """
    texts = _texts(values)
    binned = _bin_ages(column, texts, age_bins) if is_age(column) else None
    names = np.array(texts if binned is None else binned, object)

    def place(name: str) -> tuple[bool, float, str]:
        low = float(name[1:].split(",")[0]) if binned is not None and name != UNKNOWN else 0.0
        return name == UNKNOWN, low, name

    return {name: names == name for name in sorted(set(names.tolist()), key=place)}


class _Subgroup:
    """All metrics of some cases under many weights at once."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, threshold: float):
        self._ranked = RankedAuroc(labels[rows], scores[rows])
        self.rows = rows[self._ranked.order]
        truth, p = labels[self.rows], scores[self.rows]
        above = p >= threshold
        sums = [1 - truth, (1 - truth) * above, truth, truth * ~above, np.ones(len(p))]
        gaps = np.zeros((len(p), NUM_BINS))
        gaps[np.arange(len(p)), bin_of(p, NUM_BINS)] = p - truth
        self._columns = np.concatenate([np.stack(sums, 1), gaps], 1)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """`[B, 4]`, in the order of METRICS, of weights `[B, n]` in the order of `rows`."""
        sums = weights @ self._columns
        negatives, false_positives, positives, false_negatives, total = sums[:, :5].T
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = [
                false_positives / negatives,
                false_negatives / positives,
                np.abs(sums[:, 5:]).sum(1) / total,
            ]
        return np.stack([self._ranked(weights), *rates], 1)


def _row(
    column: str, value: str, rows: np.ndarray, labels: np.ndarray, codes: np.ndarray,
    found: Mapping[str, Interval],
) -> SubgroupRow:  # fmt: skip
    positives = int(labels[rows].sum())
    return SubgroupRow(
        column, value, len(rows), positives, len(np.unique(codes[rows])),
        prevalence=positives / len(rows) if len(rows) else float("nan"),
        **{name: found.get(name, INSUFFICIENT) for name in METRICS},
    )  # fmt: skip


def _gaps(
    column: str, values: Mapping[str, np.ndarray], samples: Mapping[str, np.ndarray], level: float
) -> list[GapRow]:
    """Of subgroups that have enough cases: their metrics `[4]`, and resampled `[num, 4]`."""
    names = tuple(values)
    if len(names) < 2:
        return [
            GapRow(column, metric, INSUFFICIENT, None, None, names)
            for metric in (*GAPS, "equalised_odds")
        ]
    rows = []
    for metric, worst_of in GAPS.items():
        at = METRICS.index(metric)
        worst = worst_of(names, key=lambda name: values[name][at])
        best = (max if worst_of is min else min)(names, key=lambda name: values[name][at])
        sign = -1 if worst_of is min else 1
        value = sign * (values[worst][at] - values[best][at])
        resampled = sign * (samples[worst][:, at] - samples[best][:, at])
        gap = percentile_interval(value, resampled, level)
        rows.append(GapRow(column, metric, gap, worst, best, names))
    odds = max(rows[1:], key=lambda row: row.gap.value)
    return [*rows, dataclasses.replace(odds, metric="equalised_odds")]


def audit(
    labels: Any,
    scores: Any,
    columns: Mapping[str, Any],
    groups: Any,
    *,
    threshold: float,
    min_cases: int = 50,
    min_positives: int = 10,
    age_bins: Sequence[float] = (0, 18, 40, 60, 80, 200),
    num_bootstraps: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[SubgroupRow | GapRow]:
    """Metrics of all cases and of each subgroup, and the gaps of each column, with intervals.

    All intervals are from the same resamples of whole groups, stratified by whether a group has a
    positive case, so that subgroups that share patients are compared as pairs.

    Args:
      labels: 0, 1 or NaN, `[N]`; a case that is NaN is left out.
      scores: probabilities, `[N]`.
      columns: {"Sex": `[N]`, ...}; texts or numbers. Blank is a value of its own, "Unknown". Ages,
        known by the name of the column, are binned.
      groups: the patient of each case, `[N]`.
      threshold: the same for all, chosen on validation data; `>= threshold` is positive.
      min_cases, min_positives: a subgroup with fewer cases, or with fewer of either class than
        min_positives, is "insufficient".
      age_bins: rising edges; each bin is without its upper one.

    Returns:
      The row of all cases; then for each column its SubgroupRows and four GapRows.
      `dataclasses.asdict` turns each into plain data.

    Raises:
      InputError: shapes disagree, a score is outside 0 to 1, an age is outside the bins, the
        threshold is NaN, or no label is known.
    """
    truth, values = as_labels(labels), as_probabilities(scores, "scores", (1,))
    names = np.asarray(groups)
    tables = {name: np.asarray(column, object) for name, column in columns.items()}
    shapes = {"labels": truth, "scores": values, "groups": names}
    same_shape(**shapes, **{f"column {name}": table for name, table in tables.items()})
    if np.isnan(threshold):
        raise InputError("the threshold is NaN: was it chosen on data of one class?")
    known = ~np.isnan(truth)
    if not known.any():
        raise InputError("no label is known")
    truth, values, names = truth[known], values[known], names[known]
    draws = GroupDraws(names, any_positive(truth, names))
    masks = {(ALL, ALL): np.ones(len(truth), bool)}
    for column, table in tables.items():
        for value, mask in subgroups(column, table[known], age_bins).items():
            masks[column, value] = mask
    rows = {key: np.flatnonzero(mask) for key, mask in masks.items()}
    enough = {
        key: _Subgroup(at, truth, values, threshold)
        for key, at in rows.items()
        if len(at) >= min_cases
        and min(truth[at].sum(), len(at) - truth[at].sum()) >= max(min_positives, 1)
    }
    points = {key: each(np.ones((1, len(each.rows))))[0] for key, each in enough.items()}
    parts: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in enough}
    for counts in draws.counts(num_bootstraps, seed):
        for key, each in enough.items():
            parts[key].append(each(np.take(counts, draws.codes[each.rows], 1).astype(np.float64)))
    samples = {key: np.concatenate(part) for key, part in parts.items()}
    found: list[SubgroupRow | GapRow] = []
    for column in (ALL, *tables):
        keys = [key for key in masks if key[0] == column]
        for key in keys:
            intervals = {
                name: percentile_interval(points[key][at], samples[key][:, at], level)
                for at, name in enumerate(METRICS)
                if key in enough
            }
            found.append(_row(*key, rows[key], truth, draws.codes, intervals))
        if column != ALL:
            of = [(key[1], key) for key in keys if key in enough]
            found += _gaps(
                column, {n: points[k] for n, k in of}, {n: samples[k] for n, k in of}, level
            )
    return found
