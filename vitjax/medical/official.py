"""The metric that each benchmark asks for, of one split, as numbers by name."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vitjax.config import resolve
from vitjax.medical.cohort import Cohort
from vitjax.medical.metrics import camelyon, isic, ranking
from vitjax.medical.metrics import chexpert as chexpert_metric
from vitjax.medical.metrics import medmnist as medmnist_metric
from vitjax.medical.metrics.intervals import group_bootstrap
from vitjax.medical.scoring import Scored, hardened, probabilities, to_units

Official = Callable[[Cohort, Scored], dict[str, float]]


def of(cohort: Cohort) -> Official | None:
    """The cohort's own metric."""
    return resolve(cohort.official) if cohort.official else None


def names(cohort: Cohort) -> list[str]:
    """The names of the numbers that the cohort's own metric gives."""
    metric = of(cohort)
    if metric is None:
        return []
    rows = cohort.rows("test")
    chance = np.zeros((len(rows), sum(s.num_logits for s in cohort.label_sets)))
    scored = to_units(cohort, rows, probabilities(cohort.label_sets, chance))
    return list(metric(cohort, scored))


def intervals(
    cohort: Cohort, runs: Sequence[Scored], *, num: int, level: float
) -> dict[str, dict[str, float]]:
    """The cohort's own metric, the mean over runs on the same units, with group bootstraps.

    Args:
      num: resamples at most; fewer of a large split, at least 100.
    """
    metric = of(cohort)
    if metric is None:
        return {}

    def statistic(weights: np.ndarray) -> np.ndarray:
        rows = np.repeat(np.arange(len(weights)), weights.astype(int))
        return np.mean([list(metric(cohort, taken(s, rows)).values()) for s in runs], 0)

    num = min(num, max(100, 2_000_000 // max(1, len(runs[0].units))))
    found = group_bootstrap(statistic, runs[0].groups, num=num, level=level)
    return {
        name: {"value": found.value[i], "low": found.low[i], "high": found.high[i]}
        for i, name in enumerate(metric(cohort, runs[0]))
    }


def taken(scored: Scored, rows: np.ndarray) -> Scored:
    """Some units, in this order, also more than once."""
    of_units = ("labels", "probabilities", "columns")
    parts = {name: {k: v[rows] for k, v in getattr(scored, name).items()} for name in of_units}
    return dataclasses.replace(
        scored, units=scored.units[rows], groups=scored.groups[rows], **parts
    )


def medmnist(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """AUC and ACC of MedMNIST's evaluator."""
    s = scored.label_sets[0]
    return medmnist_metric.evaluate(
        str(cohort.task), scored.labels[s.name], scored.probabilities[s.name]
    )


def chexpert(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """The AUROC of CheXpert's five labels over studies, and their mean."""
    del cohort
    by_name = {q.name.split(": ")[-1]: q for q in scored.questions()}
    return chexpert_metric.five_label_auroc(
        {name: q.labels for name, q in by_name.items()},
        {name: q.scores for name, q in by_name.items()},
    )


def isic2019(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """Balanced multiclass accuracy of the ISIC 2019 challenge's scorer."""
    del cohort
    s = scored.label_sets[0]
    labels = scored.labels[s.name]
    known = np.isfinite(labels)
    truth = np.eye(len(s.classes))[labels[known].astype(int)]
    found = isic.score_arrays(
        truth, scored.probabilities[s.name][known], s.classes, images=scored.units[known].tolist()
    )
    return {"balanced_accuracy": found["balanced_accuracy"], "macro_auc": found["macro_auc"]}


def pcam(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """Accuracy and AUC of PatchCamelyon."""
    del cohort
    question = scored.questions()[0]
    labels, scores = hardened(question.labels), question.scores
    return {
        "accuracy": float(np.mean(labels == (scores >= 0.5))),
        "auc": ranking.auroc(labels, scores),
    }


def camelyon17(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """CAMELYON17's quadratic kappa over patients, staged from their nodes' likeliest classes.

    A patient without five nodes is left out.
    """
    del cohort
    s = scored.label_sets[0]
    _, first, counts = np.unique(scored.units, return_index=True, return_counts=True)
    truth, likely = scored.labels[s.name][first], scored.probabilities[s.name][first].argmax(1)
    given: dict[str, list[int]] = {}
    for row, group in enumerate(scored.groups[first].tolist()):
        given.setdefault(group, []).append(row)
    true, predicted = [], []
    for rows in given.values():
        if len(rows) != 5 or np.isnan(truth[rows]).any():
            continue
        times = int(counts[rows[0]])  # as often as the patient was drawn
        true += [camelyon.patient_stage([s.classes[int(truth[r])] for r in rows])] * times
        predicted += [camelyon.patient_stage([s.classes[likely[r]] for r in rows])] * times
    return {"quadratic_kappa": camelyon.stage_kappa(true, predicted) if true else float("nan")}


def slide_auc(cohort: Cohort, scored: Scored) -> dict[str, float]:
    """CAMELYON16's AUC over slides."""
    del cohort
    question = scored.questions()[0]
    return {"slide_auc": camelyon.slide_auc(question.labels, question.scores)}
