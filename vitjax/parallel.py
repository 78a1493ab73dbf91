"""The device mesh, the one table of sharding rules, and the precision policy.

No other file names a mesh axis. The axes:
  replica: copies of the parameters (across slices or nodes); the batch is split over it.
  fsdp: parameters and optimizer state are split over it, and so is the batch.
  tensor: heads and MLP width are split over it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vitjax.errors import InputError, suggest

PyTree = Any
AXES = ("replica", "fsdp", "tensor")
DATA_AXES = ("replica", "fsdp")
DTYPES = ("float32", "bfloat16")

# Tensor parallelism is named for the Transformer block only: the axes of each dimension after the
# leading layer dimension. Everything else is left to FSDP, which takes the largest free dimension.
TENSOR_RULES = {
    "blocks/attention/qkv/kernel": (None, None, "tensor", None),  # [D, 3, H, K]
    "blocks/attention/qkv/bias": (None, "tensor", None),  # [3, H, K]
    "blocks/attention/out/kernel": ("tensor", None, None),  # [H, K, D]
    "blocks/mlp/up/kernel": (None, "tensor"),  # [D, F]
    "blocks/mlp/up/bias": ("tensor",),  # [F]
    "blocks/mlp/down/kernel": ("tensor", None),  # [F, D]
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which type is used where: parameters and optimizer state, and matrix products.

    Norms, softmax and losses are always float32.
    """

    params: str = "float32"
    compute: str = "float32"

    def compute_cast(self, x: Array) -> Array:
        """To the type of matrix products."""
        return x.astype(self.compute)

    def full_cast(self, x: Array) -> Array:
        """To float32."""
        return x.astype(jnp.float32)


def make_precision(params: str = "float32", compute: str = "auto") -> Precision:
    """The policy; `compute="auto"` is bfloat16 on accelerators and float32 on CPUs."""
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for name, value in (("params", params), ("compute", compute)):
        if value not in DTYPES:
            raise InputError(f"unknown precision.{name} {value!r}; {suggest(value, DTYPES)}")
    return Precision(params, compute)


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      sizes: devices along "replica", "fsdp" and "tensor"; one of them may be -1: the rest.

    Raises:
      InputError: unknown axes, more than one -1, or a product that is not the device count.
    """
    devices = jax.devices() if devices is None else devices
    for name in sizes:
        if name not in AXES:
            raise InputError(f"unknown mesh axis {name!r}; {suggest(name, AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    written = dict(zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise InputError(f"mesh {written}: each size must be positive, and at most one may be -1")
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise InputError(
            f"mesh {written} does not fit {len(devices)} devices; "
            f"set one axis to -1, or make the product {len(devices)}"
        )
    return jax.make_mesh(
        tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES)
    )


def steps_ahead(mesh: Mesh) -> int:
    """How many computations may be sent off before the oldest is waited for.

    Two keep an accelerator busy and bound the memory of waiting batches. Virtual CPU devices get
    none: their collectives share one pool of threads, and two at once can wait for each other
    until XLA aborts the process.
    """
    is_virtual = mesh.devices.flat[0].platform == "cpu" and mesh.size > 1
    return 0 if is_virtual else 2


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension over the data axes."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple) -> str:
    """A tree path as "blocks/attention/qkv/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf of a train state, or of parameters, by the table above.

    Optimizer slots end in the path of their parameter and have its shape, so one table serves
    both; slots of another rank (factored moments) are left to FSDP.

    Raises:
      InputError: the tensor axis does not divide the heads or the MLP width, or nothing in the
        model can be split over it.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    matched = []

    def leaf(path, x):
        name, shape = path_name(path), x.shape
        axes: list[str | None] = [None] * len(shape)
        is_stacked = "blocks" in name.split("/") and len(shape) > 1
        for suffix, rule in TENSOR_RULES.items() if tensor > 1 else ():
            if name.endswith(suffix) and len(shape) == 1 + len(rule):
                axes = [None, *rule]
                matched.append(suffix)
        for dim, axis in enumerate(axes):
            if axis == "tensor" and shape[dim] % tensor:
                raise InputError(
                    f"mesh.tensor={tensor} does not divide dimension {dim} of {name} {shape} "
                    "(the heads or the MLP width)"
                )
        free = [
            d for d in range(is_stacked, len(shape)) if axes[d] is None and shape[d] % fsdp == 0
        ]
        if fsdp > 1 and free:
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map_with_path(leaf, tree)
    if tensor > 1 and not matched:
        raise InputError(
            f"mesh.tensor={tensor}, but no parameter of this model can be split over it"
        )
    return shardings


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This process's rows of a batch, placed as its part of the global array."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(tree: PyTree) -> PyTree:
    """Replicated device values as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)
