"""Runs competitors in turn, so that a noisy machine is equally noisy to all of them.

A competitor is a process that gets ready, prints "ready" and what it has to say of itself, and then
answers every line it reads with one JSON object about one unit of work. `serve` is its side,
`compare` the other.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Report = dict[str, list[float]]  # what was measured: one value for each unit of work


def serve(
    work: Callable[[], None],
    repeats: int = 1,
    *,
    wait: Callable[[], None] = lambda: None,
    seconds: float | None = None,
    about: Mapping[str, Any] | None = None,
    more: Callable[[], dict[str, float]] = dict,
) -> None:
    """Answers requests: each runs `work` a few times and reports the seconds of one.

    Args:
      repeats: how often a request runs `work`.
      wait: called once at the end of a request, for work that is only sent off.
      seconds: instead of `repeats`: as often as fits into so long.
      about: told once, at the start.
      more: numbers to report beside the time, asked for after it was taken.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for _ in range(2):
        work()
    wait()
    if seconds is not None:
        start = time.perf_counter()
        work()
        wait()
        repeats = max(1, round(seconds / (time.perf_counter() - start)))
    print("ready", json.dumps(dict(about or {})), file=answers, flush=True)
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        report = {"cpu": cpu / repeats, "wall": wall / repeats, "rss_mib": after.ru_maxrss / 1024}
        print(json.dumps(report | more()), file=answers, flush=True)


class WorkerError(RuntimeError):
    """A competitor ended by itself; `output` is the last of what it wrote to stderr."""

    def __init__(self, name: str, output: str):
        lines = [line for line in output.splitlines() if line.strip()] or ["without a word"]
        super().__init__(f"{name}: {lines[-1][:300]}")
        self.output = output


class OutOfTimeError(RuntimeError):
    """A competitor was stopped because its time was up."""


class Worker:
    """A competitor's process.

    Args:
      seconds: after which it is stopped, wherever it is; None for never.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ):
        self.name, self._is_late = name, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | dict(environment or {}),
            start_new_session=True,  # its own processes end with it
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._timer = threading.Timer(seconds or 0, self._stop_late)
        self._timer.daemon = True
        if seconds is not None:
            self._timer.start()

    def _stop_late(self) -> None:
        self._is_late = True
        self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> str:
        if line := self._from.readline():
            return line
        self._process.wait()
        if self._is_late:
            raise OutOfTimeError(self.name)
        self._errors.seek(0)
        raise WorkerError(self.name, self._errors.read().decode(errors="replace"))

    def start(self) -> dict[str, Any]:
        """Waits until it is ready; returns what it says of itself."""
        while not (line := self._read()).startswith("ready "):
            pass
        return json.loads(line.removeprefix("ready "))

    def ask(self) -> dict[str, float]:
        """Lets it do one unit of work; returns its report."""
        self._to.write("go\n")
        self._to.flush()
        return json.loads(self._read())

    def close(self) -> None:
        """Lets it end by itself, or makes it."""
        self._timer.cancel()
        try:
            self._to.close()
            self._process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._kill()
            self._process.wait()
        self._from.close()
        self._errors.close()


def add(report: Report, found: Mapping[str, float]) -> None:
    """Adds what one unit of work gave."""
    for key, value in found.items():
        report.setdefault(key, []).append(value)


def compare(
    commands: Mapping[str, list[str]],
    rounds: int,
    *,
    environment: Mapping[str, str] | None = None,
    about: dict[str, dict[str, Any]] | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, Report]:
    """Starts every command, then lets each do one unit a round; returns their reports.

    Args:
      environment: variables of theirs beside ours.
      about: filled with what each says of itself.
      failed: filled with those that do not start, which are left out, and why; without it that is
        an error.
    """
    workers: list[Worker] = []
    reports: dict[str, Report] = {}
    try:
        for name, command in commands.items():
            print(f"starting {name}{'':20}", end="\r", file=sys.stderr, flush=True)
            workers.append(Worker(name, command, environment=environment))
            try:
                facts = workers[-1].start()
            except WorkerError as error:
                if failed is None:
                    raise
                failed[name] = str(error)
                workers.pop().close()
                continue
            reports[name] = {}
            if about is not None:
                about[name] = facts
        for index in range(rounds):
            for worker in workers:
                add(reports[worker.name], worker.ask())
            print(f"round {index + 1}/{rounds}{'':20}", end="\r", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    print(file=sys.stderr)
    return reports


def spread(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round, so that what slowed both of a round down cancels out."""
    return [a / b for a, b in zip(values, others, strict=True)]


def table(reports: Mapping[str, Report], baseline: str) -> str:
    """Medians and quartiles, and the median of the round-by-round ratios to the baseline."""
    lines = [
        f"{'':24} {'CPU-s':>8} {'quartiles':>17} {'ratio':>6} {'wall-s':>8} {'ratio':>6} {'MiB':>6}"
    ]
    base = reports[baseline]
    for name, report in reports.items():
        low, middle, high = spread(report["cpu"])
        cpu_ratio = statistics.median(ratios(report["cpu"], base["cpu"]))
        wall_ratio = statistics.median(ratios(report["wall"], base["wall"]))
        lines.append(
            f"{name:24} {middle:8.4f} {low:8.4f}-{high:8.4f} "
            f"{cpu_ratio:6.2f} {statistics.median(report['wall']):8.4f} {wall_ratio:6.2f} "
            f"{max(report['rss_mib']):6.0f}"
        )
    return "\n".join(lines)
