"""Runs competitors in turn, so that a noisy machine is equally noisy to all of them.

A competitor is a process that gets ready, prints "ready", and then answers every line it reads with
one JSON object about one unit of work. `serve` is its side, `compare` the other.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], None], repeats: int = 1) -> None:
    """Answers requests: each runs `work` a few times and reports the seconds of one."""
    for _ in range(2):
        work()
    print("ready", flush=True)
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(repeats):
            work()
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        report = {"cpu": cpu / repeats, "wall": wall / repeats, "rss_mib": after.ru_maxrss / 1024}
        print(json.dumps(report), flush=True)


def compare(commands: dict[str, list[str]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Starts every command, then lets each do one unit a round; returns their reports."""
    processes = {}
    for name, command in commands.items():
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{name} did not start: {' '.join(command)}")
        processes[name] = process
    reports = {name: {"cpu": [], "wall": [], "rss_mib": []} for name in commands}
    for index in range(rounds):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            for key, value in json.loads(process.stdout.readline()).items():
                reports[name][key].append(value)
        print(f"round {index + 1}/{rounds}", end="\r", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return reports


def table(reports: dict[str, dict[str, list[float]]], baseline: str) -> str:
    """Medians and quartiles, and the median of the round-by-round ratios to the baseline."""
    lines = [
        f"{'':24} {'CPU-s':>8} {'quartiles':>17} {'ratio':>6} {'wall-s':>8} {'ratio':>6} {'MiB':>6}"
    ]
    base = reports[baseline]
    for name, report in reports.items():
        low, _, high = statistics.quantiles(report["cpu"], n=4)
        cpu_ratio = statistics.median(
            a / b for a, b in zip(report["cpu"], base["cpu"], strict=True)
        )
        wall_ratio = statistics.median(
            a / b for a, b in zip(report["wall"], base["wall"], strict=True)
        )
        lines.append(
            f"{name:24} {statistics.median(report['cpu']):8.4f} {low:8.4f}-{high:8.4f} "
            f"{cpu_ratio:6.2f} {statistics.median(report['wall']):8.4f} {wall_ratio:6.2f} "
            f"{max(report['rss_mib']):6.0f}"
        )
    return "\n".join(lines)
