"""Whether a config trains to the same bits twice: `vitjax train --check_determinism`."""

import dataclasses
import logging
from typing import Any

import jax

from vitjax import experiment, parallel, warm_start
from vitjax.checkpoints.store import parts_of
from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.fingerprint import fingerprint
from vitjax.progress import logging_to

log = logging.getLogger("vitjax")
FLAG = "XLA_FLAGS=--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first step at which two runs differ, and the arrays that do."""

    step: int
    arrays: tuple[str, ...]


def _steps(config: Config, count: int) -> list[dict[str, str]]:
    """Fingerprints of the state and the metrics after each step of a run from its start."""
    exp = experiment.build(config)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    train_step, state = exp.compile(), warm_start.first_state(exp)
    rows = parallel.process_rows(exp.mesh, config.batch_size)
    found = []
    for step in range(count):
        host_batch = loader.train_batch(step, config.batch_size, config.seed, rows)
        batch = parallel.to_global(host_batch, exp.mesh, config.batch_size)
        state, metrics = train_step(state, batch)
        tree: Any = parts_of(state) | {"metrics": metrics}
        found.append(fingerprint(tree))
    loader.close()
    return found


def compare(config: Config, count: int) -> Difference | None:
    """Runs the first steps of a config twice, each compiled anew; None if every bit is the same.

    Raises:
      InputError: fewer than one step.
    """
    if count < 1:
        raise InputError(f"--check_determinism must be 1 step or more, got {count}")
    first, second = _steps(config, count), _steps(config, count)
    for step, (a, b) in enumerate(zip(first, second, strict=True), 1):
        if differing := tuple(name for name in a if a[name] != b[name]):
            return Difference(step, differing)
    return None


def report(config: Config, count: int) -> int:
    """Says whether two runs have the same bits; returns the exit status, 0 or 1."""
    with logging_to(None, jax.process_index()):
        found = compare(config, count)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if found is None:
            log.info("two runs of %d steps on %s have the same bits", count, devices)
            return 0
        hint = f"; set {FLAG}" if jax.default_backend() == "gpu" else ""
        log.error(
            "two runs on %s differ from step %d on, in %d arrays, first %s%s",
            devices, found.step, len(found.arrays), found.arrays[0], hint,
        )  # fmt: skip
        return 1
