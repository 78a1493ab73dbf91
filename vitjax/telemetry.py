"""What a run writes about itself: metrics, events, the resolved config, the summary."""

import collections
import errno
import json
import logging
import math
import os
import platform
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

import vitjax
from vitjax import config as config_lib
from vitjax import goodput

log = logging.getLogger("vitjax")
MAX_WAITING = 100_000  # lines that a full disk keeps in memory
PROGRESS_SECONDS = 2.0
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


def write_summary(workdir: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Writes summary.json: the values, and what the run's time went on; returns all of it."""
    times = goodput.account(goodput.read_events(workdir))
    values = values | {"goodput": round(times.goodput, 4), "launches": times.launches}
    values["seconds"] = {k: round(v, 3) for k, v in times.seconds.items()}
    write_whole(workdir / "summary.json", json.dumps(values, indent=2) + "\n")
    log.info("%s", goodput.describe(times))
    return values


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The recorded config of a run directory as plain values, or None."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    return config_lib.plain(json.loads(path.read_text())["config"])


class Lines:
    """A file of JSON objects, one a line, that is only ever appended to.

    A line that a kill or a power cut left half written is cut off at the start. On a disk that is
    full lines wait in memory until they can be written; they are whole or not there. Threads may
    share it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=MAX_WAITING)
        self._guard = threading.Lock()
        self._is_failing = False
        self.last: dict[str, Any] | None = None  # of the lines that were there
        if path.exists():
            self.last = _cut_off_broken_end(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, line: dict[str, Any]) -> None:
        with self._guard:
            self._waiting.append(json.dumps(line).encode() + b"\n")
            self._write()

    def _write(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                size = os.fstat(self._file).st_size
                written = os.write(self._file, line)
                if written < len(line):
                    os.ftruncate(self._file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if not self._is_failing:
                    log.warning("cannot write %s: %s; lines wait", self._path, error.strerror)
                self._is_failing = True
                return
            self._is_failing = False
            self._waiting.popleft()

    def close(self) -> None:
        with self._guard:
            self._write()
            os.close(self._file)


def _cut_off_broken_end(path: Path) -> dict[str, Any] | None:
    """Cuts a file of JSON lines off behind its last whole line, which is returned."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    last: dict[str, Any] | None = None
    while end and last is None:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            last = json.loads(content[start:end])
        except ValueError:  # a power cut leaves zeros
            end = start
    if end < len(content):
        os.truncate(path, end)
    return last


class MetricWriter:
    """Appends to metrics.jsonl and to TensorBoard's events, one row a step.

    Rows of steps that the file already has are left out: after a resume, the steps between the
    checkpoint and the interruption run again and come to the same numbers.
    """

    def __init__(self, workdir: Path, *, is_active: bool = True):
        self._lines = Lines(workdir / "metrics.jsonl") if is_active else None
        last = self._lines.last if self._lines else None
        self.last_step = last["step"] if last else -1
        self._board_folder = str(workdir / "tensorboard")
        self._board: Any = None
        self._step, self._row = -1, {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Adds to the row of a step, which is written when a later step begins, or on flush.

        Values are numbers, or lists of words."""
        if step != self._step:
            self.flush()
            self._step = step
        self._row |= {k: v if isinstance(v, list) else float(v) for k, v in values.items()}

    def take(self, step: int) -> dict[str, Any]:
        """The row of a step as far as it is there, which is then not written."""
        row, self._row = (self._row, {}) if step == self._step else ({}, self._row)
        return row

    def flush(self) -> None:
        row, self._row = self._row, {}
        if self._lines is None or not row or self._step <= self.last_step:
            return
        self.last_step = self._step
        line = {"step": self._step, "time": round(time.time(), 3), **row}
        self._lines.add(
            {k: v if isinstance(v, list) or math.isfinite(v) else None for k, v in line.items()}
        )
        self._to_board(row)

    def _to_board(self, row: dict[str, Any]) -> None:
        if self._board is None:
            try:  # without a bound on its queue: its thread ends where it cannot write
                self._board = _tensorboard().SummaryWriter(self._board_folder, max_queue=0)
            except OSError:
                return
        for name, value in row.items():
            if not isinstance(value, list):
                self._board.add_scalar(name, value, self._step)

    def close(self) -> None:
        """Leaves a row that was not flushed unwritten: its step will be run again."""
        if self._lines is not None:
            self._lines.close()
        if self._board is None:
            return
        writer = self._board.file_writer.event_writer
        if writer._worker.is_alive():
            closing = threading.Thread(target=self._board.close, daemon=True)
            closing.start()  # which waits for ever should its thread end now
            closing.join(10.0)
        else:  # so does the end of this process for what that thread did not read
            writer._event_queue.cancel_join_thread()


def _tensorboard() -> ModuleType:
    """tensorboardX, imported at the first row and without torch, which it would only look for.

    Where torch is installed, that look takes seconds of every process."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]: an import of it fails
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock:
    """Sorts a launch's wall time into what it went on: steps, data, evaluation, checkpoints.

    It began when the package was imported, if it is the process's first, so that imports count.
    """

    def __init__(self):
        self.start = time.perf_counter() - _age()
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


def _age() -> float:
    """Seconds since this process imported the package, for its first clock; 0 for later ones."""
    global _has_clock
    if _has_clock:
        return 0.0
    _has_clock = True
    return time.perf_counter() - vitjax.IMPORTED_AT


_has_clock = False


class _Span:
    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> "_Span":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self._clock.spent[self._name] = self._clock.spent.get(self._name, 0.0) + self.seconds


class Events:
    """Appends to events.jsonl, from which `vitjax.goodput` accounts for a run's time.

    Every line has the time, the launch's clock and what it was spent on so far; see
    docs/reliability.md for the events.
    """

    def __init__(self, workdir: Path, clock: Clock, *, is_active: bool = True):
        self._lines = Lines(workdir / "events.jsonl") if is_active else None
        self._clock, self._last = clock, -math.inf

    def add(self, event: str, **facts: Any) -> None:
        if self._lines is None:
            return
        self._last = time.monotonic()
        spent = {k: round(v, 3) for k, v in dict(self._clock.spent).items()}
        line = {"event": event, "time": round(time.time(), 3), "clock": round(self._clock.total, 3)}
        self._lines.add(line | facts | {"spent": spent})

    def progress(self, step: int) -> None:
        """That a step is done, at most once in PROGRESS_SECONDS."""
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self.add("progress", step=step)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
