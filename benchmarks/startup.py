"""What a start costs: the command line, compiling, and the first step with and without a cache.

    python benchmarks/startup.py [--rounds 3] [--parts help compile start] [--out FILE.json]

Each in a process of its own, in turn, CPU and wall seconds of the whole process:
`vitjax --help`; lowering and compiling the 12-layer S/16 training step, scanned and unrolled, on
one device with nothing cached, without and with the RandAugment and mixup of its recipe, which run
in the same program; and from the command to the first step of the quickstart, with a
persistent compilation cache that is empty (the first start) and that the first start filled (the
second).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interleave
import record
from compile_time import compile_once

from vitjax import bench

PARTS = ("help", "compile", "start")
START = ["train", "--config=quickstart", "--config.total_steps=3",
         "--config.optimizer.schedule.warmup_steps=1"]  # fmt: skip
# What is measured, and the goal: median seconds at most.
GOALS = {
    "vitjax --help": {"cpu": 0.7},
    "compile S/16, scanned": {"cpu": 7},
    "compile S/16, unrolled": {"cpu": 10},
    "first start to first step": {"cpu": 15},
    "second start to first step": {"wall": 5},
}


def run(words: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """CPU and wall seconds of a command of vitjax."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "vitjax", *words]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | (environment or {}))  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - start}


def first_step(cache: str) -> dict[str, float]:
    """CPU and wall seconds from the command to the first step of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, began = Path(folder, "run"), time.time()
        run([*START, f"--workdir={workdir}"], {"JAX_COMPILATION_CACHE_DIR": cache})
        events = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
        found = next(e for e in events if e["event"] == "first_step")
    return {"cpu": found["cpu_seconds"], "wall": found["time"] - began}


def measure(parts: list[str]) -> dict[str, dict[str, float]]:
    """One round of what was asked for."""
    found = {}
    if "help" in parts:
        found["vitjax --help"] = run(["--help"])
    if "compile" in parts:
        for name, scan in (("scanned", True), ("unrolled", False)):
            found[f"compile S/16, {name}"] = compile_once(12, 1, 8, scan, augment=False)
            found[f"compile S/16, {name}, augmenting"] = compile_once(12, 1, 8, scan)
    if "start" in parts:
        with tempfile.TemporaryDirectory() as cache:
            found["first start to first step"] = first_step(cache)
            found["second start to first step"] = first_step(cache)
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    options = parser.parse_args()
    record.warn_if_busy()
    reports: dict[str, interleave.Report] = {}
    for index in range(options.rounds):
        for name, seconds in measure(options.parts).items():
            interleave.add(reports.setdefault(name, {}), seconds)
        print(f"round {index + 1}/{options.rounds}", end="\r", file=sys.stderr, flush=True)
    rows = [
        record.row(name, report[key], {"cpu": "CPU-s", "wall": "wall-s"}[key],
                   at_most=GOALS.get(name, {}).get(key))
        for name, report in reports.items()
        for key in ("cpu", "wall")
    ]  # fmt: skip
    print(bench.table(rows))
    record.write(options.out, options, rows=rows, reports=reports)


if __name__ == "__main__":
    main()
