"""A request to stop: a signal to one process of a run, heard by all at the same point."""

import os
import signal
import threading
from typing import Any

import jax


class Interrupted(Exception):
    """Work that may be left in the middle, such as an evaluation, was asked to stop."""


class Stop:
    """Remembers a SIGTERM or a Ctrl-C, so that the run can save and leave.

    Schedulers repeat SIGTERM: only the first counts. A second Ctrl-C ends the process.
    """

    def __init__(self):
        self.received: str | None = None
        self._old: dict[int, Any] = {}
        self._points = 0

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        # With several processes JAX's own handler of SIGTERM agrees on a point for all of them.
        numbers = [signal.SIGTERM] if jax.process_count() == 1 else []
        for number in (*numbers, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
                return
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def is_requested(self) -> bool:
        """Whether to stop here. Every process asks at the same points, and gets the same answer."""
        if jax.process_count() > 1 and self.received is None:
            from jax.experimental import multihost_utils

            self._points += 1
            if multihost_utils.reached_preemption_sync_point(self._points):
                self.received = "SIGTERM"
        return self.received is not None

    def check(self) -> None:
        """Raises Interrupted where the run was asked to stop."""
        if self.is_requested():
            raise Interrupted
