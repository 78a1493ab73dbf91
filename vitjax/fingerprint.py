"""A fingerprint of each array, computed where the array lies.

Two values swapped, or one bit flipped, change it; sharding does not. Storage formats in use today
give back flipped bits without an error, so every checkpoint carries these and every load checks
them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from vitjax.parallel import path_name

PyTree = Any
ROW = 512


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: Array) -> Array:
    """The values as unsigned numbers of the same width."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _part(x: Array, start: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The sum over an array whose first value stands at `start` of the whole."""
    bits = _bits(x).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position = position * jnp.uint32(size % 2**32) + index
    return mix(bits + mix(position + (start + jnp.uint32(1)))).sum(dtype=jnp.uint32)


def _folded(x: Array) -> Array:
    """The same values in rows of some hundreds: the shape that is hashed fastest on CPUs."""
    shape = list(x.shape)
    while len(shape) > 2 and shape[-1] < ROW:
        shape[-2:] = [shape[-2] * shape[-1]]
    return x.reshape(-1, shape[-1]) if x.ndim > 1 else x


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all leaves of a shape
def _leaf(x: Array, is_stacked: bool, is_whole: bool) -> UInt32[Array, ""]:
    zero = jnp.zeros((), jnp.uint32)

    def fold(block):  # what is spread over devices keeps its shape
        return _folded(block) if is_whole else block

    if not is_stacked or x.ndim < 2:
        return _part(fold(x), zero)
    size = jnp.uint32(x[0].size % 2**32)

    if x.dtype == jnp.bfloat16:  # inside a loop XLA turns all of it into float32 first, on CPUs
        x = _bits(x)

    def body(carry, block):  # one block at a time: XLA holds a copy of what it sums on CPUs
        start, total = carry
        return (start + size, total + _part(fold(block), start)), None

    return jax.lax.scan(body, (zero, zero), x)[0][1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _tree(
    leaves: list[Array], stacked: tuple[bool, ...], whole: tuple[bool, ...]
) -> UInt32[Array, "leaves"]:
    return jnp.stack([_leaf(*given) for given in zip(leaves, stacked, whole, strict=True)])


@dataclasses.dataclass(frozen=True)
class Prints:
    """Fingerprints that the devices may still be working on."""

    names: tuple[str, ...]
    numbers: Any

    def values(self) -> dict[str, str]:
        """Eight hexadecimal digits for every path; waits for the devices."""
        if not self.names:
            return {}
        numbers = np.asarray(self.numbers.addressable_data(0))
        return {name: f"{int(n):08x}" for name, n in zip(self.names, numbers, strict=True)}


def begin(tree: PyTree) -> Prints:
    """Starts on the fingerprint of every leaf, where the leaf lies; nothing is copied from there.

    Every process must call it at the same point. The leaves may be given up (donated) at once.
    """
    named = jax.tree.leaves_with_path(tree)
    names = tuple(path_name(path) for path, _ in named)
    if not named:
        return Prints((), None)
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    stacked = tuple("/blocks/" in f"/{name}" for name in names)
    whole = tuple(len(leaf.sharding.device_set) == 1 for leaf in leaves)
    return Prints(names, _tree(leaves, stacked, whole))


def fingerprint(tree: PyTree) -> dict[str, str]:
    """The fingerprint of every leaf, by its path, as eight hexadecimal digits."""
    return begin(tree).values()
