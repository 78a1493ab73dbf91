"""How often intervals hold what they claim: planted laws, 200 data sets each, fitted and compared.

    python benchmarks/scaling_coverage.py [--sets 200] [--resamples 200] [--law parametric|curve]

For the parametric law a design is isoFLOP budgets three times apart with sizes around the
optimum, lognormal noise on the loss. Of every data set the law is fitted with its bootstrap; 90%
intervals are compared with the planted parameters, the planted loss at ten times the compute, and
one new noisy run there. For curves of one variable, scales over two decades, compared at four
times the largest x.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from vitjax.scaling.curve import fit_curve
from vitjax.scaling.parametric import fit_parametric

LEVEL = 0.9
PLANTED = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.347, "beta": 0.367}
# budgets, sizes, noise of ln L, shape of the noise
DESIGNS = (
    (5, 6, 0.02, "normal"),
    (6, 7, 0.01, "normal"),
    (6, 10, 0.02, "normal"),
    (6, 7, 0.01, "laplace"),
)


def planted_loss(n, d):
    p = PLANTED
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


# Form fitted ("auto" too), form planted, scales, runs a scale, noise of ln y.
CURVES = (
    ("power", "power", 8, 1, 0.02),
    ("power_floor", "power_floor", 8, 2, 0.02),
    ("power_floor", "power_floor", 16, 1, 0.01),
    ("zhai", "zhai", 24, 1, 0.01),
    ("auto", "power_floor", 16, 1, 0.01),
)
PLANTED_CURVES = {
    "power": lambda x: 5 * x**-0.25,
    "power_floor": lambda x: 5 * x**-0.25 + 0.03,
    "zhai": lambda x: 5 * (x + 2e6) ** -0.25 + 0.03,
}


def draw(generator, kind, size):
    """Noise of standard deviation one."""
    if kind == "laplace":
        return generator.laplace(scale=np.sqrt(0.5), size=size)
    return generator.standard_normal(size)


def parametric(budgets: int, sizes: int, noise: float, kind: str, sets: int, resamples: int):
    """Coverage by parameter, of the exponent a, of the law and of a run at 10 x the compute."""
    c = np.repeat(1e18 * 3.0 ** np.arange(budgets), sizes)
    n = 0.1 * np.sqrt(c) * np.tile(np.geomspace(1 / 6, 6, sizes), budgets)
    d = c / 6 / n
    far_c = 10 * c.max()
    far_n = 0.1 * np.sqrt(far_c)
    truth = planted_loss(far_n, far_c / 6 / far_n)
    true_a = PLANTED["beta"] / (PLANTED["alpha"] + PLANTED["beta"])
    hits: dict[str, list[bool]] = {}
    for number in range(sets):
        generator = np.random.default_rng([7, number])
        loss = planted_loss(n, d) * np.exp(noise * draw(generator, kind, len(c)))
        law = fit_parametric(n, d, loss, resamples=resamples, seed=number)
        checks = {name: (PLANTED[name], law.intervals(LEVEL)[name]) for name in PLANTED}
        checks["exponent"] = (true_a, law.exponent_interval(LEVEL))
        checks["loss at 10x"] = (truth, law.interval(far_n, far_c / 6 / far_n, LEVEL, False))
        run = truth * np.exp(noise * draw(generator, kind, 1)[0])
        checks["run at 10x"] = (run, law.interval(far_n, far_c / 6 / far_n, LEVEL))
        for name, (value, (low, high)) in checks.items():
            hits.setdefault(name, []).append(bool(low <= value <= high))
        print(f"{number + 1}/{sets}", end="\r", flush=True)
    return {name: float(np.mean(inside)) for name, inside in hits.items()}


def curve(form: str, planted: str, scales: int, repeats: int, noise: float, sets: int):
    """Coverage of the law and of a new run at four times the largest x."""
    x = np.repeat(np.geomspace(1e6, 1e8, scales), repeats)
    far, law = np.array([4e8]), PLANTED_CURVES[planted]
    hits: dict[str, list[bool]] = {"law at 4x": [], "run at 4x": []}
    for number in range(sets):
        generator = np.random.default_rng([8, number])
        y = law(x) * np.exp(noise * generator.standard_normal(len(x)))
        fit = fit_curve(x, y, form=form, resamples=200, seed=number)
        run = law(far) * np.exp(noise * generator.standard_normal())
        for name, value, with_noise in (("law at 4x", law(far), False), ("run at 4x", run, True)):
            low, high = fit.interval(far, LEVEL, noise=with_noise)
            hits[name].append(bool(low[0] <= value[0] <= high[0]))
        print(f"{number + 1}/{sets}", end="\r", flush=True)
    return {name: float(np.mean(inside)) for name, inside in hits.items()}


def curve_studies(sets: int) -> list[dict]:
    studies = []
    for form, planted, scales, repeats, noise in CURVES:
        start = time.process_time()
        coverage = curve(form, planted, scales, repeats, noise, sets)
        design = {"fitted": form, "planted": planted, "scales": scales, "repeats": repeats,
                  "noise": noise}  # fmt: skip
        seconds = time.process_time() - start
        studies.append({"law": "curve", **design, "coverage": coverage, "cpu_s": seconds})
        print(f"{design}: " + ", ".join(f"{k} {v:.3f}" for k, v in coverage.items()))
    return studies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--law", choices=("parametric", "curve"), help="one alone; default: both")
    arguments = parser.parse_args()
    path = Path(__file__).parent / "results" / "scaling_coverage.json"
    known = json.loads(path.read_text())["studies"] if path.exists() and arguments.law else []
    studies = [study for study in known if study["law"] != arguments.law]
    if arguments.law != "parametric":
        studies += curve_studies(arguments.sets)
    for budgets, sizes, noise, kind in DESIGNS if arguments.law != "curve" else ():
        start = time.process_time()
        coverage = parametric(budgets, sizes, noise, kind, arguments.sets, arguments.resamples)
        design = {"runs": budgets * sizes, "budgets": budgets, "sizes": sizes, "noise": noise,
                  "noise_shape": kind}  # fmt: skip
        seconds = time.process_time() - start
        studies.append({"law": "parametric", **design, "coverage": coverage, "cpu_s": seconds})
        print(f"{design}: " + ", ".join(f"{k} {v:.3f}" for k, v in coverage.items()))
    import jax

    content = {
        "level": LEVEL, "sets": arguments.sets, "resamples": arguments.resamples,
        "jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "device": "cpu", "studies": studies,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
