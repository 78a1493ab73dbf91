"""How sure a metric is: bootstraps over whole groups, DeLong's test, Holm's correction, seeds."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from vitjax.errors import InputError
from vitjax.medical.metrics.inputs import as_labels, as_numbers, known_cases, listed, same_shape
from vitjax.medical.metrics.ranking import auroc

CELLS = 2**18  # weights in memory at once

Statistic = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its percentile interval.

    Attributes:
      value: on all cases as they are, a float or an array.
      low, high: of the same shape; NaN where no resample defines the value.
      level: as 0.95.
      num: of resamples.
      num_undefined: of those, the ones whose value is NaN; they are left out.
    """

    value: Any
    low: Any
    high: Any
    level: float
    num: int
    num_undefined: Any


@dataclasses.dataclass(frozen=True)
class PairedDifference(Interval):
    """The interval of a - b, the two values, and a two-sided p of no difference."""

    value_a: Any
    value_b: Any
    p: Any


def _check(num: int, level: float) -> None:
    if num < 1:
        raise InputError(f"the number of resamples must be at least 1, got {num}")
    if not 0 < level < 1:
        raise InputError(f"level {level:g} is not between 0 and 1, such as 0.95")


def percentile_interval(
    value: Any, samples: Float[np.ndarray, "num ..."], level: float
) -> Interval:
    """The central interval of the samples, NaN left out.

    Source: Efron and Tibshirani 1993, section 13.3; linear between ranks.
    """
    _check(len(samples), level)
    columns = samples.reshape(len(samples), -1).T
    ends = np.full((2, len(columns)), np.nan)
    for number, column in enumerate(columns):
        known = column[~np.isnan(column)]
        if len(known):
            ends[:, number] = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    undefined = np.isnan(samples).sum(0)
    if samples.ndim == 1:
        low, high = ends[:, 0].tolist()
        return Interval(float(value), low, high, level, len(samples), int(undefined))
    low, high = ends.reshape(2, *samples.shape[1:])
    return Interval(np.asarray(value), low, high, level, len(samples), undefined)


def group_names(groups: Any) -> np.ndarray:
    """The name of each case's group, `[N]`; InputError if one is blank or there is no case."""
    names = np.asarray(groups)
    if names.ndim != 1 or not len(names):
        raise InputError(f"groups must be one name for each case, got shape {names.shape}")
    if names.dtype.kind == "O":
        names = np.array(["" if name is None or name != name else str(name) for name in names])
    blank = np.char.strip(names) == "" if names.dtype.kind == "U" else names != names
    if blank.any():
        raise InputError(
            f"groups are blank in rows (from 0) {listed(np.flatnonzero(blank))}: a case whose "
            "group is unknown needs a name of its own"
        )
    return names


def any_positive(labels: Any, groups: Any) -> Float[np.ndarray, " N"]:
    """1 for each case of a group that has a positive case, else 0: strata for group_bootstrap."""
    truth = as_labels(labels)
    names = group_names(groups)
    same_shape(labels=truth, groups=names)
    codes = np.unique(names, return_inverse=True)[1]
    positives = np.bincount(codes, truth == 1)
    return (positives[codes] > 0).astype(np.float64)


class GroupDraws:
    """Draws whole groups with replacement, the same whatever order the cases are in.

    Args:
      groups: the name of each case's group, `[N]`: the patient, lesion or slide.
      strata: `[N]`, one value within a group; as many groups of each value are drawn as there are.

    Raises:
      InputError: a name is blank, or a group is in two strata.
    """

    def __init__(self, groups: Any, strata: Any = None):
        names = group_names(groups)
        self.names, self.codes = np.unique(names, return_inverse=True)
        self._members = [np.arange(len(self.names))]
        if strata is not None:
            values = np.asarray(strata)
            same_shape(groups=names, strata=values)
            kinds, kind_of = np.unique(values, return_inverse=True)
            of_group = np.zeros(len(self.names), np.int64)
            of_group[self.codes] = kind_of
            mixed = np.unique(self.codes[of_group[self.codes] != kind_of])
            if len(mixed):
                raise InputError(f"groups {listed(self.names[mixed])} are in several strata")
            self._members = [np.flatnonzero(of_group == kind) for kind in range(len(kinds))]

    def counts(self, num: int, seed: int) -> Iterator[Int[np.ndarray, "B G"]]:
        """How often each group was drawn, a few resamples at a time; the same for the same seed."""
        generator = np.random.default_rng(seed)
        batch = max(1, CELLS // len(self.codes))
        for start in range(0, num, batch):
            counts = np.empty((min(batch, num - start), len(self.names)), np.int64)
            for row in counts:
                drawn = [m[generator.integers(0, len(m), len(m))] for m in self._members]
                row[:] = np.bincount(np.concatenate(drawn), minlength=len(row))
            yield counts


class RankedAuroc:
    """The AUROC of the same cases under many weights: they are sorted once.

    Attributes:
      order: the cases, lowest score first; weights must come in this order.
    """

    def __init__(self, labels: Float[np.ndarray, " N"], scores: Float[np.ndarray, " N"]):
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        self._positive = labels[self.order]
        starts = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
        self._starts = np.flatnonzero(starts)

    def __call__(self, weights: Float[np.ndarray, "B N"]) -> Float[np.ndarray, " B"]:
        positive = weights * self._positive
        negative = weights - positive
        below = np.cumsum(positive, 1)
        total = below[:, -1] * negative.sum(1)
        if len(self._starts) == len(self.order):
            beaten = np.einsum("bn,bn->b", negative, below)
        else:
            last = below[:, np.append(self._starts[1:], len(self.order)) - 1]
            first = np.concatenate([np.zeros((len(last), 1)), last[:, :-1]], 1)
            negative = np.add.reduceat(negative, self._starts, 1)
            beaten = np.einsum("bt,bt->b", negative, first + last) / 2
        return 1 - np.divide(beaten, total, out=np.full(len(total), np.nan), where=total > 0)


def group_bootstrap(
    statistic: Callable[[np.ndarray], Any],
    groups: Any,
    *,
    num: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Any = None,
) -> Interval:
    """The percentile interval of any statistic, by drawing whole groups with replacement.

    Args:
      statistic: of weights `[N]`, how often each case was drawn, to a float or an array. Of ones
        it is the value.
      groups: the group of each case, `[N]`; the result does not depend on the order of the cases.
      strata: draw within these, `[N]`; `any_positive(labels, groups)` keeps both classes.
    """
    _check(num, level)
    draws = GroupDraws(groups, strata)
    value = np.asarray(statistic(np.ones(len(draws.codes))), np.float64)
    samples = [
        np.asarray(statistic(weights), np.float64)
        for counts in draws.counts(num, seed)
        for weights in counts[:, draws.codes].astype(np.float64)
    ]
    return percentile_interval(value, np.stack(samples), level)


def _known(labels: Any, groups: Any, *scores: Any) -> tuple[np.ndarray, np.ndarray, list]:
    """Labels, groups and scores of known cases; without groups in an order of their values."""
    parts = [known_cases(labels, values) for values in scores]
    truth, values = parts[0][0], [part[1] for part in parts]
    if groups is None:
        order = np.lexsort((*values[::-1], truth))
        return truth[order], np.arange(len(truth)), [column[order] for column in values]
    names, known = np.asarray(groups), ~np.isnan(as_labels(labels))
    same_shape(labels=known, groups=names)
    return truth, names[known], values


def auroc_interval(
    labels: Any,
    scores: Any,
    groups: Any = None,
    *,
    num: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    stratify: bool = True,
) -> Interval:
    """The AUROC and its interval, as group_bootstrap gives them, much faster.

    Of scores that separate the classes perfectly the interval is one point: it says nothing then.

    Args:
      groups: None if the cases are independent.
      stratify: draw groups with and without a positive case apart.
    """
    _check(num, level)
    truth, names, (values,) = _known(labels, groups, scores)
    if not len(truth):
        return percentile_interval(np.nan, np.full(num, np.nan), level)
    draws = GroupDraws(names, any_positive(truth, names) if stratify else None)
    resampled = _resampled(auroc, truth, values, draws)
    samples = [resampled(counts) for counts in draws.counts(num, seed)]
    return percentile_interval(auroc(truth, values), np.concatenate(samples), level)


def _resampled(
    statistic: Statistic, labels: np.ndarray, scores: np.ndarray, draws: GroupDraws
) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic of each resample, `[B]`, of how often it drew each group, `[B, G]`."""
    ranked = RankedAuroc(labels, scores)
    codes = draws.codes[ranked.order] if statistic is auroc else draws.codes

    def of(counts: np.ndarray) -> np.ndarray:
        weights = np.take(counts, codes, 1).astype(np.float64)
        if statistic is auroc:
            return ranked(weights)
        return np.array([float(statistic(labels, scores, row)) for row in weights])

    return of


def paired_difference(
    labels: Any,
    a: Any,
    b: Any,
    groups: Any = None,
    *,
    statistic: Statistic = auroc,
    num: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    stratify: bool = True,
) -> PairedDifference:
    """The difference of a metric between two scores of the same cases, resampled together.

    Args:
      a, b: scores, `[N]`.
      groups: None if the cases are independent.
      statistic: of labels, scores and weights to a float; auroc is fast.

    Returns:
      a - b. Its p is twice the share of resamples on the rarer side of zero, those at zero on
      both, and at least 1 / (num + 1); at most 1.

    Source: Efron and Tibshirani 1993, section 15.4, the percentile interval inverted.
    """
    _check(num, level)
    truth, names, (one, other) = _known(labels, groups, a, b)
    if not len(truth):
        nothing = percentile_interval(np.nan, np.full(num, np.nan), level)
        return PairedDifference(
            **dataclasses.asdict(nothing), value_a=np.nan, value_b=np.nan, p=np.nan
        )
    draws = GroupDraws(names, any_positive(truth, names) if stratify else None)
    resampled = [_resampled(statistic, truth, scores, draws) for scores in (one, other)]
    differences = np.concatenate(
        [np.subtract(*(each(counts) for each in resampled)) for counts in draws.counts(num, seed)]
    )
    values = [float(statistic(truth, scores, np.ones(len(truth)))) for scores in (one, other)]
    interval = percentile_interval(values[0] - values[1], differences, level)
    known = differences[~np.isnan(differences)]
    fewer = min((known <= 0).sum(), (known >= 0).sum())
    p = min(1.0, 2 * (1 + fewer) / (1 + len(known))) if len(known) else np.nan
    return PairedDifference(
        **dataclasses.asdict(interval), value_a=values[0], value_b=values[1], p=float(p)
    )


def _components(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative of positives above."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[: len(positive)] - stats.rankdata(positive)) / max(len(negative), 1)
    below = (ranks[len(positive) :] - stats.rankdata(negative)) / max(len(positive), 1)
    return above, 1 - below


def _covariance(of_positives: np.ndarray, of_negatives: np.ndarray) -> np.ndarray:
    """Of the AUROCs whose components `[S, P]` and `[S, N]` are; NaN with one case of a class."""
    parts = [np.full((len(of_positives),) * 2, np.nan)]
    if min(of_positives.shape[1], of_negatives.shape[1]) > 1:
        parts = [np.atleast_2d(np.cov(x)) / x.shape[1] for x in (of_positives, of_negatives)]
    return np.sum(parts, axis=0)


def delong(labels: Any, scores: Any) -> tuple[float, float]:
    """The AUROC and its variance, for independent cases only: not images of the same patients.

    Source: DeLong et al. 1988, by the midranks of Sun and Xu 2014.
    """
    truth, values, _ = known_cases(labels, scores)
    above, below = _components(truth, values)
    return auroc(truth, values), float(_covariance(above[None], below[None])[0, 0])


def delong_test(labels: Any, a: Any, b: Any) -> dict[str, float]:
    """Tests whether two scores of the same cases have one AUROC; independent cases only.

    Returns:
      auc_a, auc_b, difference (a - b), standard_error, z, and the two-sided p.

    Source: DeLong et al. 1988, by the midranks of Sun and Xu 2014.
    """
    truth, _, (one, other) = _known(labels, None, a, b)
    pairs = [_components(truth, scores) for scores in (one, other)]
    covariance = _covariance(*(np.stack(rows) for rows in zip(*pairs, strict=True)))
    auc_a, auc_b = auroc(truth, one), auroc(truth, other)
    difference = auc_a - auc_b
    error = math.sqrt(max(float(np.array([1, -1]) @ covariance @ np.array([1, -1])), 0.0))
    z = difference / error if error else math.copysign(math.inf, difference)
    z = 0.0 if difference == 0 else z
    return {
        "auc_a": auc_a,
        "auc_b": auc_b,
        "difference": difference,
        "standard_error": error,
        "z": z,
        "p": math.erfc(abs(z) / math.sqrt(2)),
    }


def holm(p_values: Any) -> Float[np.ndarray, " K"]:
    """Adjusted so that those below 0.05 are wrong in one with probability 0.05; NaN stay NaN.

    Source: Holm 1979.
    """
    given = as_numbers(p_values, "p_values")
    bad = given[(given < 0) | (given > 1)]
    if len(bad):
        raise InputError(f"p_values must lie in 0 to 1, got {listed(bad)}")
    order = np.argsort(given)[: (~np.isnan(given)).sum()]
    steps = np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1))
    adjusted = np.full(len(given), np.nan)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def over_seeds(values: Any) -> dict[str, float | int]:
    """Their mean, standard_deviation (n - 1 in the denominator; NaN of one) and n."""
    numbers = as_numbers(values, "values")
    if not len(numbers):
        raise InputError("there is no value to average")
    spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else float("nan")
    return {"mean": float(numbers.mean()), "standard_deviation": spread, "n": len(numbers)}
