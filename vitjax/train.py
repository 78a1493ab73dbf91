"""`vitjax train`: read the config, build, loop, log, evaluate, save."""

import argparse
import collections
import json
import logging
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax

from vitjax import cli, experiment, parallel, processes, state, warm_start
from vitjax import config as config_lib
from vitjax.checkpoint import Checkpoints
from vitjax.config import Config
from vitjax.curves import draw_curves
from vitjax.devices import peak_flops
from vitjax.errors import InputError, NonFiniteError, Preempted
from vitjax.progress import ProgressLine, describe, logging_to
from vitjax.telemetry import (
    Clock,
    Events,
    MetricWriter,
    read_config,
    read_metrics,
    write_config,
    write_whole,
)

log = logging.getLogger("vitjax")

# What may change when a run goes on: nothing that the numbers of the run depend on.
MAY_CHANGE = (
    "eval_every", "log_every", "checkpoint_every", "checkpoint.", "mesh", "evals.",
    "data.num_threads", "data.num_ahead", "data.max_unreadable_fraction",
    "model.scan", "model.remat", "optimizer.accumulation_steps",
)  # fmt: skip

EXAMPLE = "vitjax train --config=quickstart --workdir=runs/quickstart --config.seed=1"


class _StopSignal:
    """Remembers a SIGTERM or a Ctrl-C, so that the loop can save and leave; a second one kills."""

    def __init__(self):
        self.received: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        # With several processes JAX's own handler agrees on a step that all of them save.
        is_alone = jax.process_count() == 1
        if is_alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _check_workdir(workdir: Path, config: Config) -> None:
    old = read_config(workdir)
    if old is None:
        if (workdir / "checkpoints").exists():
            raise InputError(
                f"{workdir} holds checkpoints but no config.json; choose another workdir"
            )
        return
    has_steps = any((workdir / "checkpoints").glob("[0-9]*"))
    if not has_steps and not read_metrics(workdir):
        if jax.process_index() == 0:
            (workdir / "config.json").unlink()  # a start that got nowhere holds nothing
        return
    old = config_lib.with_defaults(old, config_lib.plain(config_lib.base_config()))
    changed = config_lib.differences(old, config_lib.plain(config))
    changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if changed:
        shown = "\n  ".join(changed[:10])
        raise InputError(
            f"{workdir} holds the run of another experiment; choose another --workdir. "
            f"{len(changed)} keys differ:\n  {shown}"
        )


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _summary(exp: experiment.Experiment) -> str:
    abstract, shards = exp.abstract_state, exp.state_shardings
    local = sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shards), strict=True)
    )
    mib = 2**20
    return (
        f"model: {exp.model.num_params:,} parameters, "
        f"{exp.model.flops_per_image / 1e9:,.3g} GFLOP an image forward (2 x MAC)\n"
        f"state: {state.tree_bytes(abstract) / mib:,.1f} MiB "
        f"(parameters {state.tree_bytes(abstract.params) / mib:,.1f}, "
        f"optimizer {state.tree_bytes(abstract.opt_state) / mib:,.1f}), "
        f"{local / mib:,.1f} MiB a device\n"
        f"devices: {exp.mesh.size} x {exp.mesh.devices.flat[0].device_kind}, "
        f"mesh {dict(exp.mesh.shape)}"
    )


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Trains to the end of the config, from wherever the workdir stands.

    Returns:
      The last metrics of the run.

    Raises:
      InputError: the config or the workdir cannot work; nothing was changed.
      Preempted: a signal came; the state is saved.
      NonFiniteError: the loss or the gradient is not finite; earlier checkpoints are whole.
    """
    workdir = Path(workdir)
    clock = Clock()
    for step in config.checkpoint.at_steps:
        if not 1 <= step <= config.total_steps:
            raise InputError(
                f"checkpoint.at_steps must lie in 1 to total_steps={config.total_steps}, got {step}"
            )
    _check_workdir(workdir, config)
    with clock("start"):
        exp = experiment.build(config)
        loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
        evaluators = experiment.make_evaluators(exp)
        if config.init.checkpoint:
            warm_start.check_init(exp)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (workdir / "train.log").open("a").close()
    except OSError as error:
        raise InputError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    with logging_to(workdir, jax.process_index()) as console, _StopSignal() as stop:
        run = _Run(exp, loader, evaluators, workdir, clock, console)
        try:
            return run.go(stop)
        finally:
            run.close()


class _Run:
    """One launch of a run: the loop and what it writes."""

    def __init__(self, exp, loader, evaluators, workdir, clock, console):
        config = exp.config
        self.exp, self.loader, self.evaluators = exp, loader, evaluators
        self.workdir, self.clock, self.console = workdir, clock, console
        settings = config_lib.plain(config.checkpoint)
        self.exit_code = settings.pop("preempt_exit_code")
        self.checkpoints = Checkpoints(workdir / "checkpoints", **settings)
        self.is_first = jax.process_index() == 0  # the one that writes, but for checkpoints
        self.metrics = MetricWriter(workdir, is_active=self.is_first)
        self.events = Events(workdir, is_active=self.is_first)
        self.contract = exp.contract(loader.source.class_names)
        self.last: dict[str, float] = {}
        self.in_flight: collections.deque = collections.deque()
        self.steps_timed, self.marked_step, self.peak = 0, 0, math.inf
        self.has_stepped = False
        self.line: ProgressLine | None = None
        self.drawing: threading.Thread | None = None

    def go(self, stop: _StopSignal) -> dict[str, float]:
        config, exp, events = self.exp.config, self.exp, self.events
        events.add("start", devices=exp.mesh.size)
        if self.is_first and read_config(self.workdir) is None:
            write_config(self.workdir, config)
        log.info("%s", _summary(exp))
        resumed = self.checkpoints.newest()
        if resumed is not None and resumed == config.total_steps:
            log.info("%s is complete at step %d; nothing to do", self.workdir, resumed)
            if not (self.workdir / "summary.json").exists():  # killed at the last moment
                for row in read_metrics(self.workdir):
                    self.last |= {k: v for k, v in row.items() if k not in ("step", "time")}
                return self._finish(resumed)
            return json.loads((self.workdir / "summary.json").read_text())
        with self.clock("compile") as span:
            train_step = exp.compile()
        events.add("compile", seconds=round(span.seconds, 3))
        log.info("compiled the training step in %.1f s", span.seconds)
        with self.clock("restore"):
            if resumed is not None:
                train_state = self.checkpoints.restore(resumed, exp.state_target)
                events.add("resume", step=resumed)
                log.info("resumed at step %d", resumed)
            else:
                train_state = exp.fresh_state()
                if config.init.checkpoint:
                    train_state = warm_start.load_init(exp, train_state)
                    log.info("parameters from %s", config.init.checkpoint)
        self.peak, origin = peak_flops(exp.mesh.devices.flat[0])
        log.info("peak for MFU: %.3g TFLOP/s a device (%s)", self.peak / 1e12, origin)

        first = resumed or 0
        total, steps_per_epoch = config.total_steps, len(self.loader.source) / config.batch_size
        batches = self.loader.train_batches(
            first,
            config.batch_size,
            config.seed,
            config.data.num_ahead,
            parallel.process_rows(exp.mesh, config.batch_size),
        )
        self.line = ProgressLine(self.console, total, steps_per_epoch)
        self.marked_step = first
        ahead, at_steps = parallel.steps_ahead(exp.mesh), set(config.checkpoint.at_steps)
        self.clock.mark()
        for step in range(first + 1, total + 1):
            if stop.received or processes.must_stop(step):
                raise self._preempt(step - 1, train_state, stop.received or "SIGTERM")
            with self.clock("data"):
                host_batch = next(batches)
            batch = parallel.to_global(host_batch, exp.mesh, config.batch_size)
            train_state, metrics = train_step(train_state, batch)
            jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
            self.in_flight.append((step, metrics))
            while len(self.in_flight) > ahead:
                self._collect()
            is_eval = bool(self.evaluators) and _due(step, config.eval_every, total)
            is_save = _due(step, config.checkpoint_every, total) or step in at_steps
            if is_eval or is_save:
                self._drain()
            if is_eval:
                self._evaluate(step, train_state)
            if is_save:
                self._save(step, train_state)
        return self._finish(total)

    def _collect(self) -> None:
        """Reads the oldest step in flight; by now the device is done with it."""
        step, metrics = self.in_flight.popleft()
        values = {k: float(v) for k, v in parallel.to_host(metrics).items()}
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
            self.metrics.flush()
            kept = self.checkpoints.newest()
            raise NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                f"the last good checkpoint is {'none' if kept is None else f'step {kept}'}. "
                "Try a lower optimizer.peak_lr or a smaller optimizer.clip_norm"
            )
        if not self.has_stepped:
            self.has_stepped = True
            cpu_seconds = round(time.process_time(), 3)
            self.events.add("first_step", step=step, cpu_seconds=cpu_seconds)
        assert self.line is not None
        self.line.advance(step)
        if _due(step, self.exp.config.log_every, self.exp.config.total_steps):
            self._log(step, values)

    def _drain(self) -> None:
        while self.in_flight:
            self._collect()

    def _log(self, step: int, values: dict[str, float]) -> None:
        config, since = self.exp.config, self.clock.mark()
        steps, self.marked_step = step - self.marked_step, step
        self.steps_timed += steps
        busy = since["total"] - sum(since.get(k, 0.0) for k in ("evaluate", "checkpoint"))
        rate = steps * config.batch_size / max(busy, 1e-9)
        flops = rate * self.exp.objective.flops_per_image
        row = {f"train/{k}": v for k, v in values.items()} | {
            "perf/images_per_second": rate,
            "perf/mfu": flops / (self.peak * self.exp.mesh.size),
            "perf/data_wait_fraction": since.get("data", 0.0) / max(busy, 1e-9),
            "data/unreadable": len(self.loader.faults.reasons),
            "examples": step * config.batch_size,
        }
        self._row(step, row)
        assert self.line is not None
        eta = (config.total_steps - step) * busy / max(steps, 1)
        self.line.show(step, row, eta)

    def _row(self, step: int, values: dict[str, float]) -> None:
        self.metrics.add(step, values)
        self.last |= values

    def _evaluate(self, step: int, train_state: state.TrainState) -> None:
        results = {}
        with self.clock("evaluate"):
            for name, evaluator in self.evaluators.items():
                results |= {f"eval/{name}/{k}": v for k, v in evaluator(train_state).items()}
        self._row(step, results)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in results.items() if not k.endswith("/examples"))
        log.info("step %d  %s", step, shown)

    def _save(self, step: int, train_state: state.TrainState) -> None:
        with self.clock("checkpoint"):
            self.metrics.flush()
            self.checkpoints.save(step, train_state, self.contract, self.last_of(step))
        self.events.add("checkpoint", step=step)
        if self.is_first and (self.drawing is None or not self.drawing.is_alive()):
            self.drawing = threading.Thread(target=draw_curves, args=(self.workdir,))
            self.drawing.start()

    def last_of(self, step: int) -> dict[str, float]:
        """The evaluation's numbers, if this step was evaluated."""
        due = _due(step, self.exp.config.eval_every, self.exp.config.total_steps)
        return {k: v for k, v in self.last.items() if k.startswith("eval/")} if due else {}

    def _preempt(self, step: int, train_state: state.TrainState, name: str) -> Preempted:
        self._drain()
        if self.checkpoints.newest() != step:
            self._save(step, train_state)
        self.checkpoints.wait()
        self.events.add("preempt", step=step, signal=name)
        log.info("%s: step %d is saved", name, step)
        return Preempted(step, self.exit_code)

    def _finish(self, step: int) -> dict[str, float]:
        with self.clock("checkpoint"):
            self.checkpoints.wait()
        spent, total = self.clock.spent, self.clock.total
        other = sum(v for k, v in spent.items() if k != "data")
        rate = self.steps_timed * self.exp.config.batch_size / max(total - other, 1e-9)
        flops = rate * self.exp.objective.flops_per_image
        if self.steps_timed:
            self.last["perf/images_per_second"] = rate
            self.last["perf/mfu"] = flops / (self.peak * self.exp.mesh.size)
        summary = self.last | {
            "step": step,
            "wall_seconds": round(total, 2),
            "goodput": (total - other - spent.get("data", 0.0)) / total,
        }
        if self.is_first:
            write_whole(self.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.events.add("stop", step=step)
        if self.line is not None:
            self.line.close()
        log.info("done in %.0f s: %s", total, describe(summary))
        log.info("%s", self.workdir / "curves.png")
        return summary

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        self.metrics.close()
        self.events.close()
        self.checkpoints.close()
        self.loader.close()
        if self.drawing is not None:
            self.drawing.join()
        if self.is_first:
            draw_curves(self.workdir)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax train",
        description="Trains a model, or goes on with the run that the workdir holds.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "--config", required=True, help="a config file, or the name of a shipped one"
    )
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override any key of the config")
    arguments, assignments = cli.parse(parser, argv)
    config = config_lib.override(config_lib.load_config(arguments.config), assignments)
    processes.start()
    train(config, arguments.workdir)
    return 0
