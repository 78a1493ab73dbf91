"""Traces some steady steps of a run and prints where their time goes."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.profiling import table, trace
from vitjax.profiling.costs import Program
from vitjax.telemetry import Clock, write_whole

log = logging.getLogger("vitjax")
WARMUP = 5  # steps of a launch before the trace begins
_ELSEWHERE = ("evaluate", "checkpoint", "restore", "profile")  # no part of a step


def check(config: Config, done: int, steps: int) -> None:
    """Raises InputError if a launch that begins after step `done` is too short for a profile."""
    if steps < 1:
        raise InputError(f"--profile must be 1 step or more, got {steps}")
    left = config.total_steps - done
    if left < WARMUP + steps:
        resumed = f", of which {done} are done" if done else ""
        raise InputError(
            f"--profile={steps} needs {WARMUP + steps} steps to run, {WARMUP} of them before the "
            f"trace begins, but total_steps={config.total_steps}{resumed}"
        )


class Profiler:
    """Traces the steps after the first WARMUP of this launch; changes nothing that they compute.

    Args:
      folder: for the trace, kernels.json and kernels.md.
      steps: to trace.
      clock: of the launch; what it says of evaluations and checkpoints is left out.
    """

    def __init__(self, folder: Path, steps: int, clock: Clock):
        self._folder, self._steps, self._clock = folder, steps, clock
        self._done = 0
        self._began: float | None = None

    def after_step(self, train_step: Any, train_state: Any, drain: Callable[[], None]) -> None:
        """To be called when a step is sent off.

        Args:
          train_step: the compiled step.
          train_state: its result.
          drain: waits for the metrics of all steps so far.
        """
        self._done += 1
        if self._done not in (WARMUP, WARMUP + self._steps):
            return
        drain()
        jax.block_until_ready(train_state)
        if self._done == WARMUP:
            with self._clock("profile"):
                self._start()
            self._began = self._here()
        elif self._began is not None:
            seconds, self._began = self._here() - self._began, None
            with self._clock("profile"):
                self._stop(train_step, seconds)

    def _here(self) -> float:
        """Seconds of this launch that went on steps and their data so far."""
        return time.perf_counter() - sum(self._clock.spent.get(k, 0.0) for k in _ELSEWHERE)

    def _start(self) -> None:
        import tensorboardX  # noqa: F401  # else the first row of metrics does, in a traced step

        options: Any = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing each Python call would slow the loop down
        log.info("profile: tracing %d steps", self._steps)
        jax.profiler.start_trace(self._folder, profiler_options=options)

    def _stop(self, train_step: Any, seconds: float) -> None:
        try:
            jax.profiler.stop_trace()
            self._report(train_step, seconds)
        except OSError as error:  # no reason for a run to end
            log.warning("profile: cannot write to %s: %s", self._folder, error)

    def _report(self, train_step: Any, seconds: float) -> None:
        text = train_step.as_text()
        path = trace.newest(self._folder)
        times = trace.read(path, Program(text)) if path else None
        if path is None or times is None or not times.calls:
            log.warning("profile: the trace in %s has no kernel of the step", self._folder)
            return
        device = jax.local_devices()[0]
        count, kind = len(jax.local_devices()), device.device_kind
        found = table.profile(
            text,
            times,
            steps=self._steps,
            wall=seconds,
            device=f"{count} virtual CPUs" if count > 1 and device.platform == "cpu" else kind,
            speeds=table.speeds(device),
        )
        text = json.dumps(table.as_json(found), indent=1) + "\n"
        write_whole(self._folder / "kernels.json", text)
        write_whole(self._folder / "kernels.md", table.markdown(found))
        log.info("%s", table.plain(found))
        log.info(
            "profile: %s has all kernels; open %s with XProf or TensorBoard, or %s in Perfetto",
            self._folder / "kernels.json",
            self._folder,
            next(path.parent.glob("*.trace.json.gz"), path),
        )

    def close(self) -> None:
        """Ends a trace that the run did not live to see the end of."""
        if self._began is not None:
            self._began = None
            jax.profiler.stop_trace()
            log.warning("profile: the run ended before %d steps were traced", self._steps)
