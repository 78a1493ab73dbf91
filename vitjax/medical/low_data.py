"""How a metric grows with the number of labelled images, pretrained and drawn afresh."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitjax.medical import presets
from vitjax.medical.scoring import Scored, auroc_over_seeds, mean_auroc
from vitjax.medical.transfer import Transfer


def measure(transfer: Transfer) -> dict[str, Any]:
    """The test AUROC of each method at each number of labels, over seeds.

    A seed draws its own labelled images, smaller sets within larger ones, the same for all methods.
    Intervals are over the test cases, of the mean over seeds; differences are paired by both.
    """
    low, report = transfer.settings.low_data, transfer.settings.report
    options = {"num": report.num_bootstraps, "level": report.level}
    runs: dict[tuple[str, float], list[Scored]] = {}
    images: dict[tuple[str, float], int] = {}
    for labelled in low.labelled:
        for method in low.methods:
            found = [transfer.outcome(method, seed, float(labelled)) for seed in low.seeds]
            runs[method, labelled] = [transfer.scored(o, "test") for o in found]
            images[method, labelled] = int(np.mean([o.facts["num_trained"] for o in found]))
    curves = []
    for method in low.methods:
        points = [_point(runs, images, method, n, options) for n in low.labelled]
        curves.append({"method": method, "points": points})
    others = [m for m in low.methods if m in presets.FROM_NOTHING]
    differences = [
        {"method": method, "against": other, "labelled": n}
        | _difference(runs[method, n], runs[other, n], options)
        for method in low.methods
        if method not in others
        for other in others
        for n in low.labelled
    ]
    return {"metric": "auroc", "seeds": len(low.seeds), "curves": curves,
            "differences": differences}  # fmt: skip


def _point(
    runs: Mapping[tuple[str, float], Sequence[Scored]],
    images: Mapping[tuple[str, float], int],
    method: str,
    labelled: float,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    found = runs[method, labelled]
    interval = auroc_over_seeds(found, **options)
    return {
        "labelled": labelled,
        "images": images[method, labelled],
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "by_seed": [mean_auroc(s) for s in found],
    }


def _difference(
    a: Sequence[Scored], b: Sequence[Scored], options: Mapping[str, Any]
) -> dict[str, Any]:
    interval = auroc_over_seeds(a, minus=b, **options)
    by_seed = [mean_auroc(x) - mean_auroc(y) for x, y in zip(a, b, strict=True)]
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "by_seed": by_seed,
        "wins": sum(d > 0 for d in by_seed),
    }
