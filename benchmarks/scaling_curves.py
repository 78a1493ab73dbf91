"""Extrapolates published learning curves and scores the forms: `form="auto"` beside each of them.

    python benchmarks/scaling_curves.py --data=FOLDER

The folder holds learning_curves_vision.csv and learning_curves_language.csv (Alabdulmohsin et al.
2022, arXiv 2209.06640; columns Task, Model, Seen Examples, Loss, Training). Rows with Training = 1
are fitted, the others predicted; scored is the root mean square of ln predicted - ln true.
`--cut=4` asks for more than the authors did: of the training rows only those up to a quarter of
their largest x are fitted, and the rest predicted.
"""

import argparse
import csv
import json
import platform
import resource
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from vitjax.scaling.curve import fit_curve
from vitjax.scaling.forms import FORMS

RESULTS = Path(__file__).parent / "results" / "scaling_curves.json"


def read_curves(path: Path) -> dict[str, np.ndarray]:
    curves: dict[str, list] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            values = (float(row["Seen Examples"]), float(row["Loss"]), int(row["Training"]))
            curves.setdefault(f"{row['Task']} {row['Model']}", []).append(values)
    return {name: np.array(sorted(values)) for name, values in curves.items()}


def score(values: np.ndarray, cut: float) -> dict:
    train, test = (values[values[:, 2] == flag] for flag in (1, 0))
    if cut > 1:
        top = train[:, 0].max() / cut
        train, test = train[train[:, 0] <= top], train[train[:, 0] > top]
    fit = fit_curve(train[:, 0], train[:, 1])
    x, truth = test[:, 0], np.log(test[:, 1])
    rmse = {
        n: float(np.sqrt(np.mean((f.log_predict(x) - truth) ** 2))) for n, f in fit.fits.items()
    }
    rmse["auto"] = float(np.sqrt(np.mean((np.log(fit.predict(x)) - truth) ** 2)))
    low, high = fit.interval(x, 0.8)
    covered = float(np.mean((low <= test[:, 1]) & (test[:, 1] <= high)))
    return {"rmse": rmse, "covered": covered, "points": len(test), "reach": fit.reach}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cut", type=float, default=1.0)
    arguments = parser.parse_args()
    results: dict = {
        "python": platform.python_version(),
        "versions": {n: metadata.version(n) for n in ("jax", "numpy", "scipy")},
        "machine": f"{platform.machine()}, CPU",
    }
    for domain in ("vision", "language"):
        curves = read_curves(arguments.data / f"learning_curves_{domain}.csv")
        started, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        scores = {}
        for number, (name, values) in enumerate(curves.items(), 1):
            scores[name] = score(values, arguments.cut)
            print(f"{domain} {number}/{len(curves)} {name}", end="\r", flush=True)
        ended = resource.getrusage(resource.RUSAGE_SELF)
        cpu = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
        print(f"{domain}: {len(curves)} curves, {cpu:.0f} CPU-seconds" + " " * 30)
        print(f"{'form':14} {'mean':>8} {'median':>8}")
        means = {}
        for form in (*FORMS, "auto"):
            each = [s["rmse"][form] for s in scores.values() if form in s["rmse"]]
            means[form] = [float(np.mean(each)), float(np.median(each))]
            print(f"{form:14} {means[form][0]:8.4f} {means[form][1]:8.4f}")
        covered = np.array([s["covered"] for s in scores.values()])
        points = np.array([s["points"] for s in scores.values()])
        pooled = float((covered * points).sum() / points.sum())
        print(f"inside the 80% bands: {covered.mean():.1%} by curve, {pooled:.1%} of all points")
        print(f"supported: {sum(s['reach'] > 0 for s in scores.values())} of {len(curves)}")
        results[domain] = {
            "cpu_seconds": cpu, "wall_seconds": time.perf_counter() - wall,
            "log_rmse_mean_median": means, "covered_by_curve": float(covered.mean()),
            "covered_of_points": pooled, "curves": scores,
        }  # fmt: skip
    name = (
        RESULTS if arguments.cut == 1 else RESULTS.with_stem(f"scaling_curves_cut{arguments.cut:g}")
    )
    name.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
