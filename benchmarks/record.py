"""What every benchmark writes beside its numbers, and the rows that `vitjax bench` gathers.

A row says what was measured, its median and quartiles, and the goal where there is one.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import interleave

import vitjax
from vitjax import bench

# Of others: `vitjax bench` tells what it was before its first benchmark.
LOAD = float(os.environ.get("VITJAX_BENCH_LOAD") or os.getloadavg()[0])
PACKAGES = ("vitjax", "jax", "jaxlib", "flax", "optax", "numpy")


def versions(used: Iterable[str] = ()) -> dict[str, str]:
    """Of the packages that every benchmark runs on, and of those used that are installed."""
    found = {}
    for name in (*PACKAGES, *used):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "vitjax":  # runs from its source tree
                found[name] = vitjax.__version__
    return found


def warn_if_busy() -> None:
    """Says that others use the machine. Taking turns does not help then: threads that wait for each
    other, as torch's do, lose many times more than others when one of them is held up."""
    cores = os.cpu_count() or 1
    if cores / 4 < LOAD:
        print(
            f"the machine is busy: a load of {LOAD:.1f} on {cores} cores before the start; such "
            "numbers do not count, least of all torch's",
            file=sys.stderr,
        )


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the source tree that the benchmark lies in; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def row(
    what: str,
    values: list[float],
    unit: str = "",
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """A line of the summary: the median of what was measured, and whether it meets its goal."""
    low, middle, high = interleave.spread(values)
    made: dict[str, Any] = {"what": what, "median": middle, "low": low, "high": high, "unit": unit}
    if at_most is not None:
        made |= {"goal": f"<= {at_most:g}", "met": middle <= at_most}
    if at_least is not None:
        made |= {"goal": f">= {at_least:g}", "met": middle >= at_least}
    return made


def write(
    path: str | Path,
    options: Any,
    *,
    rows: Iterable[Mapping[str, Any]] = (),
    used: Iterable[str] = (),
    on: Mapping[str, Any] | None = None,
    **found: Any,
) -> None:
    """Writes the JSON of a benchmark: its numbers, and where and how they were taken.

    Args:
      path: nothing is written where it is empty.
      options: what argparse gave.
      rows: for `vitjax bench`.
      used: packages beside those of the project.
      on: what `bench.device` gave, if it was asked already.
      found: the numbers.
    """
    if not path:
        return
    script = Path(sys.argv[0]).name
    about = {
        "benchmark": script.removesuffix(".py"),
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": {k: v for k, v in vars(options).items() if k != "worker"},
        "versions": versions(used),
        "python": platform.python_version(),
        "commit": commit(),
        "device": dict(on) if on else bench.device(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_before": LOAD,
    }
    text = json.dumps(about | {"rows": list(rows)} | found, indent=1)
    Path(path).write_text(text + "\n")
