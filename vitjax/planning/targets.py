"""What a plan is made for: the chips, and how a name such as "tpu:v5e:16x16" becomes devices.

Nothing of this needs an accelerator: the vendors' compilers take a description of one.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vitjax.errors import InputError, suggest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them, from the vendor's data sheet where no note says otherwise.

    Attributes:
      peak_flops: dense bfloat16, FLOP/s.
      memory: bytes that a program may use; on TPUs what the compiler itself states.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s in one direction: of one torus link (TPU), or of a GPU's NVLink.
      network_bandwidth: bytes/s in one direction of one device's share of the network between
        slices (TPU) or hosts (GPU).
      host_devices: devices of one host.
      torus: dimensions of the interconnect; 0 for a switch.
      ring: an axis of the torus closes into a ring where its length is a multiple of this.
    """

    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_devices: int
    torus: int
    ring: int = 4


# Sources: Google Cloud's pages of each TPU generation, NVIDIA's data sheets of H100 and H200 SXM.
# ICI is stated there a chip, over all links and both ways; a link's one-way share stands here. The
# network between slices is the least sure number: a host's network card shared by its chips.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1.23e12, 50e9, 6.25e9, 4, 3),
    "v5e": Chip(197e12, 15.75 * GIB, 0.82e12, 50e9, 3.125e9, 8, 2, 16),
    "v5p": Chip(459e12, 95.74 * GIB, 2.765e12, 100e9, 6.25e9, 4, 3),
    "v6e": Chip(918e12, 31.25 * GIB, 1.64e12, 100e9, 12.5e9, 8, 2, 16),
    "tpu7x": Chip(1153.5e12, 94.75 * GIB, 3.69e12, 50e9, 6.25e9, 8, 3),  # two devices a chip
    "h100": Chip(989e12, 79.1 * GIB * 0.92, 3.35e12, 450e9, 50e9, 8, 0),  # 8% for CUDA and NCCL
    "h200": Chip(989e12, 140.4 * GIB * 0.92, 4.8e12, 450e9, 50e9, 8, 0),
}
TPUS = [name for name, chip in CHIPS.items() if chip.torus]
GPUS = [name for name, chip in CHIPS.items() if not chip.torus]
EXAMPLES = "tpu:v5e:16x16, tpu:v5p:4x4x8:2 (two slices), gpu:h100:1x32x8, cpu:256"

# The largest pod of each kind.
LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}

_GPU_TEXT = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{description}"
"""
_GPU_NAMES = {
    "h100": ("NVIDIA H100 80GB HBM3", 84929347584),
    "h200": ("NVIDIA H200", 150754820096),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A set of devices that need not be there.

    Attributes:
      name: as given.
      platform: "tpu", "gpu" or "cpu".
      kind: a key of CHIPS, or "cpu".
      topology: chips along each torus dimension, or (hosts, GPUs a host), or (devices,).
      slices: sets of devices with only the network between them.
    """

    name: str
    platform: str
    kind: str
    topology: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        """None for virtual CPU devices, of which no speed and no memory is known."""
        return CHIPS.get(self.kind)

    @property
    def num_devices(self) -> int:
        return self.slices * math.prod(self.topology) * (2 if self.kind == "tpu7x" else 1)


def parse_target(name: str) -> Target:
    """Reads a target's name.

    Raises:
      InputError: it is none; lists the close ones.
    """
    platform, *rest = name.split(":")
    if platform not in ("tpu", "gpu", "cpu"):
        close = suggest(platform, ("tpu", "gpu", "cpu"))
        raise InputError(f"unknown target {name!r}; {close}. Examples: {EXAMPLES}")

    def numbers(text: str, allowed: tuple[int, ...], form: str) -> tuple[int, ...]:
        parts = text.split("x")
        is_good = all(p.isdigit() and int(p) > 0 for p in parts) and len(parts) in allowed
        if not is_good:
            raise InputError(f"target {name!r}: {text!r} is not of the form {form}")
        return tuple(int(p) for p in parts)

    if platform == "cpu":
        if len(rest) != 1:
            raise InputError(f"target {name!r} is not of the form cpu:N")
        return Target(name, "cpu", "cpu", numbers(rest[0], (1,), "cpu:N"))
    kinds = TPUS if platform == "tpu" else GPUS
    if not rest or rest[0] not in kinds:
        given = rest[0] if rest else ""
        raise InputError(f"target {name!r}: unknown kind {given!r}; {suggest(given, kinds)}")
    kind = rest[0]
    if platform == "gpu":
        if len(rest) != 2:
            raise InputError(f"target {name!r} is not of the form gpu:KIND:SLICESxHOSTSxGPUS")
        slices, hosts, gpus = numbers(rest[1], (3,), "SLICESxHOSTSxGPUS, such as 1x32x8")
        return Target(name, "gpu", kind, (hosts, gpus), slices)
    dims = CHIPS[kind].torus
    form = "x".join("AB" if dims == 2 else "ABC")
    if len(rest) not in (2, 3):
        raise InputError(f"target {name!r} is not of the form tpu:{kind}:{form}[:SLICES]")
    topology = numbers(rest[1], (dims,), f"{form}, such as {'16x16' if dims == 2 else '4x4x8'}")
    slices = numbers(rest[2], (1,), "SLICES")[0] if len(rest) == 3 else 1
    _check_topology(name, kind, topology)
    return Target(name, "tpu", kind, topology, slices)


def _legal(kind: str, topology: tuple[int, ...]) -> bool:
    """Whether a slice of this shape is sold: one chip, part of a host, or whole cubes."""
    dims = CHIPS[kind].torus
    if math.prod(topology) > LARGEST[kind]:
        return False
    if dims == 2:
        return topology in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    small = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    return topology in small or all(n % 4 == 0 for n in topology)


def _check_topology(name: str, kind: str, topology: tuple[int, ...]) -> None:
    if _legal(kind, topology):
        return
    sides = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
    legal = [
        t for t in itertools.combinations_with_replacement(sides, len(topology)) if _legal(kind, t)
    ] + ([(2, 2, 1)] if len(topology) == 3 else [])
    wanted = math.prod(topology)
    legal.sort(key=lambda t: (abs(math.log(math.prod(t) / wanted)), np.ptp(t)))
    close = ", ".join("x".join(map(str, t)) for t in legal[:4])
    shown = "x".join(map(str, topology))
    raise InputError(f"target {name!r}: there is no {kind} slice {shown}; close ones: {close}")


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"planning for {what} needs its compiler: pip install 'vitjax[{extra}]' "
            "(or vitjax[plan] for TPUs and GPUs)"
        )


def prepare(target: Target) -> None:
    """Sets what must be set before JAX starts: no real accelerator is touched by a plan.

    Raises:
      InputError: the compiler for the target is not installed; names the extra.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if target.platform != "cpu":  # a program for devices that are not there cannot be read back
        jax.config.update("jax_enable_compilation_cache", False)
    if target.platform == "cpu":
        if target.num_devices > 1:
            jax.config.update("jax_num_cpu_devices", target.num_devices)
    elif target.platform == "tpu":
        _require("libtpu", "TPUs", "tpu")
        settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
                    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}  # fmt: skip
        for key, value in settings.items():
            os.environ.setdefault(key, value)
    else:
        _require("jax_cuda12_plugin", "GPUs", "cuda")
        flags = os.environ.get("XLA_FLAGS", "")
        _assume_cudnn()
        if "triton_gemm" not in flags:  # its tiling fails for some ViT-B shapes without a device
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()


def _assume_cudnn() -> None:
    """Lets JAX trace cuDNN's attention where neither cuDNN nor a GPU is: it asks for both, though
    the program only names the call."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: 91000
    fused.check_compute_capability = lambda capability: float(capability) <= 9.0
    fused.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"


def devices(target: Target) -> list[Any]:
    """Descriptions of the target's devices, for which programs can be compiled."""
    from jax.experimental import topologies

    if target.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.num_devices:
            raise InputError(
                f"target {target.name!r}: JAX has started with {len(found)} CPU devices"
            )
        return found[: target.num_devices]
    shape = "x".join(map(str, target.topology))
    if target.platform == "gpu":
        description, memory = _GPU_NAMES[target.kind]
        text = _GPU_TEXT.format(
            bandwidth=int(CHIPS[target.kind].memory_bandwidth),
            memory=memory,
            description=description,
        )
        topology = topologies.get_topology_desc(
            target.kind, "cuda", target_config=text, topology=f"{target.slices}x{shape}"
        )
        return list(topology.devices)
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.kind == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(target.topology) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{target.kind}:{shape}", **options
    )
    return list(topology.devices)


DEVICE_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


def of_devices(found: list[Any]) -> Target:
    """The target that devices at hand, or described ones, are."""
    kind = DEVICE_KINDS.get(found[0].device_kind)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in found})
    if kind is None:
        return Target(f"cpu:{len(found)}", "cpu", "cpu", (len(found),))
    if kind in GPUS:
        hosts = len({d.process_index for d in found}) // slices or 1
        shape = (hosts, len(found) // slices // hosts)
        return Target(f"gpu:{kind}", "gpu", kind, shape, slices)
    extents = np.asarray([d.coords for d in found]).max(0) + 1
    shape = tuple(int(n) for n in extents[: CHIPS[kind].torus])
    return Target(f"tpu:{kind}", "tpu", kind, shape, slices)


def axis_bandwidth(target: Target, mesh: Mesh, axes: tuple[str, ...]) -> tuple[float, float]:
    """Bytes/s that one device sends along some mesh axes: over fast links, and over the network.

    The second is infinite where the groups stay inside a slice (TPU) or a host (GPU). A ring over
    k torus dimensions uses k links, twice as many where the dimension closes into a ring. Groups
    over several hosts share all network cards of the hosts' members.

    Raises:
      ValueError: the target has no known links (virtual CPU devices).
    """
    chip = target.chip
    if chip is None:
        raise ValueError(f"{target.name} has no links")
    names = list(mesh.shape)
    index = tuple(slice(None) if name in axes else 0 for name in names)
    group = np.asarray(mesh.devices[index]).ravel().tolist()
    if target.platform == "gpu":
        hosts = {_host(d, target) for d in group}
        members = len(group) / len(hosts)
        network = chip.network_bandwidth * members if len(hosts) > 1 else math.inf
        return chip.link_bandwidth, network
    slices = {getattr(d, "slice_index", 0) or 0 for d in group}
    first = [d for d in group if (getattr(d, "slice_index", 0) or 0) == min(slices)]
    coords = np.asarray([d.coords for d in first])
    links = 0
    for dim, size in enumerate(target.topology):
        spanned = len(np.unique(coords[:, dim]))
        if spanned > 1:
            links += 2 if spanned == size and size % chip.ring == 0 else 1
    members = len(group) / len(slices)
    network = chip.network_bandwidth * members if len(slices) > 1 else math.inf
    return chip.link_bandwidth * max(links, 1), network


def _host(device: Any, target: Target) -> int:
    """Which host of the whole a described GPU is in; they are numbered host by host."""
    return device.id // target.topology[1]
