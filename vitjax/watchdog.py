"""Ends a process that hangs, and says where."""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from vitjax.errors import InputError

log = logging.getLogger("vitjax")
HUNG = 134  # what a shell reports for an aborted process: JAX ends so when a peer is lost


class Watchdog:
    """Watches for signs of life between `start` and `stop`.

    Args:
      seconds: without a sign of life for so long the process ends with exit status 134, after the
        stacks of all its threads are written; 0 for never.
      report: a file that gets the stacks beside standard error.
      on_hang: called once before the end.

    It counts its own seconds: a process that was suspended, or a clock that jumps, is no hang.
    """

    def __init__(
        self, seconds: float, report: Path, on_hang: Callable[[float], None] = lambda seconds: None
    ):
        if seconds < 0:
            raise InputError(f"faults.watchdog_seconds must be 0 (never) or more, got {seconds}")
        self._seconds, self._report, self.on_hang = seconds, report, on_hang
        self._tick = max(min(1.0, seconds / 10), 0.01)
        self._ticks, self._what = 0, "start"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._seconds and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def alive(self, what: str) -> None:
        """A sign of life, and what comes next."""
        self._ticks, self._what = 0, what

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._tick):
            self._ticks += 1
            if self._ticks * self._tick >= self._seconds:
                self._bark()

    def _bark(self) -> None:
        log.error(
            "%s hangs: no sign of life for %g s (faults.watchdog_seconds). The stacks of all "
            "threads are in %s; start the same command to go on from the last checkpoint",
            self._what,
            self._seconds,
            self._report,
        )
        try:
            with self._report.open("a") as file:
                file.write(f"no sign of life for {self._seconds:g} s in: {self._what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self.on_hang(self._seconds)
        except OSError:
            pass  # a full disk must not keep a hung process alive
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)
