"""The progress of work that counts examples: a live line in a terminal, else plain lines."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("vitjax")
EVERY_SECONDS = 10.0  # between plain lines


class Count:
    """Shows how much of a piece of work is done.

    Args:
      what: begins the line, such as "train: writing".
      total: how many there are.
      start: how many were done before, which say nothing of the speed.
    """

    def __init__(self, console: Console, what: str, total: int, start: int = 0):
        self._what, self._total, self._start = what, total, start
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f}  {task.fields[line]}"),
                TimeElapsedColumn(),
                TextColumn("left:"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, completed=start, line="")

    def __enter__(self) -> "Count":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, more: str = "") -> None:
        """Tells how many are done, and something more."""
        now = time.monotonic()
        speed = (done - self._start) / max(now - self._began, 1e-6)
        line = f"{speed:,.0f} images/s{more}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)
        elif now - self._last >= EVERY_SECONDS:
            self._last = now
            left = (self._total - done) / speed if speed > 0 else 0
            log.info(
                "%s %s of %s  %s  about %d s left",
                self._what, f"{done:,}", f"{self._total:,}", line, left,
            )  # fmt: skip
