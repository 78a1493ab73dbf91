"""`vitjax plan`: proves a run before it is paid for, with no accelerator attached."""

import argparse
import dataclasses
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import jax

from vitjax import cli, experiment
from vitjax import config as config_lib
from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.planning import estimate, report, search, targets
from vitjax.planning.program import Collective, collectives
from vitjax.planning.targets import Target
from vitjax.progress import logging_to
from vitjax.state import tree_bytes
from vitjax.telemetry import write_whole

log = logging.getLogger("vitjax")
EXAMPLE = "vitjax plan --config=vit_22b --target=tpu:v5e:16x16 --config.batch_size=1024"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of a config on a target needs. Bytes are of one device, seconds of one step.

    Attributes:
      state: bytes by part; `state_total` is of all devices together.
      whole: bytes of parameters that no device can split, and the fsdp axis that could.
      memory: bytes that the compiled program holds at once, by part; of virtual CPU devices only
        the arguments mean anything.
      collectives: (kind, axes, bytes sent) of the compiled program; `least` the same of the
        sharding.
      available: bytes of device memory, None for CPUs. `fits` is None there too.
      roofline: seconds by resource; None for CPUs.
      advice: what would make it fit.
    """

    config: str
    target: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    num_params: int
    state: dict[str, int]
    state_total: int
    whole: tuple[int, int]
    memory: dict[str, float]
    available: float | None
    fits: bool | None
    collectives: list[tuple[str, str, float]]
    least: list[tuple[str, str, float]]
    flops: dict[str, float]
    roofline: dict[str, Any] | None
    run: dict[str, float] | None
    advice: list[str]
    compile_seconds: float

    @property
    def headroom(self) -> float | None:
        """The share of the memory that stays free; negative where the run does not fit."""
        return None if self.available is None else 1 - self.memory["peak"] / self.available


def for_target(config: Config, target: Target, devices: list[Any]) -> Config:
    """The config with what "auto" means on the target written out."""
    if config.precision.compute == "auto":
        compute = "float32" if target.platform == "cpu" else "bfloat16"
        config = search.changed(config, precision__compute=compute)
    if config.mesh == "auto":
        config = search.changed(config, mesh=search.choose_mesh(config, target, devices))
    return config


def _program_memory(compiled: Any) -> dict[str, float]:
    m = compiled.memory_analysis()
    parts = {
        "arguments": float(m.argument_size_in_bytes),
        "temporary": float(m.temp_size_in_bytes),
        "output": float(m.output_size_in_bytes - m.alias_size_in_bytes),
    }
    return parts | {"peak": sum(parts.values())}


def _does_not_fit(error: Exception) -> float | None:
    """The bytes of temporaries that a TPU compiler asked for in vain; None for other errors."""
    found = re.search(r"total memory required for .*?\(([\d.]+)([KMGT])\)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return float(found[1]) * UNITS[found[2]] if found else float("nan")


def _advice(exp: experiment.Experiment, target: Target, peak: float) -> list[str]:
    """Changes that would make a run fit: of recomputation, of mesh, of batch.

    They are estimated, and scaled by how far the estimate of this run is from its program.
    """
    chip, config = target.chip, exp.config
    assert chip is not None
    scale = max(1.0, peak / sum(estimate.memory_bytes(exp).values()))
    found = search.candidates(config, target, exp.mesh.devices.ravel().tolist())
    fitting = [c for c in found if c.memory * scale < chip.memory]
    here = {"mesh": dict(exp.mesh.shape), "remat": dict(exp.model.description)["remat"]}
    same = [c for c in fitting if c.batch_size == config.batch_size]
    smaller = [c for c in fitting if c.batch_size < config.batch_size]
    chosen = [c for c in same if c.mesh == here["mesh"]][:1] + same[:1] + smaller[:1]
    lines = []
    for c in chosen:
        words = [f"--config.batch_size={c.batch_size}"] * (c.batch_size != config.batch_size)
        words += [f"--config.mesh.{k}={v}" for k, v in c.mesh.items() if v != here["mesh"][k]]
        words += [f"--config.model.remat={c.remat}"] * (c.remat != here["remat"])
        lines += [" ".join(words)] * (" ".join(words) not in lines)
    return lines or ["no mesh, recomputation or batch of these devices: take more of them"]


def make_plan(
    config: Config,
    target: Target,
    devices: list[Any],
    *,
    name: str = "",
    price: float | None = None,
) -> Plan:
    """Compiles the config's training step for the target, and reads the program.

    Args:
      devices: from `targets.devices`.
      name: of the config, for the report.
      price: of one device for an hour.
    """
    config = for_target(config, target, devices)
    exp = experiment.build(config, devices=devices)
    state, chip = estimate.state_bytes(exp), target.chip
    least = estimate.least_collectives(exp)
    start = time.process_time()
    moved: list[Collective] = []
    try:
        compiled = exp.compile()
        memory = _program_memory(compiled)
        moved = collectives(compiled.as_text(), dict(exp.mesh.shape))
    except jax.errors.JaxRuntimeError as error:
        wanted = _does_not_fit(error)
        if wanted is None:
            raise
        arguments = float(sum(state.values()))
        memory = {"arguments": arguments, "temporary": wanted, "output": 0.0}
        memory["peak"] = arguments + wanted
    seconds = time.process_time() - start
    fits = None if chip is None else bool(memory["peak"] <= chip.memory)
    flops, line, run = estimate.flops(exp), None, None
    if chip is not None:
        found = estimate.roofline(exp, target, moved or least)
        line = dataclasses.asdict(found) | {
            "fastest": found.fastest, "slowest": found.slowest, "binds": found.binds
        }  # fmt: skip
        work = flops["model"] / exp.mesh.size / chip.peak_flops
        hours = config.total_steps * found.slowest / 3600
        run = {
            "images_per_second_low": config.batch_size / found.slowest,
            "images_per_second_high": config.batch_size / found.fastest,
            "mfu_low": work / found.slowest,
            "mfu_high": work / found.fastest,
            "hours_low": config.total_steps * found.fastest / 3600,
            "hours_high": hours,
            "device_hours_high": hours * exp.mesh.size,
        }
        if price is not None:
            run["cost_high"] = run["device_hours_high"] * price
    return Plan(
        config=name,
        target=target.name,
        num_devices=exp.mesh.size,
        mesh=dict(exp.mesh.shape),
        batch_size=config.batch_size,
        remat=dict(exp.model.description)["remat"],
        num_params=exp.model.num_params,
        state=state,
        state_total=tree_bytes(exp.abstract_state),
        whole=estimate.whole_bytes(exp),
        memory=memory,
        available=None if chip is None else chip.memory,
        fits=fits,
        collectives=list(estimate.by_kind_and_axis(moved)),
        least=list(estimate.by_kind_and_axis(least)),
        flops=flops,
        roofline=line,
        run=run,
        advice=_advice(exp, target, memory["peak"]) if fits is False else [],
        compile_seconds=seconds,
    )


def search_plans(
    config: Config, target: Target, devices: list[Any], *, name: str, compile_best: int
) -> list[Plan]:
    """Estimates every mesh, recomputation and batch; compiles the best; ranks those that fit."""
    if target.chip is None:
        raise InputError(f"--search needs a target with known speeds, not {target.name}")
    config = for_target(config, target, devices)
    found = search.candidates(config, target, devices)
    log.info("estimated %d ways to run it; compiling the best %d", len(found), compile_best)
    plans = []
    for c in found[:compile_best]:
        trial = search.changed(config, mesh=c.mesh, batch_size=c.batch_size, model__remat=c.remat)
        plans.append(make_plan(trial, target, devices, name=name))
        log.info("%s", report.one_line(plans[-1]))

    def order(plan: Plan) -> tuple[bool, float]:
        assert plan.run is not None
        return not plan.fits, -(plan.run["images_per_second_low"])

    return sorted(plans, key=order)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax plan", description=__doc__, epilog=f"example: {EXAMPLE}"
    )
    parser.add_argument("--config", required=True, help="a config file, or a shipped one's name")
    parser.add_argument("--target", required=True, help=f"such as {targets.EXAMPLES}")
    parser.add_argument("--search", action="store_true", help="try meshes, recomputation, batches")
    parser.add_argument("--best", type=int, default=4, help="how many a search compiles")
    parser.add_argument("--price", type=float, help="of one device for an hour")
    parser.add_argument(
        "--effort",
        choices=("low", "full"),
        default="low",
        help="of the compiler: low is quick; full overlaps and fuses as a real run",
    )
    parser.add_argument("--json", help="a file for all numbers")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override any key of the config")
    arguments, assignments = cli.parse(parser, argv)
    config = config_lib.override(config_lib.load_config(arguments.config), assignments)
    if arguments.price is not None and not arguments.price >= 0:
        raise InputError(f"--price must be 0 or more, got {arguments.price}")
    if arguments.best < 1:
        raise InputError(f"--best must be at least 1, got {arguments.best}")
    target = targets.parse_target(arguments.target)
    targets.prepare(target)
    if arguments.effort == "low":
        jax.config.update("jax_optimization_level", "O0")
    devices = targets.devices(target)
    with logging_to(None):
        if arguments.search:
            plans = search_plans(
                config, target, devices, name=arguments.config, compile_best=arguments.best
            )
            print(report.ranking(plans))
        else:
            plans = [make_plan(config, target, devices, name=arguments.config,
                               price=arguments.price)]  # fmt: skip
            print(report.table(plans[0]))
    if arguments.json:
        written = [dataclasses.asdict(plan) | {"headroom": plan.headroom} for plan in plans]
        content = written if arguments.search else written[0]
        write_whole(Path(arguments.json), json.dumps(content, indent=2) + "\n")
    return cli.DONE
