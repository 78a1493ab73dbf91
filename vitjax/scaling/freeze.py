"""A prediction that is written down before the runs that test it, and what came of it."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.scaling.curve import fit_curve
from vitjax.scaling.sweep_fits import ArmFits, Row, Sweep, best_by_budget, fingerprint_rows
from vitjax.telemetry import git_commit, write_whole

LEVELS = (0.8, 0.9)
FILE = "frozen.json"


def freeze(sweep: Sweep, fits: ArmFits) -> dict[str, Any]:
    """Writes frozen.json: for every planned hold-out run the predicted loss with its bands, beside
    naive baselines, and the law and the rows that they come from.

    Raises:
      InputError: hold-out runs have been made already, a prediction is frozen already, the plan has
        no hold-out, or there is no law.
    """
    path = sweep.workdir / FILE
    seen = [row["cell"] for row in sweep.rows if row["stage"] == "holdout"]
    if seen:
        raise InputError(
            f"{sweep.workdir}: {len(seen)} hold-out runs are recorded ({seen[0]}, ...); what is "
            "frozen now would be no prediction"
        )
    if path.exists():
        raise InputError(f"{path} exists; a frozen prediction is not made again")
    if fits.law is None:
        raise InputError(f"no law to freeze: {fits.missing['law']}")
    cells = [c for c in sweep.plan.cells if c.stage == "holdout" and c.arm == fits.arm]
    if not cells:
        raise InputError(f"the plan of {sweep.workdir} has no hold-out runs of arm {fits.arm!r}")
    best = best_by_budget(list(fits.rows), sweep.metric)
    power = None
    if len(best) >= 4:
        power = fit_curve(list(best), list(best.values()), form="power")
    runs = {}
    for cell in cells:
        size, images = float(cell.num_params), float(cell.images)
        bands = {}
        for level in LEVELS:
            low, high = fits.law.interval(size, images, level)
            bands[f"{level:g}"] = [float(low), float(high)]
        runs[cell.id] = {
            "num_params": cell.num_params,
            "images": cell.images,
            "flops": cell.flops,
            "predicted": float(fits.law.predict(size, images)),
            "intervals": bands,
            "naive": {
                "last_value": list(best.values())[-1] if best else float(fits.losses.min()),
                "power": None if power is None else float(power.predict(cell.flops)),
            },
        }
    content = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git_commit(),
        "metric": sweep.metric,
        "arm": fits.arm,
        "num_rows": len(fits.rows),
        "rows_sha256": fingerprint_rows(list(fits.rows)),
        "largest_fitted_flops": float(fits.column("flops").max()),
        "law": fits.law.to_dict(),
        "isoflop": None if fits.isoflop is None else fits.isoflop.to_dict(),
        "runs": runs,
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return content


def read_frozen(workdir: Path) -> dict[str, Any] | None:
    """The frozen prediction of a sweep, or None."""
    path = Path(workdir) / FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One size and compute of the hold-out: what was predicted and what came, over its seeds.

    Attributes:
      measured: the loss of each seed. held: for each level, how many seeds fell inside the band.
      error: ln predicted less ln measured mean; naive_errors the same of the baselines.
    """

    num_params: int
    images: int
    flops: float
    factor: float
    predicted: float
    intervals: dict[str, list[float]]
    measured: list[float]
    held: dict[str, int]
    error: float
    naive_errors: dict[str, float]


def outcomes(sweep: Sweep, frozen: dict[str, Any]) -> list[Outcome]:
    """Compares the frozen prediction with the hold-out runs that have finished, by FLOPs.

    Raises:
      InputError: the rows that the prediction was made from are not those that are there now.
    """
    grouped: dict[tuple[int, int], list[Row]] = {}
    for row in sweep.rows:
        is_ours = row["stage"] == "holdout" and row["arm"] == frozen["arm"]
        if is_ours and row["status"] == "done" and row["cell"] in frozen["runs"]:
            grouped.setdefault((row["num_params"], row["images"]), []).append(row)
    found = []
    for (size, images), rows in grouped.items():
        entry = frozen["runs"][rows[0]["cell"]]
        measured = [float(row[frozen["metric"]]) for row in rows]
        mean = float(np.mean(np.log(measured)))
        held = {
            level: sum(low <= y <= high for y in measured)
            for level, (low, high) in entry["intervals"].items()
        }
        naive = {k: float(np.log(v) - mean) for k, v in entry["naive"].items() if v is not None}
        found.append(
            Outcome(
                num_params=size,
                images=images,
                flops=entry["flops"],
                factor=entry["flops"] / frozen["largest_fitted_flops"],
                predicted=entry["predicted"],
                intervals=entry["intervals"],
                measured=measured,
                held=held,
                error=float(np.log(entry["predicted"]) - mean),
                naive_errors=naive,
            )
        )
    return sorted(found, key=lambda o: (o.flops, o.num_params))


def check_rows(sweep: Sweep, fits: ArmFits, frozen: dict[str, Any]) -> None:
    """Raises InputError if the runs that the frozen prediction came from have changed since."""
    if fingerprint_rows(list(fits.rows)) != frozen["rows_sha256"]:
        raise InputError(
            f"{sweep.workdir}: the fit-stage runs are not those that {FILE} was made from "
            f"({frozen['num_rows']} then, {len(fits.rows)} now); the hold-out no longer tests it"
        )
