"""What happened to each cell, and which process works on it now.

    attempts/ID.N.json   how attempt N of a cell ended; written whole, never changed
    attempts/ID.N.retry  the cell is to be tried again after attempt N
    locks/ID.lock        locked by the process that trains the cell, which is named in it

A lock is the kernel's (flock): it ends with its process, however that ends, so that a cell is
never trained twice at once and none stays locked.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitjax import lock
from vitjax.telemetry import write_whole

STATUSES = ("done", "diverged", "failed")


def run_folder(workdir: Path, cell_id: str) -> Path:
    return workdir / "cells" / cell_id


def last(workdir: Path, cell_id: str) -> dict[str, Any] | None:
    """How the last attempt of a cell ended; None if it is still to be trained."""
    number = count(workdir, cell_id)
    if number == 0 or (workdir / "attempts" / f"{cell_id}.{number}.retry").exists():
        return None
    return json.loads((workdir / "attempts" / f"{cell_id}.{number}.json").read_text())


def count(workdir: Path, cell_id: str) -> int:
    """How many attempts of a cell have ended."""
    number = 0
    while (workdir / "attempts" / f"{cell_id}.{number + 1}.json").exists():
        number += 1
    return number


def every(workdir: Path) -> list[dict[str, Any]]:
    """All attempts, in the order in which they ended."""
    found = [json.loads(p.read_text()) for p in (workdir / "attempts").glob("*.json")]
    return sorted(found, key=lambda attempt: (attempt["finished"], attempt["cell"]))


def _wall_seconds(run: Path) -> float | None:
    """Seconds that a run's launches took, as far as its events tell."""
    path = run / "events.jsonl"
    total, start, latest = 0.0, None, None
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError):  # a line that a kill left half written
            event = json.loads(line)
            if event["event"] == "start":
                total += latest - start if start is not None and latest is not None else 0.0
                start = event["time"]
            latest = event["time"]
    if start is None or latest is None:
        return None
    return round(total + latest - start, 3)


def record(
    workdir: Path, cell_id: str, status: str, reason: str = "", metrics: dict | None = None
) -> None:
    """Writes how an attempt ended; with it the cell is finished until `retry`."""
    run, number = run_folder(workdir, cell_id), count(workdir, cell_id) + 1
    environment: dict[str, Any] = {}
    if (run / "config.json").exists():
        environment = json.loads((run / "config.json").read_text())["environment"]
    content = {
        "cell": cell_id,
        "attempt": number,
        "status": status,
        "reason": " ".join(reason.split())[:500],
        "metrics": metrics or {},
        "wall_seconds": _wall_seconds(run),
        "git_commit": environment.get("git_commit"),
        "vitjax_version": environment.get("vitjax"),
        "device_kind": environment.get("device_kind"),
        "finished": round(time.time(), 3),
    }
    (workdir / "attempts").mkdir(parents=True, exist_ok=True)
    write_whole(
        workdir / "attempts" / f"{cell_id}.{number}.json", json.dumps(content, indent=1) + "\n"
    )


def retry(workdir: Path, cell_id: str) -> bool:
    """Sets a failed or diverged cell free to be tried again; its run is kept as ID.N."""
    attempt = last(workdir, cell_id)
    if attempt is None or attempt["status"] == "done":
        return False
    number, run = attempt["attempt"], run_folder(workdir, cell_id)
    if run.exists():
        os.rename(run, run.with_name(f"{cell_id}.{number}"))
    (workdir / "attempts" / f"{cell_id}.{number}.retry").touch()
    return True


@contextlib.contextmanager
def claim(workdir: Path, cell_id: str) -> Iterator[bool]:
    """Locks a cell for this process while inside; gives False at once if another has it."""
    (workdir / "locks").mkdir(parents=True, exist_ok=True)
    file = lock.take(workdir / "locks" / f"{cell_id}.lock")
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            file.truncate(0)


def held_by(workdir: Path, pid: int) -> list[str]:
    """The cells that a process of this host has locked, or had when it died."""
    me = (pid, socket.gethostname())
    return [
        path.stem for path in sorted((workdir / "locks").glob("*.lock")) if lock.holder(path) == me
    ]


def progress(workdir: Path, cell_id: str) -> int:
    """The last step that a cell's run has logged, 0 if none."""
    path = run_folder(workdir, cell_id) / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        steps = re.findall(rb'\{"step": (\d+)', file.read())
    return int(steps[-1]) if steps else 0
