"""Is the scanned step's compile time flat in depth and in devices?

    python benchmarks/compile_time.py [--rounds 3] [--out FILE.json]

CPU seconds of lowering and compiling one training step on virtual devices, each in a process of its
own, taking turns; medians of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import interleave
import record

ONE = """
import json, sys, time
case = json.loads(sys.argv[1])
import jax
if case["devices"] > 1:
    jax.config.update("jax_num_cpu_devices", case["devices"])
from vitjax import config, experiment
c = config.load_config("vit_s16_i1k")
c.model.depth, c.batch_size = case["depth"], case["batch"]
if case["scan"] is not None:
    c.model.scan = case["scan"]
if not case["augment"]:
    c.augment = ()
built = experiment.build(c, devices=jax.devices()[:case["devices"]])
cpu, wall = time.process_time(), time.perf_counter()
built.compile()
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}))
"""
CASES = [(12, 8), (24, 8), (48, 8), (12, 64), (12, 512)]
FOLDER = Path(__file__).parent / "results"


def compile_once(
    depth: int, devices: int, batch: int, scan: bool | None = None, augment: bool = True
) -> dict[str, float]:
    """CPU and wall seconds to lower and compile the S/16 step, in a process of its own, with
    nothing cached. `scan` is as the config has it where it is None; RandAugment and mixup, which
    the config has, are part of the program but without `augment`."""
    case = {"depth": depth, "devices": devices, "batch": batch, "scan": scan, "augment": augment}
    done = subprocess.run(
        [sys.executable, "-c", ONE, json.dumps(case)], capture_output=True, text=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling {case}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(FOLDER / "compile_time.json"))
    options = parser.parse_args()
    reports: dict[str, interleave.Report] = {f"{d} layers, {n} devices": {} for d, n in CASES}
    for index in range(options.rounds):
        for report, (depth, devices) in zip(reports.values(), CASES, strict=True):
            interleave.add(report, compile_once(depth, devices, 512, True))
        print(f"round {index + 1}/{options.rounds}", end="\r", file=sys.stderr, flush=True)
    rows = [record.row(f"compile, {name}, scanned", report["cpu"], "CPU-s")
            for name, report in reports.items()]  # fmt: skip
    first = next(iter(reports.values()))["cpu"]
    for name, report in list(reports.items())[1:]:
        over = interleave.ratios(report["cpu"], first)
        rows.append(record.row(f"compile, {name}, over 12 layers on 8", over))
    for name, report in reports.items():
        print(f"{name:24} {statistics.median(report['cpu']):6.1f} CPU-s")
    record.write(options.out, options, rows=rows, reports=reports)


if __name__ == "__main__":
    main()
