"""What pretraining without labels is worth: kNN and linear probe, before, after, and of raw pixels.

    python benchmarks/pretraining.py --config=mae_cifar10 --root=cifar10.zip --seeds=0,1,2 \\
        --workdir=runs/pretraining [--init=CHECKPOINT --drop=PATTERN] [--out=FILE.json]

Every seed draws a network, evaluates it as it is (or with the weights of --init), trains it by the
config, and evaluates it again, all by the config's own evaluators. A run that is there goes on.
Intervals are Student's over seeds, at 95%.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import scipy.stats

KEPT = ("knn/accuracy", "probe/ridge_accuracy", "probe/sgd_accuracy")


def interval(values: list[float]) -> str:
    """Mean, and half the width of its interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1%}"
    half = (
        scipy.stats.t.ppf(0.975, len(values) - 1)
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    return f"{mean:.1%} ± {100 * half:.1f}"


def evaluate(experiment: Any, state: Any) -> dict[str, float]:
    from vitjax.experiment import make_evaluators

    config = copy.deepcopy(experiment.config).unlock()
    for name in set(config.evals) - {"knn", "probe"}:
        del config.evals[name]
    found = {}
    for name, evaluator in make_evaluators(dataclasses.replace(experiment, config=config)).items():
        found |= {f"{name}/{k}": float(v) for k, v in evaluator(state).items()}
    return {k: found[k] for k in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mae_cifar10")
    parser.add_argument("--root", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--init", default="")
    parser.add_argument("--drop", default="")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--pixels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    options = parser.parse_args()

    from vitjax import config as config_lib
    from vitjax import cpu, experiment, warm_start
    from vitjax.objectives.objective import Objective
    from vitjax.telemetry import read_metrics
    from vitjax.train import train

    cpu.keep_freed_memory()

    class Pixels(Objective):
        def embed(self, params, extra, batch):
            return batch["images"].reshape(len(batch["images"]), -1)

    found: dict[str, dict[str, list[float]]] = {"pixels": {}, "before": {}, "after": {}}
    for seed in map(int, options.seeds.split(",")):
        changes = [f"data.root={options.root}", f"seed={seed}", *options.set]
        if options.init:
            changes += [f"init.checkpoint={options.init}"]
            changes += [f"init.drop=({options.drop!r},)"] if options.drop else []
        config = config_lib.override(config_lib.load_config(options.config), changes)
        exp = experiment.build(config)
        state = warm_start.first_state(exp)
        rows = {"before": evaluate(exp, state)}
        if options.pixels and not found["pixels"]:
            pixels = dataclasses.replace(exp, objective=Pixels(exp.model))
            rows["pixels"] = evaluate(pixels, state)
        del state
        workdir = Path(options.workdir) / f"{options.config}_{seed}"
        train(config, workdir)
        last = {k: v for row in read_metrics(workdir) for k, v in row.items()}
        rows["after"] = {k: float(last[f"eval/{k}"]) for k in KEPT}
        for kind, row in rows.items():
            print(seed, kind, row, flush=True)
            for key, value in row.items():
                found[kind].setdefault(key, []).append(value)
        if options.out:
            about = {"config": options.config, "set": options.set, "init": bool(options.init)}
            Path(options.out).write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"{'':10}" + "".join(f"{key:>24}" for key in KEPT))
    for kind, row in ((kind, row) for kind, row in found.items() if row):
        print(f"{kind:10}" + "".join(f"{interval(row[key]):>24}" for key in KEPT))


if __name__ == "__main__":
    main()
