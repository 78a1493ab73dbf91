"""A fingerprint of each array, computed where the array lies.

Two values swapped, or one bit flipped, change it; sharding does not. Storage formats in use today
give back flipped bits without an error, so every checkpoint carries these and every load checks
them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from vitjax.parallel import path_name

PyTree = Any


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _part(x: Array, start: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The sum over an array whose first value stands at `start` of the whole."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position = position * jnp.uint32(size % 2**32) + index
    return mix(bits + mix(position + (start + jnp.uint32(1)))).sum(dtype=jnp.uint32)


def _leaf(x: Array, is_stacked: bool) -> UInt32[Array, ""]:
    zero = jnp.zeros((), jnp.uint32)
    if not is_stacked or x.ndim < 2:
        return _part(x, zero)
    size = jnp.uint32(x[0].size % 2**32)

    def body(carry, block):  # one block at a time: XLA holds a copy of what it sums on CPUs
        start, total = carry
        return (start + size, total + _part(block, start)), None

    return jax.lax.scan(body, (zero, zero), x)[0][1]


@functools.partial(jax.jit, static_argnums=1)
def _tree(leaves: list[Array], stacked: tuple[bool, ...]) -> UInt32[Array, "leaves"]:
    return jnp.stack([_leaf(x, flag) for x, flag in zip(leaves, stacked, strict=True)])


def fingerprint(tree: PyTree) -> dict[str, str]:
    """The fingerprint of every leaf, by its path, as eight hexadecimal digits."""
    named = jax.tree.leaves_with_path(tree)
    if not named:
        return {}
    stacked = tuple("/blocks/" in f"/{path_name(p)}" for p, _ in named)
    values = np.asarray(_tree([leaf for _, leaf in named], stacked))
    return {path_name(p): f"{int(v):08x}" for (p, _), v in zip(named, values, strict=True)}
