"""A fingerprint of each array, computed where the array lies.

Two values swapped, or one bit flipped, change it; sharding does not. Storage formats in use today
give back flipped bits without an error, so every checkpoint carries these and every load checks
them.
"""

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


def _leaf(x: Array) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position = position * jnp.uint32(size % 2**32) + index
    return mix(bits + mix(position + jnp.uint32(1))).sum(dtype=jnp.uint32)


@jax.jit
def _tree(leaves: list[Array]) -> UInt32[Array, "leaves"]:
    return jnp.stack([_leaf(leaf) for leaf in leaves])


def fingerprint(tree: PyTree) -> dict[str, str]:
    """The fingerprint of every leaf, by its path, as eight hexadecimal digits."""
    named = jax.tree.leaves_with_path(tree)
    if not named:
        return {}
    values = np.asarray(_tree([leaf for _, leaf in named]))
    return {path_name(p): f"{int(v):08x}" for (p, _), v in zip(named, values, strict=True)}
