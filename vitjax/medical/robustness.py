"""What corruptions of the test images cost: the chosen preset beside a CNN."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vitjax.data.images import decode
from vitjax.data.preprocess import Preprocess
from vitjax.inference import VisionModel
from vitjax.medical import corruptions, features
from vitjax.medical.cohort import Cohort
from vitjax.medical.corruptions import FAMILIES, SEVERITIES, Family
from vitjax.medical.metrics import intervals
from vitjax.medical.scoring import Scored, probabilities, to_units
from vitjax.medical.sources import part_of
from vitjax.medical.transfer import Outcome

log = logging.getLogger("vitjax")
MAX_UNITS = 2000
CLEAN = "clean"
NO_MODEL = "not measured: it is no model that could see a corrupted image"
Condition = tuple[str, int]  # a family and a severity; (CLEAN, 0)


class Corrupted:
    """Every image under every condition, image by image: what `Cohort.images` may be.

    Images are corrupted as the model sees them, after they were cropped and resized, so that a
    severity means the same whatever size the files have.
    """

    def __init__(
        self,
        cohort: Cohort,
        rows: np.ndarray,
        preprocess: Preprocess,
        conditions: Sequence[Condition],
        families: Mapping[str, Family],
    ):
        self._cohort, self._rows, self._preprocess = cohort, rows, preprocess
        self._conditions, self._families = conditions, families
        self._clean = functools.lru_cache(maxsize=64)(self._read)

    def __len__(self) -> int:
        return len(self._rows) * len(self._conditions)

    def _read(self, row: int) -> np.ndarray:
        return self._preprocess.fit(decode(self._cohort.images[row], self._preprocess.channels))

    def __getitem__(self, index: int) -> np.ndarray:
        number, condition = divmod(index, len(self._conditions))
        row = int(self._rows[number])
        name, severity = self._conditions[condition]
        image = self._clean(row)
        if name == CLEAN:
            return image
        key = self._cohort.ids[row]
        return corruptions.apply(self._families[name], name, image, severity, key)


def logits(
    model: VisionModel,
    cohort: Cohort,
    rows: np.ndarray,
    conditions: Sequence[Condition],
    families: Mapping[str, Family] = FAMILIES,
    *,
    inputs: Float[np.ndarray, "N M"] | None = None,
    num_threads: int | None = None,
) -> Float[np.ndarray, "R S K"]:
    """Logits of rows of a cohort under each condition; NaN where an image cannot be read.

    All go through one program, whatever the number of conditions.
    """
    # The images come fitted: fitting must leave them as they are.
    contract = dataclasses.asdict(dataclasses.replace(model.preprocess, crop_fraction=1.0))
    fitted = VisionModel(model.model, model.params, model.contract | {"preprocess": contract})
    at = np.repeat(rows, len(conditions))
    repeated = dataclasses.replace(
        cohort,
        name=f"{cohort.name}, corrupted",
        images=Corrupted(cohort, rows, model.preprocess, conditions, families),
        ids=[cohort.ids[row] for row in at.tolist()],
        labels={name: np.asarray(values)[at] for name, values in cohort.labels.items()},
        splits=cohort.splits[at],
        groups=cohort.groups[at],
        units=None,
        columns={},
    )
    found = features.outputs(
        fitted, repeated, np.arange(len(at)), inputs=None if inputs is None else inputs[at],
        num_threads=num_threads,
    )["logits"]  # fmt: skip
    return found.reshape(len(rows), len(conditions), -1)


def sample(cohort: Cohort, rows: np.ndarray, max_units: int) -> np.ndarray:
    """At most so many units, whole groups, with as many of each class as there are in all.

    Of each class at least one group stays, however large.
    """
    chosen, share = rows, max_units / max(1, _num_units(cohort, rows))
    while _num_units(cohort, chosen) > max_units and share * len(rows) > 1:
        chosen = part_of(cohort, rows, share, seed=0)
        share *= 0.9
    return chosen


def _num_units(cohort: Cohort, rows: np.ndarray) -> int:
    units = np.asarray(cohort.ids) if cohort.units is None else cohort.units
    return len(np.unique(units[rows]))


def measure(
    transfer: Any,
    outcomes: Mapping[str, Sequence[Outcome]],
    methods: Sequence[str],
    families: Mapping[str, Family] = FAMILIES,
    severities: Sequence[int] = SEVERITIES,
    num_bootstraps: int = 200,
    max_units: int = MAX_UNITS,
) -> dict[str, Any]:
    """The test AUROC of methods under corruptions, of each method's first seed.

    Drops are from the same images as they are, clean minus corrupted, resampled together by group.
    `relative` is the drop as a share of what the clean AUROC is above 0.5; None where that is not.

    Args:
      transfer: a `Transfer`.
      outcomes: of all labels, by method.
      methods: the first is set against each other one.
      max_units: of a larger test split a sample is taken, and the result says so.
    """
    cohort, whole = transfer.cohort, transfer.rows["test"]
    rows = sample(cohort, whole, max_units)
    conditions = [(CLEAN, 0), *((name, s) for name in families for s in severities)]
    said: dict[str, np.ndarray] = {}
    missing = []
    for method in methods:
        outcome = outcomes[method][0] if outcomes.get(method) else None
        model = None if outcome is None else transfer.fitted(outcome)
        if model is None:
            why = "not measured: there is no outcome of it" if outcome is None else NO_MODEL
            missing.append({"method": method, "why": why})
            continue
        log.info("%s on %d images under %d corruptions", method, len(rows), len(conditions) - 1)
        sees_inputs = transfer.inputs is not None and bool(model.config.get("input_sizes"))
        said[method] = logits(
            model, cohort, rows, conditions, families,
            inputs=transfer.inputs if sees_inputs else None,
            num_threads=transfer.settings.train.num_threads,
        )  # fmt: skip
    result: dict[str, Any] = {
        "split": "test", "images": len(rows), "units": _num_units(cohort, rows),
        "all_units": _num_units(cohort, whole), "groups": len(set(cohort.groups[rows].tolist())),
        "is_sample": len(rows) < len(whole), "severities": list(severities),
        "num_bootstraps": num_bootstraps, "level": transfer.settings.report.level,
        "families": {
            name: {"meaning": f.meaning, "levels": [f.levels[s - 1] for s in severities]}
            for name, f in families.items()
        },
        "methods": [], "differences": [], "not_measured": missing,
    }  # fmt: skip
    if not said:
        return result
    is_read = np.all([np.isfinite(found).all((1, 2)) for found in said.values()], 0)
    values = {
        method: _aurocs(cohort, rows[is_read], found[is_read], num_bootstraps)
        for method, found in said.items()
    }
    level = result["level"]
    for method, found in values.items():
        seed = outcomes[method][0].seed
        rows_of = _method(found, list(families), list(severities), level)
        result["methods"].append({"method": method, "seed": seed} | rows_of)
    first, *others = values
    for other in others:
        a, b = (v[:, 0] - v[:, 1:].mean(1) for v in (values[first], values[other]))
        result["differences"].append(
            {"method": first, "against": other, "of": "mean_drop"} | _interval(a - b, level)
        )
    return result


def _aurocs(
    cohort: Cohort, rows: np.ndarray, found: Float[np.ndarray, "R S K"], num: int
) -> Float[np.ndarray, "D S"]:
    """The mean AUROC over questions under each condition: of all units, then of each resample."""
    scored = [
        to_units(cohort, rows, probabilities(cohort.label_sets, found[:, condition]))
        for condition in range(found.shape[1])
    ]
    questions = scored[0].questions()
    strata = None
    if len(questions) == 1 and not np.isnan(questions[0].labels).any():
        strata = intervals.any_positive(questions[0].labels, scored[0].groups)
    draws = intervals.GroupDraws(scored[0].groups, strata)
    counts = [np.ones((1, len(draws.names)), np.int64), *draws.counts(num, 0)]
    return np.stack([_resampled(s, draws, counts) for s in scored], 1)


def _resampled(
    scored: Scored, draws: intervals.GroupDraws, counts: Sequence[np.ndarray]
) -> Float[np.ndarray, " D"]:
    found = []
    for q in scored.questions():
        known = ~np.isnan(q.labels)
        ranked = intervals.RankedAuroc(q.labels[known], q.scores[known])
        codes = draws.codes[known][ranked.order]
        found.append(np.concatenate([ranked(np.take(c, codes, 1).astype(float)) for c in counts]))
    values = np.stack(found)
    defined = ~np.isnan(values)
    sums = np.where(defined, values, 0.0).sum(0)
    return np.where(defined.any(0), sums / np.maximum(defined.sum(0), 1), np.nan)


def _method(
    values: Float[np.ndarray, "D S"], families: list[str], severities: list[int], level: float
) -> dict[str, Any]:
    clean, rest = values[:, 0], values[:, 1:].reshape(len(values), len(families), len(severities))
    drops = clean[:, None, None] - rest
    above = clean[0] - 0.5

    def relative(drop: float) -> float | None:
        return float(drop / above) if above > 0 else None

    found = []
    for number, name in enumerate(families):
        mean = drops[:, number].mean(1)
        found.append({
            "family": name,
            "mean_drop": _interval(mean, level),
            "relative": relative(mean[0]),
            "severities": [
                {"severity": severity, "auroc": _interval(rest[:, number, i], level),
                 "drop": _interval(drops[:, number, i], level)}
                for i, severity in enumerate(severities)
            ],
        })  # fmt: skip
    mean = drops.mean((1, 2))
    return {
        "clean": _interval(clean, level),
        "corrupted": _interval(rest.mean((1, 2)), level),
        "mean_drop": _interval(mean, level),
        "relative": relative(mean[0]),
        "families": found,
    }


def _interval(samples: Float[np.ndarray, " D"], level: float) -> dict[str, float]:
    """The first is of all units, the others of resamples."""
    found = intervals.percentile_interval(samples[0], samples[1:], level)
    return {"value": found.value, "low": found.low, "high": found.high}
