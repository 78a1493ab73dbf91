"""What a config's model leaves open, decided for the devices of a run and said in its log.

`model.scan=None`, `model.remat="auto"` and `model.attention="auto"` mean: what is best here. None
of them changes what is computed, only how fast and in how much memory.
"""

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vitjax.config import Config
from vitjax.models import attention
from vitjax.models.functional import Model
from vitjax.parallel import TENSOR, batch_shards
from vitjax.precision import Precision
from vitjax.processes import Messages

# Unrolled layers are faster on CPUs and GPUs and need no copies of what a scan keeps, but each
# takes its own time to compile. On TPUs a scan costs next to nothing.
MOST_UNROLLED = {"cpu": 24, "gpu": 32, "tpu": 0}
# Of a device's memory, what an estimate may fill: it is right to about a tenth.
FILLED = 0.9
# The largest error of a kernel over the largest value, where products are in bfloat16.
ALLOWED_ERROR = 0.03
_MESSAGES = Messages("attention")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of the config, and why it was taken."""

    value: Any
    reason: str


def scan(depth: int, platform: str) -> Choice:
    """Whether the blocks are scanned."""
    most = MOST_UNROLLED.get(platform, 0)
    if depth <= most:
        return Choice(False, f"{depth} blocks unrolled")
    return Choice(True, f"{depth} blocks scanned")


def remat(memory: Callable[[str], float], available: float | None) -> Choice:
    """The least recomputation whose memory is there.

    Args:
      memory: bytes a device with a policy, by estimate.
      available: bytes of a device; None where nobody knows.
    """
    if available is None:
        return Choice("none", "no recomputation")
    needs: dict[str, float] = {}
    for policy in ("none", "dots", "full"):
        needs[policy] = memory(policy)
        if needs[policy] <= FILLED * available:
            break
    policy = min(needs, key=lambda p: needs[p])
    sizes = ", ".join(f"{p} {n / 2**30:.1f}" for p, n in needs.items())
    reason = f"recomputation {policy} (GiB by estimate: {sizes}; of {available / 2**30:.1f})"
    return Choice(policy, reason)


def attention_kernel(
    mesh: Mesh, precision: Precision, rows: int, num_tokens: int, num_heads: int, head_dim: int
) -> Choice:
    """The fastest kernel of attention that works on these devices, measured on one of them.

    The first process decides for all. For devices that are only described it is cuDNN's on GPUs,
    where that takes the type, and XLA's elsewhere.

    Args:
      rows: images a device at once.
    """
    platform = mesh.devices.flat[0].platform
    names = attention.available(platform)
    if len(names) == 1 or precision.compute != "bfloat16":
        return Choice("xla", "attention xla")
    if not any(d in jax.local_devices() for d in mesh.devices.flat):
        takes = head_dim % 8 == 0 and head_dim <= 128
        name = "cudnn" if "cudnn" in names and takes else "xla"
        return Choice(name, f"attention {name} (not measured)")
    shape = max(1, min(128, rows)), max(1, num_heads // mesh.shape[TENSOR]), num_tokens, head_dim
    chosen = fastest({name: measure(name, shape) for name in names})
    return Choice(*_MESSAGES.from_first([chosen.value, chosen.reason]))


def fastest(measured: dict[str, float | str]) -> Choice:
    """Of kernels with their milliseconds, or with what is wrong with them."""
    times = {name: x for name, x in measured.items() if isinstance(x, float)}
    name = min(times, key=lambda n: times[n]) if times else "xla"
    said = [f"{n} {x:.3g} ms" if isinstance(x, float) else f"{n}: {x}" for n, x in measured.items()]
    return Choice(name, f"attention {name} ({'; '.join(said)})")


@functools.cache
def measure(name: str, shape: tuple[int, int, int, int], repeats: int = 5) -> float | str:
    """Milliseconds of a kernel forward and backward, or what is wrong with it.

    Args:
      shape: of query, key and value in bfloat16, [B, H, N, K].
    """
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, grad = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys]

    def run(kernel, grad, *inputs):
        mixed, backward = jax.vjp(lambda *x: kernel(*x, False), *inputs)
        return mixed, *backward(grad)

    seconds = []
    try:
        call = jax.jit(functools.partial(run, attention.KERNELS[name]))
        found = jax.block_until_ready(call(grad, *inputs))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(call(grad, *inputs))
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # a kernel that does not work is not taken, whatever the cause
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    wide = [x.astype(jnp.float32) for x in (grad, *inputs)]
    right = jax.jit(functools.partial(run, attention.KERNELS["xla"]))(*wide)
    for a, b in zip(found, right, strict=True):
        error = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        if not error < ALLOWED_ERROR:  # NaN too
            return f"wrong by {error:.2g}"
    return statistics.median(seconds) * 1e3


def device_memory(mesh: Mesh) -> float | None:
    """Bytes that a program may use on one device; None where that is not known (CPUs)."""
    from vitjax.planning import targets

    device = mesh.devices.flat[0]
    chip = targets.of_devices(mesh.devices.ravel().tolist()).chip
    if chip is not None or device not in jax.local_devices():
        return None if chip is None else chip.memory
    return (device.memory_stats() or {}).get("bytes_limit")


def decide(
    config: Config, mesh: Mesh, precision: Precision, model: Model, build: Callable[[Config], Any]
) -> dict[str, Choice]:
    """What is left open in `config.model`, by key.

    Args:
      model: as the config describes it, whatever is left open.
      build: makes an experiment of a config, for these devices.
    """
    block, facts = config.model, dict(model.description)
    open_keys = [
        key
        for key, is_open in (("scan", None), ("attention", "auto"), ("remat", "auto"))
        if key in block and block[key] == is_open
    ]
    decided: dict[str, Choice] = {}
    if "scan" in open_keys:
        decided["scan"] = scan(facts["depth"], mesh.devices.flat[0].platform)
    if "attention" in open_keys:
        rows = config.batch_size // batch_shards(mesh) // config.optimizer.accumulation_steps
        head_dim = facts["width"] // facts["num_heads"]
        sizes = facts["num_tokens"], facts["num_heads"], head_dim
        decided["attention"] = attention_kernel(mesh, precision, rows, *sizes)
    if "remat" in open_keys:
        from vitjax.planning import estimate  # which knows experiments

        def memory(policy: str) -> float:
            values = {key: choice.value for key, choice in decided.items()} | {"remat": policy}
            return sum(estimate.memory_bytes(build(with_model(config, values))).values())

        decided["remat"] = remat(memory, device_memory(mesh))
    return decided


def with_model(config: Config, values: dict[str, Any]) -> Config:
    """A copy of the config with some keys of its model set."""
    config = copy.deepcopy(config)
    with config.unlocked(), config.ignore_type():
        config.model.update(values)
    return config
