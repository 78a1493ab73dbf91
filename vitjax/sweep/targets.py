"""Memory and hours of every cell on devices that need not be there, as `vitjax plan` finds them."""

import dataclasses
from typing import Any

from vitjax import experiment
from vitjax.planning import estimate, targets
from vitjax.planning import plan as planning
from vitjax.sweep.cells import Cell, training_config
from vitjax.sweep.plan import Plan

GIB = 2**30


def _of_config(config: Any, target: targets.Target, devices: list[Any]) -> dict[str, Any]:
    """Bytes of a device, seconds of a step, whether it fits: by estimate, nothing compiled."""
    config = planning.for_target(config, target, devices)
    exp = experiment.build(config, devices=devices)
    memory = sum(estimate.memory_bytes(exp).values())
    if target.chip is None:
        return {"memory": memory, "seconds": None, "fits": None}
    line = estimate.roofline(exp, target, estimate.least_collectives(exp))
    return {"memory": memory, "seconds": line.slowest, "fits": memory <= target.chip.memory}


def _compiled(config: Any, target: targets.Target, devices: list[Any]) -> dict[str, Any]:
    """The same of the compiled program."""
    found = planning.make_plan(config, target, devices)
    seconds = None if found.roofline is None else found.roofline["slowest"]
    memory = found.memory["peak"] if found.fits is not None else float(sum(found.state.values()))
    return {"memory": memory, "seconds": seconds, "fits": found.fits}


def with_estimates(
    plan: Plan, target: targets.Target, devices: list[Any], *, compile_programs: bool = False
) -> Plan:
    """The plan with memory_gib, hours and fits of every cell.

    Hours are of the FLOPs that a cell pays: by the measured rate (budget.flops_per_second) where
    there is one, else by the roofline with nothing overlapped, the slow end of `vitjax plan`.

    Args:
      target, devices: of `vitjax.planning.targets`, prepared before JAX started.
      compile_programs: compile each distinct shape instead of estimating it.
    """
    rate = plan.sweep["budget"]["flops_per_second"]
    known: dict[tuple, dict[str, Any]] = {}
    cells = []
    for cell in plan.cells:
        key = (cell.width, cell.depth, cell.mlp_dim, cell.num_heads, cell.batch_size, cell.arm)
        if key not in known:
            config = training_config(plan.sweep, cell)
            measure = _compiled if compile_programs else _of_config
            known[key] = measure(config, target, devices)
        cells.append(_with(cell, known[key], rate))
    return dataclasses.replace(plan, cells=tuple(cells))


def _with(cell: Cell, found: dict[str, Any], rate: float | None) -> Cell:
    steps = cell.steps - cell.branch_step
    hours = None if found["seconds"] is None else steps * found["seconds"] / 3600
    if rate:
        hours = cell.flops_paid / rate / 3600
    memory = found["memory"] / GIB
    return dataclasses.replace(
        cell,
        memory_gib=float(f"{memory:.4g}"),
        hours=None if hours is None else float(f"{hours:.4g}"),
        fits=found["fits"],
    )
