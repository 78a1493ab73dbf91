"""TPU slices as Google sells them: what a topology is called, and how many hosts it has."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from vitjax.errors import InputError, suggest

if TYPE_CHECKING:
    from vitjax.planning.targets import Target

# By the names of `vitjax plan`: what GKE's nodes are labelled with.
GKE = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# The type of a TPU VM, what its number counts for each chip, and its system image.
VM = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
SINGLE_HOST = {"v5e": (1, 4, 8), "v6e": (1, 4, 8)}  # chips; more are on hosts of four


@dataclasses.dataclass(frozen=True)
class Slices:
    """One or several slices of the same shape.

    Attributes:
      hosts: of one slice, with `chips` each.
      devices: of all slices, as JAX counts them.
    """

    kind: str
    topology: str
    slices: int
    hosts: int
    chips: int
    devices: int

    @property
    def vm_type(self) -> str:
        """The accelerator type of a TPU VM.

        Raises:
          InputError: this kind is there on Kubernetes alone.
        """
        if self.kind not in VM:
            raise InputError(
                f"--tpu={self.kind}: there are no TPU VMs of it, only nodes of Kubernetes "
                f"(vitjax launch k8s); {suggest(self.kind, VM)}"
            )
        name, per_chip, _ = VM[self.kind]
        return f"{name}-{self.hosts * self.chips * per_chip}"


def parse(text: str) -> Slices:
    """Reads "v5e:4x4" or "v5p:4x4x8:2".

    Raises:
      InputError: an unknown kind or topology; names those that there are.
    """
    from vitjax.planning import targets  # imports JAX

    try:
        found: Target = targets.parse_target(f"tpu:{text}")
    except InputError as error:
        raise InputError(f"--tpu={text}: {error}") from error
    chips = math.prod(found.topology)
    per_host = chips if chips in SINGLE_HOST.get(found.kind, (1, 4)) else 4
    return Slices(
        kind=found.kind,
        topology="x".join(map(str, found.topology)),
        slices=found.slices,
        hosts=chips // per_host,
        chips=per_host,
        devices=found.num_devices,
    )
