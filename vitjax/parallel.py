"""The device mesh and the one table of sharding rules.

No other file names a mesh axis. The axes:
  replica: copies of the parameters (across slices or nodes); the batch is split over it.
  fsdp: parameters and optimizer state are split over it, and so is the batch.
  tensor: heads and MLP width are split over it.
"""

import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vitjax.errors import InputError, suggest

PyTree = Any
AXES = REPLICA, FSDP, TENSOR = ("replica", "fsdp", "tensor")
DATA_AXES = ("replica", "fsdp")

# Tensor parallelism is named for the Transformer block and the attention pool: the axes of each
# dimension of a layer's parameter. Everything else is left to FSDP, which takes the largest
# dimension that it divides, over both axes where it can.
TENSOR_RULES = {
    "attention/qkv/kernel": (None, None, "tensor", None),  # [D, 3, H, K]
    "attention/qkv/bias": (None, "tensor", None),  # [3, H, K]
    "attention/qv_bias": (None, "tensor", None),  # [2, H, K]
    "attention/out/kernel": ("tensor", None, None),  # [H, K, D]
    "pool/query/kernel": (None, "tensor", None),  # [D, H, K]
    "pool/query/bias": ("tensor", None),  # [H, K]
    "pool/key_value/kernel": (None, None, "tensor", None),  # [D, 2, H, K]
    "pool/key_value/bias": (None, "tensor", None),  # [2, H, K]
    "pool/out/kernel": ("tensor", None, None),  # [H, K, D]
    "mlp/up/kernel": (None, "tensor"),  # [D, F]
    "mlp/up/bias": ("tensor",),  # [F]
    "mlp/gate_up/kernel": (None, None, "tensor"),  # [D, 2, F]
    "mlp/gate_up/bias": (None, "tensor"),  # [2, F]
    "mlp/down/kernel": ("tensor", None),  # [F, D]
}

# What the letters of an activation's dimensions mean on the mesh; the others are whole.
ACTIVATION_RULES = {"B": DATA_AXES, "H": "tensor", "F": "tensor"}


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
    return Mesh(_arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_mesh() -> Mesh:
    """A mesh of all devices, each with a part of the batch and parameters split over all."""
    return make_mesh({"fsdp": -1})


def _arrange(shape: list[int], devices: list) -> np.ndarray:
    """Devices in the mesh's shape, neighbours on the interconnect along the last axes.

    Slices have only a slow network between them: the replica axis runs over it, so that nothing
    but the sum of gradients does.
    """
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise InputError(
            f"mesh.replica={shape[0]} is not a multiple of the {slices} slices; "
            "fsdp and tensor must stay inside a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
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


def _tensor_axes(name: str, shape: tuple[int, ...], tensor: int) -> list[str | None] | None:
    """The axes that the table names for a parameter, or None."""
    for suffix, rule in TENSOR_RULES.items():
        if not f"/{name}".endswith(f"/{suffix}"):
            continue
        axes: list[str | None] = [None] * (len(shape) - len(rule))
        axes += rule
        for dim, axis in enumerate(axes):
            if axis == "tensor" and shape[dim] % tensor:
                raise InputError(
                    f"mesh.tensor={tensor} does not divide dimension {dim} of {name} {shape} "
                    "(the heads or the MLP width)"
                )
        return axes
    return None


def _spread(
    rule: list[str | None] | None, shape: tuple[int, ...], mesh: Mesh, is_stacked: bool
) -> PartitionSpec:
    """Adds FSDP: the largest free dimension that divides; without a rule over both axes."""
    axes: list[Any] = list(rule or [None] * len(shape))
    choices = [("fsdp",)] if rule else [("fsdp", "tensor"), ("fsdp",), ("tensor",)]
    for names in choices:
        parts = math.prod(mesh.shape[name] for name in names)
        free = [
            d for d in range(is_stacked, len(shape)) if axes[d] is None and shape[d] % parts == 0
        ]
        if parts > 1 and free:
            axes[max(free, key=lambda d: shape[d])] = tuple(n for n in names if mesh.shape[n] > 1)
            break
    return PartitionSpec(*axes)


def tree_shardings(tree: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf of a train state, by the table above.

    Args:
      tree: a train state, or any tree with parameters or optimizer slots in it.
      params: the parameters or their shapes. A leaf of the tree whose path ends in the path of a
        parameter, with the same shape, is sharded like it; others (factored moments) are left to
        FSDP.

    Raises:
      InputError: the tensor axis does not divide the heads or the MLP width, or nothing in the
        model can be split over it.
    """
    tensor, known = mesh.shape["tensor"], {}
    for path, parameter in jax.tree.leaves_with_path(params):
        name, shape = path_name(path), parameter.shape
        known[name] = shape, _tensor_axes(name, shape, tensor) if tensor > 1 else None
    if tensor > 1 and not any(axes for _, axes in known.values()):
        raise InputError(
            f"mesh.tensor={tensor}, but no parameter of this model can be split over it"
        )

    def leaf(path, x):
        parts = path_name(path).split("/")
        axes = None
        for start in range(len(parts)):
            shape, found = known.get("/".join(parts[start:]), (None, None))
            if shape == x.shape:
                axes = found
                break
        is_stacked = "blocks" in parts and len(x.shape) > 1
        return NamedSharding(mesh, _spread(axes, x.shape, mesh, is_stacked))

    return jax.tree.map_with_path(leaf, tree)


def on_host(tree: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """The shardings with the larger arrays in the memory of the devices' hosts.

    Raises:
      InputError: the devices have no such memory beside their own.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        raise InputError("optimizer.offload=True needs an accelerator; CPUs have one memory")

    def leaf(x, sharding):
        return sharding.with_memory_kind("pinned_host") if len(x.shape) else sharding

    return jax.tree.map(leaf, tree, shardings)


def fetching(optimizer: Any, on_device: PyTree, on_host: PyTree) -> Any:
    """The optimizer with its state brought to the devices for the update, and back."""

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, jax.device_put(state, on_device), params)
        return updates, jax.device_put(state, on_host)

    return optimizer._replace(update=update)


def parameter_axes(
    name: str, shape: tuple[int, ...], sharding: NamedSharding, mesh: Mesh
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes over which a parameter stays split while it is used, and those over which it
    is gathered first."""
    used: list[str] = []
    for entry in sharding.spec:
        used += [entry] if isinstance(entry, str) else list(entry or ())
    tensor = mesh.shape["tensor"]
    rule = _tensor_axes(name, shape, tensor) if tensor > 1 else None
    kept = ("tensor",) if rule and "tensor" in rule else ()
    return kept, tuple(axis for axis in AXES if axis in used and axis not in kept)


_active: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced so that `constrain` inside it means this mesh."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        token = _active.set(mesh)
        try:
            return function(*args, **kwargs)
        finally:
            _active.reset(token)

    return wrapped


def platform() -> str:
    """The platform that is traced for: that of the mesh, which may be another than JAX's own."""
    mesh = _active.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def splits_layers() -> bool:
    """Whether heads and MLP may be split over devices in what is traced."""
    mesh = _active.get()
    return mesh is None or mesh.shape[TENSOR] > 1


def constrain(x: Array, dims: str) -> Array:
    """States how an activation lies on the mesh and in memory, so that no compiler need guess.

    Args:
      x: any activation.
      dims: a letter for each dimension, such as "B N D"; see ACTIVATION_RULES.

    Outside of `on_mesh`, and on one device that is no GPU, it does nothing.
    """
    mesh = _active.get()
    if mesh is None:
        return x
    if mesh.size > 1:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(x.shape, dims, mesh)))
    if platform() == "gpu" and dims.startswith("B N"):
        x = _row_by_row(x, dims)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _row_by_row(x: Array, dims: str) -> Array:
    """The last dimension's neighbours are neighbours in memory, in the gradient as well.

    Left to itself XLA lays tokens out with the batch last, and transposes in each block. It is said
    on each device's part, as XLA would gather the whole array for it; and the gradient has its
    own, as that of `shard_map` sums over the axes that its specs do not name.
    """
    return on_each_device(_row_major, dims, x)


def _row_by_row_forward(x: Array, dims: str) -> tuple[Array, None]:
    return _row_by_row(x, dims), None


def _row_by_row_backward(dims: str, _: None, grad: Array) -> tuple[Array]:
    return (on_each_device(_row_major, dims, grad),)


_row_by_row.defvjp(_row_by_row_forward, _row_by_row_backward)


def _spec(shape: tuple[int, ...], dims: str, mesh: Mesh) -> PartitionSpec:
    spec = []
    for size, letter in zip(shape, dims.split(), strict=True):
        axes = ACTIVATION_RULES.get(letter)
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        spec.append(axes if size % parts == 0 else None)
    return PartitionSpec(*spec)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def on_each_device(function: Callable, dims: str, *arrays: Array) -> Array:
    """Runs a function of arrays of one shape on each device's part of them, as `constrain` lays
    them: for what XLA cannot split. The result is of that shape too."""
    mesh = _active.get()
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    spec = _spec(arrays[0].shape, dims, mesh)
    specs = (spec,) * len(arrays)
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return run(*arrays)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in ascending order."""
    shards, me = batch_shards(mesh), jax.process_index()
    owners = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(shards, -1)
    mine = np.flatnonzero((owners == me).any(1))
    part = batch_size // shards
    return (mine[:, None] * part + np.arange(part)).ravel()


def to_global(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, Array]:
    """This process's rows of a batch (see `process_rows`), placed as its part of the whole."""
    sharding, rows = batch_sharding(mesh), process_rows(mesh, batch_size)

    def place(values):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return values[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: place(values) for name, values in batch.items()}


def to_host(tree: PyTree) -> PyTree:
    """Replicated device values as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)
