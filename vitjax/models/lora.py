"""Low-rank updates (Hu et al. 2021, arXiv 2106.09685) folded into the kernels they belong to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def lora_scale(rank: int, alpha: float | None) -> float:
    """The factor of the product: alpha / rank, alpha twice the rank by default."""
    return (2.0 if alpha is None else alpha / rank) if rank else 0.0


def merged(model: Mapping[str, Any], params: PyTree) -> tuple[dict[str, Any], PyTree]:
    """The model's block without low-rank updates, and its parameters with them added.

    Args:
      model: the block of a config or a contract.
      params: nested dicts; a layer with an update holds kernel `[L, *in, *out]`, lora_a
        `[L, *in, R]` and lora_b `[L, R, *out]`.
    """
    rank = model.get("lora_rank") or 0
    if not rank:
        return dict(model), params
    scale = lora_scale(rank, model.get("lora_alpha"))

    def fold(node: PyTree) -> PyTree:
        if not isinstance(node, Mapping):
            return node
        if "lora_a" not in node:
            return {name: fold(value) for name, value in node.items()}
        kept = {k: v for k, v in node.items() if k not in ("lora_a", "lora_b")}
        a, b, kernel = (jnp.asarray(node[k]) for k in ("lora_a", "lora_b", "kernel"))
        flat_a = a.reshape(a.shape[0], -1, rank)
        flat_b = b.reshape(b.shape[0], rank, -1)
        update = jax.lax.dot_general(
            flat_a, flat_b, (((2,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
        return kept | {"kernel": kernel + (scale * update).reshape(kernel.shape)}

    return dict(model) | {"lora_rank": 0}, fold(params)
