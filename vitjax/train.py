"""Training: build what the config says, loop, log, evaluate, save."""

import collections
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax

from vitjax import experiment, monitor, parallel, state, warm_start
from vitjax import workdir as workdir_lib
from vitjax.checkpoints.run import Checkpoints
from vitjax.config import Config
from vitjax.curves import Curves
from vitjax.devices import peak_flops
from vitjax.early_stop import EarlyStop
from vitjax.errors import Preempted
from vitjax.evals import evaluation
from vitjax.profiling import profiler
from vitjax.progress import ProgressLine, describe, logging_to
from vitjax.rescue import Rescue
from vitjax.stopping import Interrupted, Stop
from vitjax.telemetry import (
    Clock,
    Events,
    MetricWriter,
    read_config,
    read_metrics,
    write_config,
    write_summary,
)
from vitjax.watchdog import Watchdog

log = logging.getLogger("vitjax")


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def train(config: Config, workdir: str | Path, profile: int | None = None) -> dict[str, float]:
    """Trains to the end of the config, from wherever the workdir stands.

    Args:
      profile: steps to trace once the run is steady, for a table of kernels (see `profiling`).

    Returns:
      The last metrics of the run.

    Raises:
      InputError: the config or the workdir cannot work, or another process trains there; nothing
        was changed.
      Preempted: a signal came; the state is saved.
      NonFiniteError: the loss or the gradient is not finite, or jumped; earlier checkpoints are
        whole.
      DamagedCheckpointError: no saved step can be restored.
      SaveError: too many saves in a row have failed.
    """
    workdir = Path(workdir)
    clock, stop = Clock(), Stop()
    workdir_lib.check(workdir, config)
    checkpoints = Checkpoints.of_run(workdir, config)
    if profile is not None:
        profiler.check(config, checkpoints.newest() or 0, profile)
    watchdog = Watchdog(config.faults.watchdog_seconds, workdir / "stacks.txt")

    def between_batches() -> None:
        watchdog.alive("evaluation")
        stop.check()

    with clock("start"):
        exp = experiment.build(config)
        loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
        evaluators = experiment.make_evaluators(exp, between_batches)
        if config.init.checkpoint:
            warm_start.check_init(exp)
        attention = monitor.AttentionLogits(exp) if config.monitor.attention_logits else None
        alarm = monitor.GrowthAlarm(config.monitor.attention_alarm)
        early_stop = EarlyStop(**config.early_stop)
    with (
        workdir_lib.opened(workdir, config),
        logging_to(workdir, jax.process_index()) as console,
        stop,
    ):
        run = _Run(exp, loader, evaluators, workdir, clock, console, stop, watchdog, checkpoints)
        run.attention, run.alarm, run.early_stop = attention, alarm, early_stop
        if profile is not None and run.is_first:
            run.profiler = profiler.Profiler(workdir / "profile", profile, clock)
        try:
            return run.go()
        finally:
            run.close()


class _GoBack(Exception):
    """A step, the only argument, went wrong, and the run is to go back to a checkpoint."""


class _Run:
    """One launch of a run: the loop and what it writes."""

    def __init__(
        self, exp, loader, evaluators, workdir, clock, console, stop, watchdog, checkpoints
    ):
        config = exp.config
        self.exp, self.loader, self.evaluators = exp, loader, evaluators
        self.workdir, self.clock, self.console = workdir, clock, console
        self.stop, self.watchdog = stop, watchdog
        self.is_first = jax.process_index() == 0  # the one that writes, but for checkpoints
        self.metrics = MetricWriter(workdir, is_active=self.is_first)
        self.events = Events(workdir, clock, is_active=self.is_first)
        watchdog.on_hang = lambda seconds: self.events.add("hang", seconds=seconds)
        self.checkpoints = checkpoints
        checkpoints.on_event = self.events.add
        self.rescue = Rescue(experiment.make_guard(config), self.checkpoints, self.events)
        self.contract = exp.contract(loader.source.class_names)
        self.layers = monitor.layer_names(exp.abstract_state.params)
        self.attention: Any = None
        self.alarm: Any = None
        self.early_stop = EarlyStop()
        self.profiler: profiler.Profiler | None = None
        self.last: dict[str, float] = {}
        self.in_flight: collections.deque = collections.deque()
        self.steps_timed, self.marked_step, self.peak = 0, 0, math.inf
        self.has_stepped = False
        self.line: ProgressLine | None = None
        self.curves = Curves(workdir)

    def go(self) -> dict[str, float]:
        config, exp, events = self.exp.config, self.exp, self.events
        events.add("start", devices=exp.mesh.size, processes=jax.process_count())
        if self.is_first and read_config(self.workdir) is None:
            write_config(self.workdir, config)
        log.info("%s", exp.summary())
        self.checkpoints.clean()
        newest, pending = self.checkpoints.newest(), self.checkpoints.pending_row()
        rows = read_metrics(self.workdir) if newest and self.is_first else []
        self.early_stop.read(rows, newest or 0)
        if not pending and (newest == config.total_steps or self.early_stop.was_over):
            return self._nothing_to_do(newest or 0)
        with self.clock("compile") as span:
            train_step = exp.compile()
        events.add("compile", seconds=round(span.seconds, 3))
        log.info("compiled the training step in %.1f s", span.seconds)
        step, train_state, row = self._begin()
        self.peak, origin = peak_flops(exp.mesh.devices.flat[0])
        log.info("peak for MFU: %.3g TFLOP/s a device (%s)", self.peak / 1e12, origin)
        steps_per_epoch = self.loader.order(config.seed).epoch / config.batch_size
        self.line = ProgressLine(self.console, config.total_steps, steps_per_epoch)
        self.marked_step = step
        self.clock.mark()
        if row:  # its evaluation was interrupted
            self._row(step, row)
            is_over = self._evaluate(step, train_state)
            self.metrics.flush()
            if is_over:
                return self._finish(step)
        while step < config.total_steps:
            try:
                step, train_state = self._train(step, train_state, train_step)
                break
            except _GoBack as fault:
                step = fault.args[0]
                self.in_flight.clear()
                with self.clock("restore"):
                    train_state = self.rescue.roll_back(step, exp.state_target)
        self._make_sure(step, train_state)
        return self._finish(step)

    def _nothing_to_do(self, step: int) -> dict[str, float]:
        log.info("%s is complete at step %d; nothing to do", self.workdir, step)
        if (self.workdir / "summary.json").exists():
            return json.loads((self.workdir / "summary.json").read_text())
        for row in read_metrics(self.workdir):  # killed at the last moment
            self.last |= {k: v for k, v in row.items() if k not in ("step", "time")}
        return self._finish(step)

    def _begin(self) -> tuple[int, state.TrainState, dict[str, float]]:
        """The step and state to go on from, and the row of that step if it still is to be
        evaluated."""
        with self.clock("restore") as span:
            found = self.checkpoints.resume(self.exp.state_target)
            if found is None:
                return 0, warm_start.first_state(self.exp), {}
        step, train_state, contract = found
        self.events.add("resume", step=step, seconds=round(span.seconds, 3))
        log.info("resumed at step %d", step)
        return step, train_state, contract.get("row", {})

    def _train(
        self, first: int, train_state: state.TrainState, train_step: Any
    ) -> tuple[int, state.TrainState]:
        """Runs the steps after `first` to the last, or to where the metric stops to improve.

        Raises:
          _GoBack: a step went wrong.
        """
        config, exp = self.exp.config, self.exp
        total, ahead = config.total_steps, parallel.steps_ahead(exp.mesh)
        batches = self.loader.train_batches(
            first,
            config.batch_size,
            config.seed,
            config.data.num_ahead,
            parallel.process_rows(exp.mesh, config.batch_size),
        )
        for step in range(first + 1, total + 1):
            self.watchdog.alive(f"step {step}")
            if self.stop.is_requested():
                raise self._preempt(step - 1, train_state)
            with self.clock("data"):
                host_batch = next(batches)
            batch = parallel.to_global(host_batch, exp.mesh, config.batch_size)
            train_state, metrics = train_step(train_state, batch)
            jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
            self.in_flight.append((step, metrics))
            if self.profiler is not None:
                self.profiler.after_step(train_step, train_state, self._drain)
            while len(self.in_flight) > ahead:
                self._collect()
            is_logged = _due(step, config.log_every, total)
            is_eval = bool(self.evaluators) and _due(step, config.eval_every, total)
            is_save = _due(step, config.checkpoint_every, total) or self.checkpoints.keep.is_pinned(
                step
            )
            is_save = is_save or (is_logged and self.checkpoints.is_due())
            is_watched = is_logged and self.attention is not None
            if is_eval or is_save or is_watched:
                self._drain()
            if is_watched:
                self._watch_attention(step, train_state, batch)
            is_over = is_eval and self._evaluate(step, train_state)
            if is_save or is_over:
                self._save(step, train_state)
            if is_over:
                log.info("%s has stopped to improve: the run ends", self.early_stop.metric)
                return step, train_state
        return total, train_state

    def _collect(self) -> None:
        """Reads the oldest step in flight; by now the device is done with it."""
        step, found = self.in_flight.popleft()
        metrics = dict(parallel.to_host(found))
        layers, fault = metrics.pop("layers", None), int(metrics.pop("fault"))
        values = {k: float(v) for k, v in metrics.items()}
        if not self.has_stepped:
            self.has_stepped = True
            self.watchdog.start()
            cpu_seconds = round(time.process_time(), 3)
            self.events.add("first_step", step=step, cpu_seconds=cpu_seconds)
        assert self.line is not None
        self.line.advance(step)
        action = ""
        if fault:
            self.metrics.flush()
            action = self.rescue.action(step, fault, values)
        else:
            self.rescue.good()
        if _due(step, self.exp.config.log_every, self.exp.config.total_steps):
            if layers is not None:
                self._row(step, monitor.named_norms(self.layers, layers))
            self._log(step, values)
        self.events.progress(step)
        if action == "rollback":
            raise _GoBack(step)

    def _drain(self) -> None:
        while self.in_flight:
            self._collect()

    def _log(self, step: int, values: dict[str, float]) -> None:
        config, since = self.exp.config, self.clock.mark()
        steps, self.marked_step = step - self.marked_step, step
        self.steps_timed += steps
        busy = since["total"] - sum(
            since.get(k, 0.0) for k in ("evaluate", "checkpoint", "profile")
        )
        rate = steps * config.batch_size / max(busy, 1e-9)
        flops = rate * self.exp.objective.flops_per_image
        row = {f"train/{k}": v for k, v in values.items()} | {
            "perf/images_per_second": rate,
            "perf/mfu": flops / (self.peak * self.exp.mesh.size),
            "perf/data_wait_fraction": since.get("data", 0.0) / max(busy, 1e-9),
            **self.loader.faults.metrics(),
            "examples": step * config.batch_size,
        }
        self._row(step, row)
        assert self.line is not None
        eta = (config.total_steps - step) * busy / max(steps, 1)
        self.line.show(step, row, eta)

    def _row(self, step: int, values: dict[str, Any]) -> None:
        self.metrics.add(step, values)
        self.last |= values

    def _evaluate(self, step: int, train_state: state.TrainState) -> bool:
        """Whether the run ends here."""
        try:
            with self.clock("evaluate"):
                results, pictures = evaluation.run(self.evaluators, train_state)
        except Interrupted:
            raise self._preempt(step, train_state, self.metrics.take(step)) from None
        if self.is_first:
            evaluation.write_pictures(self.workdir, pictures, step)
        self._row(step, results)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in results.items() if not k.endswith("/examples"))
        log.info("step %d  %s", step, shown)
        return self.early_stop.is_over(step, results)

    def _watch_attention(self, step: int, train_state: state.TrainState, batch: Any) -> None:
        self._row(step, values := self.attention(train_state, batch))
        if self.alarm(largest := values["attention/max_logit"]):
            log.warning("step %d: the largest attention logit is %.4g", step, largest)
            self.events.add("alarm", step=step, attention_logit=largest)

    def _save(self, step: int, train_state: state.TrainState) -> None:
        self.watchdog.alive(f"saving step {step}")
        with self.clock("checkpoint"):
            self.metrics.flush()
            self.checkpoints.save(step, train_state, self.contract, self.last_of(step))
        self.events.add("checkpoint", step=step)
        if self.is_first:
            self.curves.draw_beside()

    def _make_sure(self, step: int, train_state: state.TrainState) -> None:
        """Returns when the step is on disk; tries again where that failed, as often as allowed."""
        with self.clock("checkpoint"):
            self.checkpoints.wait()
            while self.checkpoints.has_failed:
                time.sleep(1.0)
                self.watchdog.alive(f"saving step {step}")
                self.checkpoints.save(step, train_state, self.contract, self.last_of(step))
                self.checkpoints.wait()

    def last_of(self, step: int) -> dict[str, float]:
        """The evaluation's numbers, if this step was evaluated."""
        due = _due(step, self.exp.config.eval_every, self.exp.config.total_steps)
        return {k: v for k, v in self.last.items() if k.startswith("eval/")} if due else {}

    def _preempt(self, step: int, train_state: state.TrainState, row: Any = None) -> Preempted:
        """Saves the step, unless it is saved; a row goes with it whose evaluation is to be made."""
        self._drain()
        name = self.stop.received
        self.contract = self.contract | ({"row": row} if row else {})
        if self.checkpoints.last_begun != step:
            self._save(step, train_state)
        self._make_sure(step, train_state)
        self.events.add("preempt", step=step, signal=name)
        log.info("%s: step %d is saved", name, step)
        return Preempted(step, self.exp.config.checkpoint.preempt_exit_code)

    def _finish(self, step: int) -> dict[str, float]:
        self.metrics.flush()
        spent, total = self.clock.spent, self.clock.total
        other = sum(v for k, v in spent.items() if k != "data")
        rate = self.steps_timed * self.exp.config.batch_size / max(total - other, 1e-9)
        flops = rate * self.exp.objective.flops_per_image
        if self.steps_timed:
            self.last["perf/images_per_second"] = rate
            self.last["perf/mfu"] = flops / (self.peak * self.exp.mesh.size)
        self.events.add("stop", step=step)
        summary: dict[str, Any] = self.last | {"step": step, "wall_seconds": round(total, 2)}
        if self.is_first:
            summary = write_summary(self.workdir, summary)
        if self.line is not None:
            self.line.close()
        log.info("done in %.0f s: %s", total, describe(summary))
        log.info("%s", self.workdir / "curves.png")
        return summary

    def close(self) -> None:
        self.watchdog.stop()
        if self.profiler is not None:
            self.profiler.close()
        if self.line is not None:
            self.line.close()
        self.checkpoints.close()
        self.metrics.close()
        self.events.close()
        self.loader.close()
        if self.is_first:
            self.curves.draw()
