"""Starts workers, watches them, and keeps the record where one dies."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitjax import config as config_lib
from vitjax.errors import InputError
from vitjax.sweep import attempts
from vitjax.sweep.cells import PREEMPTED, Cell
from vitjax.sweep.plan import Plan

log = logging.getLogger("vitjax")
POLL_SECONDS = 0.5
LINE_SECONDS = 30  # between plain lines


def parse_cells(text: str, plan: Plan) -> list[Cell]:
    """The cells that "1-4,7" means.

    Raises:
      InputError: it is not of that form, or there is no such cell.
    """
    by_number = {cell.number: cell for cell in plan.cells}
    numbers = parse_numbers(text)
    for number in numbers:
        if number not in by_number:
            raise InputError(
                f"--cells={text!r}: there is no cell {number}; the plan has 1 to {len(plan.cells)}"
            )
    return [by_number[number] for number in numbers]


def parse_numbers(text: str) -> list[int]:
    """The numbers that "1-4,7" means, each once."""
    numbers: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise InputError(f"{text!r} is not of the form 1-4,7")
        numbers |= dict.fromkeys(range(int(low), int(high if dash else low) + 1))
    return list(numbers)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as "1-4,7"."""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        own = [number for _, number in run]
        parts.append(str(own[0]) if len(own) == 1 else f"{own[0]}-{own[-1]}")
    return ",".join(parts)


def select(
    workdir: Path, plan: Plan, *, stage: str, cells: str | None, group: int | None
) -> list[Cell]:
    """The cells to run.

    Raises:
      InputError: no such cells; a branch without its trunk; hold-out runs with no frozen
        prediction.
    """
    chosen = list(plan.cells)
    if group is not None:
        chosen = plan.group(group)
        if not chosen:
            raise InputError(
                f"--group={group}: there is none; the plan has 0 to {plan.totals['trunks'] - 1:.0f}"
            )
    elif cells is not None:
        chosen = parse_cells(cells, plan)
    wanted = [c for c in chosen if stage in ("all", c.stage)]
    if not wanted:
        raise InputError(
            f"no cell of stage {stage!r} among those asked for; give --stage=holdout or all"
            if stage == "fit"
            else f"no cell of stage {stage!r} among those asked for"
        )
    held = [c for c in wanted if c.stage == "holdout"]
    if held and not (workdir / "frozen.json").is_file():
        raise InputError(
            f"{len(held)} hold-out runs wait until the prediction is frozen, so that they test it: "
            f"first vitjax scaling freeze --workdir={workdir}"
        )
    ids = {c.id for c in wanted}
    for cell in wanted:
        trunk = plan.cell(cell.trunk)
        run = attempts.run_folder(workdir, trunk.id)
        is_there = (run / "checkpoints" / str(cell.branch_step)).is_dir()
        is_alone = cell.is_branch and trunk.id not in ids and not is_there
        if is_alone and attempts.last(workdir, trunk.id) is None:
            raise InputError(
                f"cell {cell.number} branches off cell {trunk.number}, which has not come so far: "
                "add it to --cells"
            )
    return wanted


def check_data(plan: Plan) -> None:
    """Opens the training set once, so that a wrong path is one message and not one a cell.

    Raises:
      InputError: it cannot be opened, or it has another number of images than the plan says.
    """
    source = config_lib.build(plan.sweep["train"]["data"]["source"])
    if len(source) != plan.sweep["num_images"]:
        raise InputError(
            f"the plan counts epochs of num_images={plan.sweep['num_images']}, but the training "
            f"set has {len(source)}"
        )


def share_cores(workers: int) -> list[list[int]]:
    """Each worker's cores, as equal as can be.

    Raises:
      InputError: there are fewer cores than workers.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if not 1 <= workers <= len(cores):
        raise InputError(f"--workers must be 1 to {len(cores)}, the number of cores, got {workers}")
    return [cores[i * len(cores) // workers : (i + 1) * len(cores) // workers]
            for i in range(workers)]  # fmt: skip


class Sweep:
    """One launch of `vitjax sweep run`."""

    def __init__(self, workdir: Path, plan: Plan, cells: list[Cell], console: Console):
        self.workdir, self.plan, self.cells, self.console = workdir, plan, cells, console
        self.processes: dict[int, tuple[subprocess.Popen, list[int]]] = {}
        self.stopped_by: str | None = None
        self.known = {c.id for c in cells if attempts.last(workdir, c.id)}
        self.start, self.spent_before = time.monotonic(), self._flops()
        self.last_line = self.start
        self.bar: Any = None

    def go(self, workers: int) -> int:
        """Trains all cells; returns the exit status: 0 done, 75 preempted, 1 if any failed."""
        shares = share_cores(workers)
        todo = [c for c in self.cells if c.id not in self.known]
        log.info("%d of %d cells to train, %d workers", len(todo), len(self.cells), workers)
        old = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self._progress():
                for share in shares[: len(todo)]:
                    self._spawn(share)
                while self.processes:
                    time.sleep(POLL_SECONDS)
                    self._reap()
                    self._show()
        finally:
            for process, _ in self.processes.values():
                process.terminate()
            for number, handler in old.items():
                signal.signal(number, handler)
        return self._report()

    def command(self, cores: list[int]) -> list[str]:
        """What starts a worker."""
        numbers = ranges(cell.number for cell in self.cells)
        words = [sys.executable, "-m", "vitjax", "sweep", "run", f"--workdir={self.workdir}"]
        return [*words, "--stage=all", f"--cells={numbers}", f"--worker={ranges(cores)}"]

    def _spawn(self, cores: list[int]) -> None:
        (self.workdir / "logs").mkdir(exist_ok=True)
        with (self.workdir / "logs" / f"worker-{cores[0]}.log").open("a") as file:
            process = subprocess.Popen(
                self.command(cores), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self.processes[process.pid] = process, cores

    def _stop(self, number: int, _: Any) -> None:
        """Passes a signal on; the workers save and leave. A second one kills."""
        self.stopped_by = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        for process, _ in self.processes.values():
            process.terminate()

    def _reap(self) -> None:
        for pid, (process, cores) in list(self.processes.items()):
            status = process.poll()
            if status is None:
                continue
            del self.processes[pid]
            if status == 0 or self.stopped_by:
                continue
            if status in (PREEMPTED, -signal.SIGTERM, -signal.SIGINT):
                self.stopped_by = "a signal to a worker"
                continue
            self._bury(pid, status, cores)

    def _bury(self, pid: int, status: int, cores: list[int]) -> None:
        """Records the cell that a dead worker held as failed, and starts another worker."""
        name = signal.Signals(-status).name if status < 0 else ""
        why = f"its worker ended with {f'signal {name}' if name else f'exit status {status}'}"
        cells = attempts.held_by(self.workdir, pid)
        for cell_id in cells:
            with attempts.claim(self.workdir, cell_id) as is_mine:
                if is_mine and attempts.last(self.workdir, cell_id) is None:
                    attempts.record(self.workdir, cell_id, "failed", why)
        path = self.workdir / "logs" / f"worker-{cores[0]}.log"
        if not cells:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"a worker ended with status {status}; {path} ends with:\n{tail}")
        log.warning("%s: %s; see %s", ", ".join(cells), why, path)
        if any(attempts.last(self.workdir, c.id) is None for c in self.cells):
            self._spawn(cores)

    def _flops(self) -> float:
        """Training FLOPs of the selected cells that are done, in part or whole."""
        total = 0.0
        for cell in self.cells:
            if cell.id in self.known:
                total += cell.flops_paid
            elif step := attempts.progress(self.workdir, cell.id):
                share = (step - cell.branch_step) / (cell.steps - cell.branch_step)
                total += cell.flops_paid * max(share, 0.0)
        return total

    def _progress(self) -> Progress:
        # Of a pipe nothing is drawn; a line is written for each cell instead.
        self.bar = Progress(
            TextColumn("{task.fields[counts]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f}% of the FLOPs  {task.fields[now]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=2,
        )
        total = sum(c.flops_paid for c in self.cells)
        self.task = self.bar.add_task("sweep", total=total, counts="", now="")
        return self.bar

    def _show(self) -> None:
        for cell in self.cells:
            if cell.id not in self.known and (found := attempts.last(self.workdir, cell.id)):
                self.known.add(cell.id)
                counts = f"{len(self.known)}/{len(self.cells)} cells"
                log.info("%s  %s %s", counts, cell.id, _describe(found))
        done, total = self._flops(), sum(c.flops_paid for c in self.cells)
        spent = time.monotonic() - self.start
        rate = (done - self.spent_before) / spent
        eta = f"ETA {_minutes((total - done) / rate)}" if rate > 0 else ""
        counts = f"{len(self.known)}/{len(self.cells)} cells"
        running = [i for pid in self.processes for i in attempts.held_by(self.workdir, pid)]
        self.bar.update(self.task, completed=done, counts=counts, now=f"{', '.join(running)} {eta}")
        is_due = time.monotonic() - self.last_line > LINE_SECONDS
        if not self.console.is_terminal and is_due:
            self.last_line = time.monotonic()
            log.info("%s  %.0f%% of the FLOPs  now %s  %s", counts, 100 * done / total,
                     ", ".join(running) or "none", eta)  # fmt: skip

    def _report(self) -> int:
        ended = [attempts.last(self.workdir, cell.id) for cell in self.cells]
        counts = {s: sum(e is not None and e["status"] == s for e in ended)
                  for s in attempts.STATUSES}  # fmt: skip
        left = sum(e is None for e in ended)
        words = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        minutes = _minutes(time.monotonic() - self.start)
        log.info("%s%s in %s", words or "none", f", {left} to be finished" if left else "", minutes)
        for cell, found in zip(self.cells, ended, strict=True):
            if found is not None and found["status"] != "done":
                log.warning("  %s %s: %s", cell.id, found["status"], found["reason"])
        if left:
            log.info("stopped (%s); the same command goes on", self.stopped_by)
            return PREEMPTED
        return 1 if counts["failed"] else 0


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _describe(found: dict[str, Any]) -> str:
    if found["status"] != "done":
        return f"{found['status']}: {found['reason']}"
    metrics = {k: v for k, v in found["metrics"].items() if k.startswith("eval/")}
    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.endswith("/examples"))
    return f"done in {_minutes(found['wall_seconds'] or 0)}  {shown}"
