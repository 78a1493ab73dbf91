"""From logits to what is scored: probabilities, units (studies, slides), and their metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit, log_softmax

from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.metrics import calibration, counts, ranking
from vitjax.medical.metrics.intervals import (
    GroupDraws,
    Interval,
    RankedAuroc,
    any_positive,
    group_bootstrap,
    percentile_interval,
)

Logits = Float[np.ndarray, "N K"]


@dataclasses.dataclass(frozen=True)
class Question:
    """A yes-or-no question: one class of a label set.

    Attributes:
      name: the class, with its set's name before it where there are several sets.
      labels: 1, 0 or NaN where unknown, of each unit.
      scores: probabilities, of each unit.
    """

    name: str
    labels: Float[np.ndarray, " U"]
    scores: Float[np.ndarray, " U"]


@dataclasses.dataclass(frozen=True)
class Scored:
    """The units of a split, what is known of them and what is predicted.

    Attributes:
      units, groups: names, `[U]`.
      labels: of each set by name, as in `Cohort`.
      probabilities: of each set by name, `[U, C]`.
      columns: of each unit, as in `Cohort`.
      label_sets: what was asked.
    """

    units: np.ndarray
    groups: np.ndarray
    labels: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    label_sets: tuple[LabelSet, ...]

    def questions(self) -> list[Question]:
        """Of two exclusive classes the second, of several each, of many labels each."""
        found = []
        for s in self.label_sets:
            labels, scores = self.labels[s.name], self.probabilities[s.name]
            before = f"{s.name}: " if len(self.label_sets) > 1 else ""
            for number, name in enumerate(s.classes):
                if s.kind != "multi" and len(s.classes) == 2 and number == 0:
                    continue
                if s.kind == "multi":
                    truth = hardened(labels[:, number])
                else:
                    truth = np.where(np.isnan(labels), np.nan, labels == number)
                found.append(Question(before + name, truth, scores[:, number]))
        return found


def hardened(labels: np.ndarray) -> np.ndarray:
    """Soft labels as 0 or 1; NaN stays."""
    return np.where(np.isnan(labels), np.nan, labels >= 0.5)


def split_logits(label_sets: Sequence[Any], logits: Logits) -> dict[str, np.ndarray]:
    """The columns of each set."""
    found, start = {}, 0
    for s in label_sets:
        found[s.name] = logits[:, start : start + s.num_logits]
        start += s.num_logits
    return found


def probabilities(label_sets: Sequence[Any], logits: Logits) -> dict[str, np.ndarray]:
    """Of each class of each set, `[N, C]`; exclusive classes sum to one.

    An ordinal set's logits are of "above class k"; where they contradict each other the chance of
    being above is taken to fall with k.
    """
    found = {}
    for s in label_sets:
        part = split_logits(label_sets, np.asarray(logits, np.float64))[s.name]
        if s.kind == "single":
            found[s.name] = np.exp(log_softmax(part, axis=1))
        elif s.kind == "multi":
            found[s.name] = expit(part)
        else:
            above = np.minimum.accumulate(expit(part), 1)
            ones, zeros = np.ones((len(part), 1)), np.zeros((len(part), 1))
            found[s.name] = -np.diff(np.concatenate([ones, above, zeros], 1), axis=1)
    return found


def to_units(cohort: Cohort, rows: np.ndarray, predicted: Mapping[str, np.ndarray]) -> Scored:
    """Scores of images to scores of what is scored: their maximum or mean over each unit.

    Images without a score (NaN: they could not be read) are left out.

    Args:
      rows: of the cohort.
      predicted: probabilities of each set, of these rows.
    """
    is_read = np.all([np.isfinite(p).all(1) for p in predicted.values()], 0)
    rows, predicted = rows[is_read], {k: p[is_read] for k, p in predicted.items()}
    names = np.asarray(cohort.ids)[rows] if cohort.units is None else cohort.units[rows]
    units, first, place = np.unique(names, return_index=True, return_inverse=True)
    if len(units) == len(rows):
        first, place = np.arange(len(rows)), np.arange(len(rows))
        units = names
    reduce = np.maximum if cohort.aggregate == "max" else np.add
    scores = {}
    for name, values in predicted.items():
        made = np.full((len(units), values.shape[1]), -np.inf if reduce is np.maximum else 0.0)
        reduce.at(made, place, values)
        if reduce is np.add:
            made /= np.bincount(place, minlength=len(units))[:, None]
        scores[name] = made
    labels = {}
    for s in cohort.label_sets:
        of_rows = np.asarray(cohort.labels[s.name], np.float64)[rows]
        known = of_rows[first].copy()
        for index, unit in enumerate(place):  # the first known label of each unit
            known[unit] = np.where(np.isnan(known[unit]), of_rows[index], known[unit])
        labels[s.name] = known
    return Scored(
        units,
        cohort.groups[rows][first],
        labels,
        scores,
        {name: np.asarray(values)[rows][first] for name, values in cohort.columns.items()},
        cohort.label_sets,
    )


def averaged(runs: Sequence[Scored]) -> Scored:
    """The runs as one, an ensemble: the mean of their probabilities, as in predictions.csv."""
    means = {
        name: np.mean([run.probabilities[name] for run in runs], 0)
        for name in runs[0].probabilities
    }
    return dataclasses.replace(runs[0], probabilities=means)


def mean_auroc(scored: Scored) -> float:
    """The mean AUROC of the questions that have both answers."""
    return ranking.mean_of_defined([ranking.auroc(q.labels, q.scores) for q in scored.questions()])


def auroc_over_seeds(
    runs: Sequence[Scored], *, num: int, level: float = 0.95, seed: int = 0, minus: Sequence = ()
) -> Interval:
    """The mean AUROC of several seeds' runs on the same units, with a group bootstrap interval.

    Args:
      runs: of one method, a run a seed.
      minus: runs of another method; then it is the difference, resampled together.
    """
    draws = GroupDraws(runs[0].groups, _strata(runs[0]))
    parts = [_ranked(run, draws) for run in runs]
    others = [_ranked(run, draws) for run in minus]

    def value(counts: np.ndarray) -> np.ndarray:
        mean = np.mean([part(counts) for part in parts], 0)
        return mean - np.mean([part(counts) for part in others], 0) if others else mean

    samples = np.concatenate([value(counts) for counts in draws.counts(num, seed)])
    whole = value(np.ones((1, len(draws.names)), np.int64))[0]
    return percentile_interval(whole, samples, level)


def _strata(scored: Scored) -> np.ndarray | None:
    questions = scored.questions()
    if len(questions) > 1 or np.isnan(questions[0].labels).any():
        return None
    return any_positive(questions[0].labels, scored.groups)


def _ranked(scored: Scored, draws: GroupDraws) -> Any:
    found = []
    for q in scored.questions():
        known = ~np.isnan(q.labels)
        ranked = RankedAuroc(q.labels[known], q.scores[known])
        found.append((ranked, draws.codes[known][ranked.order]))

    def of(counts: np.ndarray) -> np.ndarray:
        values = np.stack([r(np.take(counts, codes, 1).astype(np.float64)) for r, codes in found])
        defined = ~np.isnan(values)
        sums = np.where(defined, values, 0.0).sum(0)
        return np.where(defined.any(0), sums / np.maximum(defined.sum(0), 1), np.nan)

    return of


def metrics(scored: Scored, weights: np.ndarray | None = None) -> dict[str, float]:
    """What can be said of a split without a threshold, means over questions and sets.

    auroc, average_precision, accuracy and balanced_accuracy (of the likeliest class, or at 0.5),
    quadratic_kappa (ordinal sets), brier, nll.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for q in scored.questions():
        add("auroc", ranking.auroc(q.labels, q.scores, weights))
        add("average_precision", ranking.average_precision(q.labels, q.scores, weights))
    for s in scored.label_sets:
        labels, scores = scored.labels[s.name], scored.probabilities[s.name]
        if s.kind == "multi":
            pairs = [(hardened(labels[:, i]), scores[:, i]) for i in range(len(s.classes))]
            for truth, score in pairs:
                known = ~np.isnan(truth)
                w = None if weights is None else weights[known]
                given = truth[known].astype(int), (score[known] >= 0.5).astype(int)
                add("accuracy", counts.accuracy(*given, w))
                add("balanced_accuracy", counts.balanced_accuracy(*given, w))
                add("brier", calibration.brier(score[known], truth[known], w))
                add("nll", calibration.negative_log_likelihood(score[known], truth[known], w))
            continue
        known = ~np.isnan(labels)
        truth, score = labels[known].astype(int), scores[known]
        w = None if weights is None else weights[known]
        top = score.argmax(1)
        add("accuracy", counts.accuracy(truth, top, w))
        add("balanced_accuracy", counts.balanced_accuracy(truth, top, w))
        add("brier", calibration.brier(score, truth, w))
        add("nll", calibration.negative_log_likelihood(score, truth, w))
        if s.kind == "ordinal":
            expanded = (
                np.arange(len(truth))
                if w is None
                else np.repeat(np.arange(len(truth)), w.astype(int))
            )
            add("quadratic_kappa", counts.cohen_kappa(
                truth[expanded], top[expanded], len(s.classes), "quadratic"))  # fmt: skip
    return {name: ranking.mean_of_defined(values) for name, values in found.items()}


def metric_intervals(
    runs: Sequence[Scored], *, num: int, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """`metrics`, their means over the seeds' runs, with group bootstrap intervals."""
    names = list(metrics(runs[0]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.mean([list(metrics(run, weights).values()) for run in runs], 0)

    found = group_bootstrap(
        statistic, runs[0].groups, num=num, level=level, seed=seed, strata=_strata(runs[0])
    )
    return {
        name: Interval(
            float(found.value[i]), float(found.low[i]), float(found.high[i]), level, num,
            int(found.num_undefined[i]),
        )
        for i, name in enumerate(names)
    }  # fmt: skip
