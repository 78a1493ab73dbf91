"""What 1,000 bootstraps of the Chinchilla fit cost, here and with scipy on the same objective.

    python benchmarks/scaling_fits.py [--rounds 5] [--data FOLDER]

Each side is a fresh process, timed as a whole (imports, compilation, the fit, its resamples), in
turn. scipy's BFGS gets the analytic gradient and one start a resample, the optimum of the whole
data; here each resample has two starts and a wider Huber threshold on the way. scipy runs fewer
resamples, of which the marginal cost is scaled up. The marginal cost of 1,000 resamples, without
imports and compilation, is given beside the whole. Without the 245 digitised points, as many
planted ones are fitted.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RESAMPLES = 1000
SCIPY_RESAMPLES = (5, 105)  # their difference in CPU-seconds is the cost of 100
DELTA = 1e-3


def read_points(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, L without the five highest losses."""
    path = folder / "scaling" / "chinchilla_points.csv"
    if path.is_file():
        with path.open() as file:
            rows = list(csv.DictReader(file))
        n, c, loss = (
            np.array([float(row[key]) for row in rows])
            for key in ("Model Size", "Training FLOP", "loss")
        )
        d = c / 6 / n
    else:
        generator = np.random.default_rng(0)
        n, d = np.exp(generator.uniform((18, 20), (23, 27), (245, 2))).T
        loss = (1.8 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(generator.normal(0, 0.005, 245))
    kept = np.argsort(loss)[:-5]
    return n[kept], d[kept], loss[kept]


def ours(folder: Path, resamples: int) -> dict[str, float]:
    from vitjax.scaling.parametric import fit_parametric

    law = fit_parametric(*read_points(folder), resamples=resamples)
    return {"objective": law.objective, "alpha_se": law.standard_errors["alpha"]}


def value_and_gradient(z, n, d, v, weights):
    """Sum of Huber losses and its gradient, z = (ln A, ln B, ln E, alpha, beta)."""
    a, b, e, alpha, beta = z
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    predicted = np.logaddexp.reduce(terms)
    share = np.exp(terms - predicted)
    residual = predicted - v
    size = np.abs(residual)
    value = (weights * np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))).sum()
    slope = weights * np.clip(residual, -DELTA, DELTA)
    by_term = share * slope
    rows = [*by_term.sum(1), -(by_term[0] * n).sum(), -(by_term[1] * d).sum()]
    return value, np.array(rows)


def with_scipy(folder: Path, resamples: int) -> dict[str, float]:
    from scipy.optimize import minimize

    n, d, v = (np.log(column) for column in read_points(folder))

    def fit(start, weights):
        return minimize(value_and_gradient, start, (n, d, v, weights), jac=True, method="BFGS")

    ones = np.ones(len(n))
    grid = [(a, b, e, x, y) for a in (5, 10) for b in (5, 10) for e in (0, 0.5)
            for x in (0.3, 0.6) for y in (0.3, 0.6)]  # fmt: skip
    best = min((fit(np.array(start, float), ones) for start in grid), key=lambda found: found.fun)
    generator = np.random.default_rng(0)
    alphas = []
    for _ in range(resamples):
        weights = np.bincount(generator.integers(0, len(n), len(n)), minlength=len(n)).astype(float)
        alphas.append(fit(best.x, weights).x[3])
    return {"objective": float(best.fun), "alpha_se": float(np.std(alphas, ddof=1))}


def timed(arguments: list[str]) -> dict[str, float]:
    """CPU and wall seconds of a fresh process, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": wall, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    default = os.environ.get("VITJAX_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--side", choices=("ours", "scipy"))
    parser.add_argument("--resamples", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.side:
        run = ours if arguments.side == "ours" else with_scipy
        print(json.dumps(run(arguments.data, arguments.resamples)))
        return

    rounds: dict[str, list[dict[str, float]]] = {"bare": [], "ours": [], "few": [], "many": []}
    data = f"--data={arguments.data}"
    few, many = SCIPY_RESAMPLES
    for number in range(arguments.rounds):
        rounds["bare"].append(timed(["--side=ours", "--resamples=0", data]))
        rounds["ours"].append(timed(["--side=ours", f"--resamples={RESAMPLES}", data]))
        rounds["few"].append(timed(["--side=scipy", f"--resamples={few}", data]))
        rounds["many"].append(timed(["--side=scipy", f"--resamples={many}", data]))
        print(f"round {number + 1}/{arguments.rounds}", end="\r", file=sys.stderr, flush=True)

    our_cpu = [row["cpu_s"] for row in rounds["ours"]]
    our_margin = [
        a["cpu_s"] - b["cpu_s"] for a, b in zip(rounds["ours"], rounds["bare"], strict=True)
    ]
    scipy_margin = [
        (b["cpu_s"] - a["cpu_s"]) / (many - few) * RESAMPLES
        for a, b in zip(rounds["few"], rounds["many"], strict=True)
    ]
    scipy_cpu = [
        a["cpu_s"] + margin * (1 - few / RESAMPLES)
        for a, margin in zip(rounds["few"], scipy_margin, strict=True)
    ]
    import jax
    import scipy

    content = {
        "points": 240,
        "resamples": RESAMPLES,
        "vitjax_cpu_s": {"median": statistics.median(our_cpu), "all": our_cpu},
        "vitjax_wall_s": statistics.median(row["wall_s"] for row in rounds["ours"]),
        "scipy_cpu_s_scaled": {"median": statistics.median(scipy_cpu), "all": scipy_cpu},
        "marginal_cpu_s": {
            "vitjax": statistics.median(our_margin), "scipy": statistics.median(scipy_margin),
        },
        "scipy_resamples_run": many,
        "ratio_scipy_to_vitjax": statistics.median(
            s / o for s, o in zip(scipy_cpu, our_cpu, strict=True)
        ),
        "objective": {
            "vitjax": rounds["ours"][0]["objective"], "scipy": rounds["many"][0]["objective"],
        },
        "alpha_standard_error": {
            "vitjax": rounds["ours"][0]["alpha_se"], "scipy": rounds["many"][0]["alpha_se"],
        },
        "jax": jax.__version__, "scipy": scipy.__version__, "numpy": np.__version__,
        "python": platform.python_version(), "device": f"cpu, {os.cpu_count()} cores",
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "scaling_fits.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
