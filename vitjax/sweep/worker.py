"""One process that trains cells, one after the other."""

import ctypes
import logging
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from vitjax.errors import DamagedCheckpointError, InputError, NonFiniteError, Preempted
from vitjax.sweep import attempts
from vitjax.sweep.cells import Cell, branch_steps, training_config
from vitjax.sweep.fork import fork, has_step
from vitjax.sweep.plan import Plan
from vitjax.train import train

log = logging.getLogger("vitjax")
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def prepare(cores: list[int], cache: Path) -> None:
    """Binds this process to its share of the cores, and keeps compiled programs for the others.

    Must come before JAX starts. On Linux the process is told to end when its parent dies.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def in_order(plan: Plan, cells: list[Cell]) -> list[Cell]:
    """Longest trunks first, so that no worker ends alone with one; each before its branches."""
    cost = {c.id: c.flops for c in plan.cells}
    return sorted(cells, key=lambda c: (-cost[c.trunk], c.trunk, c.is_branch, -c.flops))


def blocked(workdir: Path, cell: Cell) -> str | None:
    """Why a branch cannot start yet: "waits", or the reason that it never will. None: it can."""
    if not cell.is_branch or attempts.run_folder(workdir, cell.id).exists():
        return None
    if has_step(attempts.run_folder(workdir, cell.trunk), cell.branch_step):
        return None
    ended = attempts.last(workdir, cell.trunk)
    if ended is None:
        return "waits"
    how = ": ".join(word for word in (ended["status"], ended["reason"]) if word)
    return f"its trunk {cell.trunk} ended without a checkpoint of step {cell.branch_step} ({how})"


def train_cell(workdir: Path, plan: Plan, cell: Cell) -> None:
    """Trains one cell to its end and records how that was.

    Raises:
      Preempted: a signal came; the cell is saved and still to be finished.
    """
    run = attempts.run_folder(workdir, cell.id)
    config = training_config(plan.sweep, cell, branch_steps(list(plan.cells), cell))
    metrics: dict[str, Any] = {}
    try:
        if cell.is_branch:
            trunk = attempts.run_folder(workdir, cell.trunk)
            fork(trunk, cell.branch_step, run, config)
        metrics = train(config, run)
    except NonFiniteError as error:
        attempts.record(workdir, cell.id, "diverged", str(error))
        return
    except (InputError, DamagedCheckpointError) as error:
        attempts.record(workdir, cell.id, "failed", str(error))
        return
    except Preempted:
        raise
    except Exception as error:  # whatever it is, the other cells go on
        traceback.print_exc()
        attempts.record(workdir, cell.id, "failed", f"{type(error).__name__}: {error}")
        return
    numbers = {k: v for k, v in metrics.items() if k.startswith(("eval/", "train/"))}
    bad = [k for k, v in numbers.items() if k.endswith("/loss") and not _is_finite(v)]
    if bad:
        attempts.record(workdir, cell.id, "diverged", f"the last {bad[0]} is {numbers[bad[0]]}")
    else:
        attempts.record(workdir, cell.id, "done", metrics=numbers)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def work(workdir: Path, plan: Plan, cells: list[Cell]) -> None:
    """Trains the cells that nobody else trains, until all of them are finished.

    Raises:
      Preempted: a signal came.
    """
    ordered = in_order(plan, cells)
    while True:
        is_waiting, has_worked = False, False
        for cell in ordered:
            if attempts.last(workdir, cell.id) is not None:
                continue
            reason = blocked(workdir, cell)
            if reason == "waits":
                is_waiting = True
                continue
            with attempts.claim(workdir, cell.id) as is_mine:
                if not is_mine:
                    is_waiting = True
                    continue
                if attempts.last(workdir, cell.id) is not None:
                    continue
                if reason is not None:
                    attempts.record(workdir, cell.id, "failed", reason)
                else:
                    train_cell(workdir, plan, cell)
            has_worked = True
            break  # from the top: a branch may have become ready
        if not has_worked:
            if not is_waiting:
                return
            time.sleep(POLL_SECONDS)
