"""The report: what the outcomes say, with intervals, as plain data that becomes JSON and pages.

Everything is chosen on the validation split: the preset, thresholds, temperatures. The test split
is looked at here and nowhere else, and the report counts how often.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import vitjax
from vitjax import config as config_lib
from vitjax.config import Config
from vitjax.medical import features, official, presets, views
from vitjax.medical.metrics import audit as audit_lib
from vitjax.medical.metrics import calibration, counts, intervals, ranking
from vitjax.medical.scoring import (
    Scored,
    auroc_over_seeds,
    averaged,
    hardened,
    mean_auroc,
    metric_intervals,
    split_logits,
)
from vitjax.medical.transfer import Outcome, Transfer

FORMAT = "vitjax-report-1"
INTENDED_USE = (
    "Research on how well this model separates these classes on these images. It is no medical "
    "device: it may not be used to diagnose, to triage or to treat anyone, and its numbers say "
    "nothing of other scanners, sites or patients than those it was measured on."
)
ACCESSES = "test_accesses.jsonl"
RATES = ("sensitivity", "specificity", "ppv", "npv")
CURVE_POINTS = 200


def make(transfer: Transfer, found: Mapping[str, list[Outcome]], guards: dict[str, Any]) -> dict:
    """Everything that a report says, as plain data.

    Args:
      found: the outcomes on all labels, by method.
      guards: what the privacy lint and the search for duplicates said.
    """
    settings = transfer.settings.report
    options = {"num": settings.num_bootstraps, "level": settings.level}
    val = {m: [transfer.scored(o, "val") for o in outcomes] for m, outcomes in found.items()}
    on_val = {m: float(np.mean([mean_auroc(s) for s in runs])) for m, runs in val.items()}
    chosen = max(transfer.settings.presets, key=lambda m: on_val[m])
    accesses = _count_access(transfer)
    test = {m: [transfer.scored(o, "test") for o in outcomes] for m, outcomes in found.items()}
    report: dict[str, Any] = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "vitjax": vitjax.__version__,
        "intended_use": INTENDED_USE,
        "data": data_facts(transfer),
        "checkpoint": checkpoint_facts(transfer),
        "settings": config_lib.plain(transfer.settings),
        "guards": guards | {"test_evaluations": accesses},
        "chosen": chosen,
        "methods": [
            _method(transfer, m, outcomes, on_val[m], test[m], options)
            for m, outcomes in found.items()
        ],
        "metrics": {
            name: _interval(value)
            for name, value in metric_intervals(test[chosen], **options).items()
        },
        "official": official.intervals(transfer.cohort, test[chosen], **options),
        "official_ensemble": official.intervals(
            transfer.cohort, [averaged(test[chosen])], **options
        ),
        "views": _views(transfer, found[chosen], test[chosen], options),
        "thresholds": _thresholds(val[chosen], test[chosen], settings),
        "differences": _differences(chosen, test, options),
        "calibration": _calibration(transfer, found[chosen]),
        "curves": _curves(test[chosen]),
        "audit": _audit(val[chosen], test[chosen], settings),
    }
    report["goals"] = _goals(report, settings.goals)
    return plain(report)


def _count_access(transfer: Transfer) -> int:
    """Notes that the test split is looked at; how often that has happened in this workdir."""
    path = transfer.workdir / ACCESSES
    lines = path.read_text().splitlines() if path.exists() else []
    if transfer.is_first:
        with path.open("a") as file:
            file.write(json.dumps({"time": round(time.time())}) + "\n")
    return len(lines) + 1


def data_facts(transfer: Transfer) -> dict[str, Any]:
    """What the data are: sizes, splits, labels, licence, hash."""
    c = transfer.cohort
    splits = {}
    for name, rows in transfer.rows.items():
        units = c.units[rows] if c.units is not None else np.asarray(c.ids)[rows]
        splits[name] = {
            "images": len(rows),
            "units": len(set(units.tolist())),
            "groups": len(set(c.groups[rows].tolist())),
            "labels": {s.name: _label_counts(s, np.asarray(c.labels[s.name])[rows])
                       for s in c.label_sets},
        }  # fmt: skip
    return {
        "name": c.name,
        "label_sets": [dataclasses.asdict(s) for s in c.label_sets],
        "splits": splits,
        "trained_on": np.mean([len(c.rows("train", s)) for s in transfer.settings.seeds]),
        "group_kind": c.group_kind,
        "unit_kind": c.unit_kind,
        "aggregate": c.aggregate,
        "columns": list(c.columns),
        "inputs": list(transfer.settings.inputs),
        "notes": list(c.notes),
        "licence": c.licence,
        "hash": features.data_key(c)[:16],
    }


def _label_counts(label_set: Any, labels: np.ndarray) -> dict[str, dict[str, int]]:
    if label_set.kind == "multi":
        return {
            name: {
                "yes": int((column >= 0.5).sum()),
                "no": int((column < 0.5).sum()),
                "unknown": int(np.isnan(column).sum()),
            }
            for name, column in zip(label_set.classes, labels.T, strict=True)
        }
    found = {name: {"yes": int((labels == i).sum())} for i, name in enumerate(label_set.classes)}
    return found | {"(unknown)": {"yes": int(np.isnan(labels).sum())}}


def checkpoint_facts(transfer: Transfer) -> dict[str, Any]:
    """What was transferred: where from, its hash, its model and preprocessing."""
    model = transfer.model
    return {
        "path": transfer.start.checkpoint,
        "hash": features.weights_key(model)[:16],
        "model": dict(model.model.description),
        "num_params": model.num_params,
        "flops_per_image": model.model.flops_per_image,
        "preprocess": dataclasses.asdict(model.preprocess),
    }


def _method(
    transfer: Transfer,
    method: str,
    outcomes: Sequence[Outcome],
    on_val: float,
    test: Sequence[Scored],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    values = [mean_auroc(s) for s in test]
    facts = [o.facts for o in outcomes]
    return {
        "method": method,
        "kind": "preset" if method in transfer.settings.presets else "floor",
        "is_from_nothing": method in presets.FROM_NOTHING,
        "seeds": [o.seed for o in outcomes],
        "val_auroc": on_val,
        "test_auroc": _interval(auroc_over_seeds(test, **options)),
        "ensemble_auroc": _interval(auroc_over_seeds([averaged(test)], **options)),
        "test_by_seed": values,
        "over_seeds": intervals.over_seeds(values),
        "chosen": facts[0].get("chosen", ""),
        "seconds": float(np.mean([f["seconds"] for f in facts])),
        "num_params": facts[0].get("num_params"),
        "flops_per_image": facts[0].get("flops_per_image"),
    }


def _views(
    transfer: Transfer,
    outcomes: Sequence[Outcome],
    test: Sequence[Scored],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Test-time augmentation: what it would have given beside one look at each image."""
    number, policy = transfer.settings.report.views, transfer.policy
    seen = views.scored(transfer, outcomes, policy, number) if policy and number > 1 else None
    if seen is None:
        return {}
    return {
        "number": number,
        "policy": policy,
        "test_auroc": _interval(auroc_over_seeds(seen, **options)),
        "ensemble_auroc": _interval(auroc_over_seeds([averaged(seen)], **options)),
        "difference": _interval(auroc_over_seeds(seen, minus=test, **options)),
        "official": official.intervals(transfer.cohort, seen, **options),
        "official_ensemble": official.intervals(transfer.cohort, [averaged(seen)], **options),
    }


def _goals(report: Mapping[str, Any], goals: Config) -> list[dict[str, Any]]:
    """What was to be reached, and what was: of the seeds' mean, and of their ensemble."""
    parts = {"": report} | ({", all views": report["views"]} if report["views"] else {})
    ways = (("mean over seeds", "official"), ("ensemble of seeds", "official_ensemble"))
    return [
        {"metric": name, "goal": goal, "of": way + more} | part[key][name]
        for name, goal in goals.items()
        for more, part in parts.items()
        for way, key in ways
    ]


def _thresholds(val: Sequence[Scored], test: Sequence[Scored], settings: Any) -> list[dict]:
    """Sensitivity and specificity on test at thresholds chosen on validation, means over seeds."""
    rules: list[Any] = ["youden", ("specificity", settings.sensitivity_at),
                        ("sensitivity", settings.sensitivity_at)]  # fmt: skip
    found = []
    for number, first in enumerate(val[0].questions()):
        for rule in rules:
            chosen = [
                counts.choose_threshold(q.labels, q.scores, rule)
                for q in (s.questions()[number] for s in val)
            ]
            if any(np.isnan(t.value) for t in chosen):
                continue
            questions = [s.questions()[number] for s in test]

            def statistic(weights, questions=questions, chosen=chosen):
                rates = [
                    counts.rates_at(q.labels, q.scores, t.value, weights)
                    for q, t in zip(questions, chosen, strict=True)
                ]
                return np.mean([[r[name] for name in RATES] for r in rates], 0)

            interval = intervals.group_bootstrap(
                statistic, test[0].groups, num=min(500, settings.num_bootstraps),
                level=settings.level,
            )  # fmt: skip
            rates = {
                name: {"value": interval.value[i], "low": interval.low[i], "high": interval.high[i]}
                for i, name in enumerate(RATES)
            }
            threshold = float(np.mean([t.value for t in chosen]))
            row = {"question": first.name, "rule": chosen[0].rule, "threshold": threshold}
            found.append(row | rates)
    return found


def _curves(test: Sequence[Scored]) -> list[dict]:
    """The ROC curve of each question, of the mean score over seeds, thinned."""
    found = []
    for number, first in enumerate(test[0].questions()):
        scores = np.mean([s.questions()[number].scores for s in test], 0)
        fpr, tpr, _ = ranking.roc_curve(first.labels, scores)
        at = np.unique(np.linspace(0, len(fpr) - 1, CURVE_POINTS).round().astype(int))
        found.append({"question": first.name, "fpr": fpr[at], "tpr": tpr[at]})
    return found


def _differences(
    chosen: str, test: Mapping[str, Sequence[Scored]], options: Mapping[str, Any]
) -> list[dict]:
    """The chosen preset against each other method: paired bootstraps, DeLong, Holm."""
    rows = []
    for method, runs in test.items():
        if method == chosen:
            continue
        pairs = test[chosen], runs
        interval = auroc_over_seeds(pairs[0], minus=pairs[1], **options)
        row = {"method": method, "difference": _interval(interval)}
        first = pairs[0][0].questions()
        if len(first) == 1 and len(set(pairs[0][0].groups.tolist())) == len(first[0].labels):
            a, b = (np.mean([s.questions()[0].scores for s in r], 0) for r in pairs)
            known = ~np.isnan(first[0].labels)
            row["delong"] = intervals.delong_test(first[0].labels[known], a[known], b[known])
        rows.append(row)
    tested = [row for row in rows if "delong" in row]
    if tested:
        adjusted = intervals.holm([row["delong"]["p"] for row in tested])
        for row, p in zip(tested, adjusted, strict=True):
            row["p_holm"] = float(p)
    return rows


def _calibration(transfer: Transfer, outcomes: Sequence[Outcome]) -> list[dict]:
    """Of each label set: the temperature from validation, and calibration on test before and
    after; of the mean over seeds."""
    found = []
    for s in transfer.cohort.label_sets:
        per_seed = []
        for outcome in outcomes:
            rows = {k: transfer.cohort.rows(k, outcome.seed) for k in ("val", "test")}
            labels = {k: np.asarray(transfer.cohort.labels[s.name], float)[v] for k, v in
                      rows.items()}  # fmt: skip
            logits = {
                "val": split_logits(transfer.cohort.label_sets, outcome.val)[s.name],
                "test": split_logits(transfer.cohort.label_sets, outcome.test)[s.name],
            }
            per_seed.append(_calibrated(s, logits, labels))
        keys = ("temperature", "ece", "ece_after", "brier", "brier_after", "nll", "nll_after")
        found.append(
            {"label_set": s.name, "reliability": per_seed[0]["reliability"]}
            | {k: float(np.mean([c[k] for c in per_seed])) for k in keys}
        )
    return found


def _calibrated(s: Any, logits: dict, labels: dict) -> dict[str, Any]:
    known = {k: np.isfinite(v).all(1) & np.isfinite(labels[k].reshape(len(v), -1)).any(1)
             for k, v in logits.items()}  # fmt: skip
    logits = {k: np.asarray(v, np.float64)[known[k]] for k, v in logits.items()}
    labels = {k: v[known[k]] for k, v in labels.items()}
    kind = "softmax" if s.kind == "single" else "sigmoid"
    if s.kind == "ordinal":
        labels = {k: (v[:, None] > np.arange(s.num_logits)).astype(float)
                  for k, v in labels.items()}  # fmt: skip
    if s.kind == "multi":
        labels = {k: hardened(v) for k, v in labels.items()}
    temperature = calibration.fit_temperature(logits["val"], labels["val"], kind)

    def chances(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if kind == "sigmoid":
            return (1 / (1 + np.exp(-z))).ravel(), labels["test"].ravel()
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        if p.shape[1] == 2:
            return p[:, 1], labels["test"]
        return p, labels["test"].astype(int)

    result: dict[str, Any] = {"temperature": float(np.mean(temperature)), "reliability": {}}
    after = calibration.apply_temperature(logits["test"], temperature)
    for suffix, z in (("", logits["test"]), ("_after", after)):
        p, truth = chances(z)
        result[f"ece{suffix}"] = calibration.expected_calibration_error(p, truth)
        result[f"brier{suffix}"] = calibration.brier(p, truth)
        result[f"nll{suffix}"] = calibration.negative_log_likelihood(p, truth)
        rows = calibration.reliability_table(p, truth)
        result["reliability"]["after" if suffix else "before"] = [
            dataclasses.asdict(r) for r in rows
        ]
    return result


def _audit(val: Sequence[Scored], test: Sequence[Scored], settings: Any) -> list[dict]:
    """Of each question the subgroups by every column, of the mean score over seeds, at the mean of
    the thresholds that each seed has by Youden on its validation images."""
    if not test[0].columns:
        return []
    found = []
    for number, first in enumerate(test[0].questions()):
        scores = np.mean([s.questions()[number].scores for s in test], 0)
        on_val = [s.questions()[number] for s in val]
        each = [counts.choose_threshold(q.labels, q.scores, "youden").value for q in on_val]
        threshold = float(np.mean(each))
        if np.isnan(threshold) or np.isnan(first.labels).all():
            continue
        rows = audit_lib.audit(
            first.labels, scores, test[0].columns, test[0].groups, threshold=threshold,
            min_cases=settings.min_cases, min_positives=settings.min_positives,
            num_bootstraps=min(1000, settings.num_bootstraps), level=settings.level,
        )  # fmt: skip
        found.append({
            "question": first.name,
            "threshold": threshold,
            "subgroups": [dataclasses.asdict(r) for r in rows if hasattr(r, "value")],
            "gaps": [dataclasses.asdict(r) for r in rows if hasattr(r, "gap")],
        })  # fmt: skip
    return found


def _interval(found: Any) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def plain(value: Any) -> Any:
    """Numbers and texts that JSON knows; NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
