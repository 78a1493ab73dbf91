"""What a run writes about itself: metrics, events, the resolved config, the summary."""

import json
import math
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import vitjax
from vitjax import config as config_lib

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def git_commit() -> str | None:
    """The commit of the source tree that runs, with a mark if it was changed; None outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Versions and devices, as config.json records them."""
    devices = jax.devices()
    return {
        "vitjax": vitjax.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that readers see the old one or the new one, never half of one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def write_config(workdir: Path, config: Any) -> None:
    recorded = {"config": config_lib.plain(config), "environment": environment()}
    write_whole(workdir / "config.json", json.dumps(recorded, indent=2) + "\n")


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The recorded config of a run directory as plain values, or None."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    return config_lib.plain(json.loads(path.read_text())["config"])


class MetricWriter:
    """Appends to metrics.jsonl and to TensorBoard's events, one row a step.

    Rows of steps that the file already has are left out: after a resume, the steps between the
    checkpoint and the interruption run again and come to the same numbers.
    """

    def __init__(self, workdir: Path, *, is_active: bool = True):
        self._is_active = is_active
        self._path = workdir / "metrics.jsonl" if is_active else Path(os.devnull)
        self.last_step = self._mend() if is_active else -1
        self._file = self._path.open("a", encoding="utf-8")
        self._board_folder = str(workdir / "tensorboard")
        self._board: Any = None
        self._step, self._row = -1, {}

    def _mend(self) -> int:
        """Cuts off a line that a kill left half written; returns the last whole line's step."""
        if not self._path.exists():
            return -1
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))
        lines = whole.splitlines()
        return json.loads(lines[-1])["step"] if lines else -1

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds to the row of a step, which is written when a later step begins, or on flush."""
        if step != self._step:
            self.flush()
            self._step = step
        self._row |= {k: float(v) for k, v in values.items()}

    def flush(self) -> None:
        row, self._row = self._row, {}
        if not self._is_active or not row or self._step <= self.last_step:
            return
        self.last_step = self._step
        line = {"step": self._step, "time": round(time.time(), 3), **row}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is None:
            from tensorboardX import (
                SummaryWriter,  # a second of CPU time: not before the first step
            )

            self._board = SummaryWriter(self._board_folder)
        for name, value in row.items():
            self._board.add_scalar(name, value, self._step)

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """All rows of metrics.jsonl."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


class Events:
    """Appends to events.jsonl: start, compile, first_step, checkpoint, preempt, resume, stop."""

    def __init__(self, workdir: Path, *, is_active: bool = True):
        path = workdir / "events.jsonl" if is_active else Path(os.devnull)
        self._file = path.open("a", encoding="utf-8")

    def add(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Clock:
    """Sorts a run's wall time into what it went on: steps, data, evaluation, checkpoints."""

    def __init__(self):
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def __call__(self, name: str) -> "_Span":
        return _Span(self, name)

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start

    def mark(self) -> dict[str, float]:
        """Seconds by name since the last mark, and in all ("total")."""
        now = self.spent | {"total": self.total}
        since = {k: v - self._since.get(k, 0.0) for k, v in now.items()}
        self._since = now
        return since


class _Span:
    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> "_Span":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self._clock.spent[self._name] = self._clock.spent.get(self._name, 0.0) + self.seconds
