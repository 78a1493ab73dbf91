"""Which mesh, recomputation and batch to use: all are estimated, the best are compiled."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from vitjax import config as config_lib
from vitjax import experiment
from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.parallel import FSDP, REPLICA, TENSOR
from vitjax.planning import estimate
from vitjax.planning.targets import Target

BATCH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config, as estimated."""

    mesh: dict[str, int]
    remat: str
    batch_size: int
    memory: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(num_devices: int, slices: int, max_tensor: int) -> Iterator[dict[str, int]]:
    """Meshes worth trying: tensor inside a host or so, replicas over slices or whole powers."""
    for tensor in divisors(num_devices):
        if tensor > max_tensor:
            continue
        for replica in divisors(num_devices // tensor):
            if replica % slices and slices > 1:
                continue
            yield {
                REPLICA: replica,
                FSDP: num_devices // tensor // replica,
                TENSOR: tensor,
            }


def changed(config: Config, **values: Any) -> Config:
    """A copy of a config with some dotted keys (written with __) set."""
    config = copy.deepcopy(config)
    mesh = values.pop("mesh", None)
    if mesh is not None:
        with config.unlocked(), config.ignore_type():
            config.mesh = mesh
    return config_lib.override(config, [f"{k.replace('__', '.')}={v!r}" for k, v in values.items()])


def candidates(
    config: Config,
    target: Target,
    devices: list[Any],
    *,
    remats: tuple[str, ...] = REMAT,
    factors: tuple[float, ...] = BATCH_FACTORS,
) -> list[Candidate]:
    """Every legal combination with its estimates, those that fit first, then by images/s.

    Raises:
      InputError: nothing is legal; says why the last one was not.
    """
    chip, found, reason = target.chip, [], ""
    assert chip is not None
    host = target.topology[1] if target.platform == "gpu" else 8
    kernel = {}
    if config.model.get("attention") == "auto":  # not to be measured for each candidate
        kernel = {"model__attention": "cudnn" if target.platform == "gpu" else "xla"}
    for mesh in meshes(len(devices), target.slices, host):
        for factor in factors:
            batch = int(config.batch_size * factor)
            for remat in remats:
                try:
                    trial = changed(
                        config, mesh=mesh, batch_size=batch, model__remat=remat, **kernel
                    )
                    exp = experiment.build(trial, devices=devices)
                except InputError as error:
                    reason = str(error)
                    break
                moved = estimate.least_collectives(exp)
                line = estimate.roofline(exp, target, moved)
                seconds = (line.fastest + line.slowest) / 2
                memory = sum(estimate.memory_bytes(exp).values())
                policy = dict(exp.model.description)["remat"]
                found.append(Candidate(mesh, policy, batch, memory, seconds))
    if not found:
        raise InputError(f"no mesh of {len(devices)} devices works for this config: {reason}")
    return sorted(found, key=lambda c: (c.memory > chip.memory, -c.images_per_second))


def choose_mesh(config: Config, target: Target, devices: list[Any]) -> dict[str, int]:
    """The mesh for `config.mesh="auto"`: the fastest by estimate of those that fit, at the config's
    own batch and recomputation. Every process comes to the same answer."""
    if target.chip is None:
        return {REPLICA: 1, FSDP: len(devices), TENSOR: 1}
    remats = (config.model.get("remat", "none"),)
    return candidates(config, target, devices, remats=remats, factors=(1.0,))[0].mesh
