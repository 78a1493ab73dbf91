"""From the record of a sweep to its laws: which runs go into which fit, and why."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.scaling.curve import CurveFit, fit_curve
from vitjax.scaling.isoflop import IsoflopLaw, fit_isoflop
from vitjax.scaling.parametric import ParametricLaw, fit_parametric
from vitjax.sweep.plan import Plan
from vitjax.sweep.table import read_plan, read_runs

# Runs of these kinds follow the sweep's own rule of shape and learning rate, on data seen as the
# main recipe sees it. The others (star, lr, data) answer questions of their own.
LAW_KINDS = ("isoflop", "seed")
STAR_KINDS = ("star",)  # where a sweep has no others: its shapes then count as noise
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep's workdir.

    Attributes:
      rows: the last attempt of every cell, in the order of the plan.
      metric: the loss that laws are fitted to.
    """

    workdir: Path
    plan: Plan
    rows: tuple[Row, ...]
    metric: str

    def chosen(self, *, stage: str, arm: str, kinds: tuple[str, ...]) -> list[Row]:
        """Finished runs with the metric."""
        return [
            r
            for r in self.rows
            if (r["status"], r["stage"], r["arm"]) == ("done", stage, arm)
            and r["kind"] in kinds
            and r.get(self.metric) is not None
        ]

    def to_fit(self, arm: str) -> list[Row]:
        """The runs that laws of size and images are fitted to; never those held out."""
        rows = self.chosen(stage="fit", arm=arm, kinds=LAW_KINDS)
        return rows or self.chosen(stage="fit", arm=arm, kinds=STAR_KINDS)

    @property
    def arms(self) -> list[str]:
        """The recipes with finished runs, the main one first."""
        found = {r["arm"] for r in self.rows if r["status"] == "done"}
        return sorted(found, key=lambda arm: (arm != "main", arm))


def read_sweep(workdir: str | Path, metric: str | None = None) -> Sweep:
    """Reads plan.json and runs.csv.

    Raises:
      InputError: one of them is missing, nothing has finished, or there is no such metric.
    """
    workdir = Path(workdir)
    plan = read_plan(workdir)
    if not (workdir / "runs.csv").is_file():
        raise InputError(f"{workdir} has no runs.csv: run the sweep first (vitjax sweep run)")
    rows = read_runs(workdir / "runs.csv")
    order = {cell.id: cell.number for cell in plan.cells}
    rows = sorted(rows, key=lambda row: order.get(row["cell"], len(order)))
    losses = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name.startswith("eval/") and not name.endswith(":n")
    ]
    if metric is None:
        metric = next((name for name in losses if name.endswith("/loss")), None)
    if metric is None or metric not in losses:
        raise InputError(f"no metric {metric!r} in {workdir}; {suggest(str(metric), losses)}")
    if not any(row["status"] == "done" for row in rows):
        raise InputError(f"{workdir}: no run has finished; see vitjax sweep run --retry")
    return Sweep(workdir, plan, tuple(rows), metric)


@dataclasses.dataclass(frozen=True)
class ArmFits:
    """The laws of one recipe.

    Attributes:
      rows: what they were fitted to.
      law: loss by size and images; isoflop: the optimum of each budget; frontier: the loss of those
        optima over compute. None where the runs cannot carry it, for the reason in `missing`.
    """

    arm: str
    metric: str
    rows: tuple[Row, ...]
    law: ParametricLaw | None
    isoflop: IsoflopLaw | None
    frontier: CurveFit | None
    missing: dict[str, str]

    def column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows], np.float64)

    @property
    def losses(self) -> np.ndarray:
        return self.column(self.metric)

    @property
    def flops_factors(self) -> np.ndarray:
        """Training FLOPs per parameter and image, of each run."""
        return self.column("flops") / (self.column("num_params") * self.column("images"))

    @property
    def flops_factor(self) -> float:
        """Their median: what turns a law of size and images into one of compute."""
        return float(np.median(self.flops_factors))

    @property
    def flops_factor_range(self) -> tuple[float, float]:
        return float(self.flops_factors.min()), float(self.flops_factors.max())

    def seed_noise(self) -> float | None:
        """Pooled standard deviation of ln loss over seeds of one size and number of images."""
        return seed_noise(list(self.rows), self.metric)


def seed_noise(rows: list[Row], metric: str) -> float | None:
    """Pooled standard deviation of ln metric over runs that differ in nothing but the seed."""
    same: dict[tuple, list[float]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("arm", "width", "depth", "mlp_dim", "images", "learning_rate"))
        same.setdefault(key, []).append(float(np.log(row[metric])))
    repeated = [np.array(values) for values in same.values() if len(values) > 1]
    free = sum(len(values) - 1 for values in repeated)
    if not free:
        return None
    return float(np.sqrt(sum(((v - v.mean()) ** 2).sum() for v in repeated) / free))


def fit_arm(sweep: Sweep, arm: str, *, resamples: int = 1000, seed: int = 0) -> ArmFits:
    """Fits every law that the fit-stage runs of a recipe can carry; hold-out runs never enter.

    Raises:
      InputError: the recipe has no finished runs to fit.
    """
    rows = sweep.to_fit(arm)
    if not rows:
        raise InputError(f"{sweep.workdir}: arm {arm!r} has no finished runs with {sweep.metric}")
    fits = ArmFits(arm, sweep.metric, tuple(rows), None, None, None, {})
    groups = [row["trunk"] for row in rows]
    size, images, flops = (fits.column(n) for n in ("num_params", "images", "flops"))
    missing: dict[str, str] = {}

    def attempt(name: str, function: Any, *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except InputError as error:
            missing[name] = str(error)
            return None

    law = attempt(
        "law", fit_parametric, size, images, fits.losses,
        groups=groups, resamples=resamples, seed=seed,
    )  # fmt: skip
    isoflop = attempt(
        "isoflop", fit_isoflop, flops, size, fits.losses, num_examples=images,
        budgets=sorted({row["budget"] for row in rows if row.get("budget")}) or None,
        groups=groups, resamples=resamples, seed=seed,
    )  # fmt: skip
    frontier = None
    best = best_by_budget(list(rows), sweep.metric)
    if len(best) >= 4:
        frontier = attempt("frontier", fit_curve, list(best), list(best.values()), seed=seed)
    else:
        missing["frontier"] = f"{len(best)} budgets; a curve needs 4"
    return dataclasses.replace(fits, law=law, isoflop=isoflop, frontier=frontier, missing=missing)


def best_by_budget(rows: list[Row], metric: str) -> dict[float, float]:
    """For each nominal budget the lowest loss of any size, averaged over its seeds; by the FLOPs
    that were spent on it."""
    by_size: dict[float, dict[int, list[Row]]] = {}
    for row in rows:
        if row.get("budget") is not None:
            by_size.setdefault(row["budget"], {}).setdefault(row["num_params"], []).append(row)
    best = {}
    for sizes in by_size.values():
        means = {n: np.mean([r[metric] for r in runs]) for n, runs in sizes.items()}
        runs = sizes[min(means, key=lambda n: means[n])]
        best[float(np.mean([r["flops"] for r in runs]))] = float(np.mean([r[metric] for r in runs]))
    return dict(sorted(best.items()))


def fingerprint_rows(rows: list[Row]) -> str:
    """SHA-256 of the rows that a fit saw."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
