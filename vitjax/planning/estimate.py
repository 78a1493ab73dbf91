"""What a training step needs, counted from the config alone: FLOPs, bytes moved, bytes held.

Exact are the state, the FLOPs and the least traffic of a sharding. Activations are an estimate;
the compiled program has the last word on memory.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vitjax.errors import InputError
from vitjax.experiment import Experiment
from vitjax.parallel import FSDP, REPLICA, TENSOR, batch_shards, parameter_axes, path_name
from vitjax.planning.program import Collective
from vitjax.planning.targets import Target, axis_bandwidth

# What a well-tuned program reaches of a data sheet's numbers. The first two are measurements on
# one H100 (798 TFLOP/s of 989, 3.0 TB/s of 3.35); the third is an assumption.
REACHED_COMPUTE, REACHED_MEMORY, REACHED_NETWORK = 0.8, 0.9, 0.8


def _facts(exp: Experiment) -> dict[str, Any]:
    """The model's numbers.

    Raises:
      InputError: it is no Vision Transformer, of which alone memory and traffic are estimated.
    """
    facts = dict(exp.model.description)
    if "mlp_dim" not in facts:
        raise InputError(
            f"plans are made for Vision Transformers; model.target={exp.config.model.target!r} "
            "is none"
        )
    return facts


def _bytes_of(name: str) -> int:
    return jnp.dtype(name).itemsize


def state_bytes(exp: Experiment) -> dict[str, int]:
    """Bytes in a device's own memory by part: params, ema, optimizer, other."""

    def local(tree: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(
            math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
            for x, s in pairs
            if s.memory_kind != "pinned_host"
        )

    state, shardings = exp.abstract_state, exp.state_shardings
    parts = {
        "params": local(state.params, shardings.params),
        "ema": local(state.ema, shardings.ema),
        "optimizer": local(state.opt_state, shardings.opt_state),
    }
    return parts | {"other": local(state, shardings) - sum(parts.values())}


def whole_bytes(exp: Experiment) -> tuple[int, int]:
    """Bytes of parameters that every device holds whole, no dimension being divisible by the fsdp
    axis; and the largest smaller axis that would divide one dimension of each (0 if none are)."""
    fsdp, whole = exp.mesh.shape[FSDP], []
    leaves, specs = exp.abstract_state.params, exp.state_shardings.params
    for x, sharding in zip(jax.tree.leaves(leaves), jax.tree.leaves(specs), strict=True):
        is_large = x.size * x.dtype.itemsize > 2**20
        if fsdp > 1 and is_large and FSDP not in str(sharding.spec):
            whole.append(x)
    fitting = [
        n
        for n in range(1, fsdp)
        if fsdp % n == 0 and all(any(d % n == 0 for d in x.shape[1:]) for x in whole)
    ]
    return sum(x.size * x.dtype.itemsize for x in whole), max(fitting) if whole else 0


def flops(exp: Experiment) -> dict[str, float]:
    """FLOPs of a whole step (2 x MAC): the model's, and the hardware's with recomputation."""
    batch, facts = exp.config.batch_size, _facts(exp)
    model = float(exp.objective.flops_per_image) * batch
    forward = float(exp.model.flops_per_image) * batch
    tokens, width = facts["num_tokens"], facts["width"]
    again = {
        "none": 0.0,
        "dots": batch * facts["depth"] * 4.0 * tokens**2 * width,  # attention's two products
        "full": forward,
        "offload": forward,
    }[facts["remat"]]
    return {"model": model, "hardware": model + again}


def least_collectives(exp: Experiment) -> list[Collective]:
    """The collectives that this sharding cannot do without.

    FSDP gathers every parameter in the type of compute forward and again backward, and
    reduce-scatters its gradient; replicas all-reduce the part of the gradient that each holds; a
    Transformer block under tensor parallelism all-reduces its two outputs forward and its two
    inputs' gradients backward (one where attention and MLP share their input), and with full
    recomputation attention's output once more. Sums of metrics and norms are left out.

    Sources: Rajbhandari et al. 2020 (arXiv 1910.02054); Shoeybi et al. 2019 (arXiv 1909.08053).
    """
    mesh, facts, parts = (
        exp.mesh,
        _facts(exp),
        exp.config.optimizer.accumulation_steps,
    )
    wide, gradient = _bytes_of(exp.precision.compute), _bytes_of(exp.precision.gradients)
    found = []
    leaves = jax.tree.leaves_with_path(exp.abstract_state.params)
    specs = jax.tree.leaves(exp.state_shardings.params)
    for (path, leaf), sharding in zip(leaves, specs, strict=True):
        tensor_axes, spread = parameter_axes(path_name(path), leaf.shape, sharding, mesh)
        rows = leaf.size // math.prod(mesh.shape[a] for a in tensor_axes)
        size = math.prod(mesh.shape[a] for a in spread)
        if size > 1:
            found += [
                Collective("all-gather", spread, size, rows * wide, 2 * parts),
                Collective("reduce-scatter", spread, size, rows * gradient, parts),
            ]
        summed = tuple(a for a in (REPLICA, FSDP) if mesh.shape[a] > 1 and a not in spread)
        held = rows // size  # what one device keeps of the gradient
        size = math.prod(mesh.shape[a] for a in summed)
        if size > 1:
            found.append(Collective("all-reduce", summed, size, held * gradient, parts))
    tensor = mesh.shape[TENSOR]
    if tensor > 1:
        local = exp.config.batch_size // batch_shards(mesh)
        payload = local * facts["num_tokens"] * facts["width"] * wide
        times = 3 if facts["parallel"] else 4
        if facts["remat"] in ("full", "offload") and not facts["parallel"]:
            times += 1
        found.append(Collective("all-reduce", (TENSOR,), tensor, payload, times * facts["depth"]))
    return found


def activation_values(facts: dict[str, Any], tensor: int) -> tuple[float, float]:
    """Values a token that one layer keeps for its backward pass: with its policy, and with none."""
    d, f, n = facts["width"], facts["mlp_dim"], facts["num_tokens"]
    # Inputs of norms and products, in the type of compute; and where XLA's products compute
    # attention about three times its weights. Programs for an H100 and a v5p keep so much (LOG.md).
    weights = 3 * facts["num_heads"] * n if facts["attention"] == "xla" else 0
    wide = 3 * f if facts["mlp"] == "gated" else 2 * f
    everything = 4.6 * d + (4 * d + wide + weights) / tensor
    dots = 2 * d + (4 * d + f) / tensor
    return {"none": everything, "dots": dots, "full": d, "offload": 0.0}[facts["remat"]], everything


def memory_bytes(exp: Experiment) -> dict[str, float]:
    """Bytes a device, estimated without compiling: state, gradients, activations, work."""
    mesh, facts = exp.mesh, _facts(exp)
    wide, tensor = _bytes_of(exp.precision.compute), mesh.shape[TENSOR]
    images = exp.config.batch_size / batch_shards(mesh) / exp.config.optimizer.accumulation_steps
    kept, everything = activation_values(facts, tensor)
    tokens = images * facts["num_tokens"]
    state = state_bytes(exp)
    layer = exp.model.num_params / max(facts["depth"], 1) / tensor
    return {
        "state": float(sum(state.values())),
        "gradients": float(state["params"]),
        "activations": wide * tokens * kept * facts["depth"],
        "work": wide * (tokens * everything + 2 * layer) + 12.0 * images * facts["num_classes"],
    }


def traffic_bytes(exp: Experiment) -> float:
    """Bytes that one device's memory moves in a step, estimated.

    Each value that is kept is written and read about seven times over, gradients included, as the
    programs for an H100 do (`benchmarks/gpu_program.py`); the state is read and written once.
    """
    mesh, facts = exp.mesh, _facts(exp)
    wide, tensor = _bytes_of(exp.precision.compute), mesh.shape[TENSOR]
    tokens = exp.config.batch_size / batch_shards(mesh) * facts["num_tokens"]
    passes = 9 if facts["remat"] in ("full", "offload") else 7
    activations = passes * wide * tokens * activation_values(facts, tensor)[1] * facts["depth"]
    weights = 6 * wide * exp.model.num_params / tensor * exp.config.optimizer.accumulation_steps
    return activations + weights + 2 * sum(state_bytes(exp).values())


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource, at the fractions of the data sheet that are reached.

    Attributes:
      compute, memory, network: seconds, each by itself.
      fastest: all of them overlap; slowest: none do.
      binds: which is the longest.
    """

    compute: float
    memory: float
    network: float

    @property
    def fastest(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def slowest(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def binds(self) -> str:
        times = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(times, key=lambda name: times[name])


def network_seconds(target: Target, mesh: Any, moved: list[Collective]) -> float:
    """Seconds for some collectives one after the other."""
    total = 0.0
    for collective in moved:
        links, network = axis_bandwidth(target, mesh, collective.axes)
        total += max(collective.bytes_moved / links, collective.bytes_moved / network)
    return total / REACHED_NETWORK


def roofline(
    exp: Experiment, target: Target, moved: list[Collective], mesh: Any = None
) -> Roofline:
    """How long a step takes at best, given the collectives that it runs.

    `mesh` says where the target's devices lie, if the experiment's own mesh does not.
    """
    chip = target.chip
    assert chip is not None
    # Where compute is float32, matrix units are taken to give a quarter.
    peak = chip.peak_flops * (1.0 if exp.precision.compute == "bfloat16" else 0.25)
    return Roofline(
        flops(exp)["hardware"] / exp.mesh.size / peak / REACHED_COMPUTE,
        traffic_bytes(exp) / chip.memory_bandwidth / REACHED_MEMORY,
        network_seconds(target, exp.mesh if mesh is None else mesh, moved),
    )


def by_kind_and_axis(moved: list[Collective]) -> Iterator[tuple[str, str, float]]:
    """Bytes a device sends, summed over kind and axes, largest first."""
    totals: dict[tuple[str, str], float] = {}
    for c in moved:
        key = (c.kind, "+".join(c.axes))
        totals[key] = totals.get(key, 0.0) + c.bytes_moved
    for (kind, axes), total in sorted(totals.items(), key=lambda item: -item[1]):
        yield kind, axes, total
