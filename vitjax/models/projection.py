"""The projection head of DINO and iBOT. Array letters: D width, K prototypes."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.models import layers
from vitjax.precision import Precision


class ProjectionHead(nnx.Module):
    """Dense layers with GELU, a bottleneck of length 1, and cosines to prototypes.

    Source: Caron et al. 2021 (arXiv 2104.14294), section 3.1; the last layer's weight norm is held
    at 1.
    """

    def __init__(
        self, width: int, prototypes: int, *, hidden: int, bottleneck: int, num_layers: int,
        precision: Precision, rngs: nnx.Rngs,
    ):  # fmt: skip
        make: dict[str, Any] = {"precision": precision, "rngs": rngs}
        sizes = [width, *[hidden] * (num_layers - 1), bottleneck]
        for index, (a, b) in enumerate(itertools.pairwise(sizes), 1):
            setattr(self, f"dense{index}", layers.Linear((a,), (b,), **make))
        drawn = jax.random.normal(rngs.params(), (bottleneck, prototypes), precision.params)
        self.prototypes = nnx.Param(0.02 * drawn)
        self.num_layers, self.precision = num_layers, precision

    def __call__(
        self, x: Float[Array, "*rows D"], is_frozen: Any = False
    ) -> Float[Array, "*rows K"]:
        """Cosines in float32; where `is_frozen` no gradient reaches the prototypes."""
        p = self.precision
        for index in range(1, self.num_layers + 1):
            x = getattr(self, f"dense{index}")(x)
            x = jax.nn.gelu(x, approximate=False) if index < self.num_layers else x
        x = p.full_cast(x)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
        kernel = p.full_cast(self.prototypes[...])
        kernel = kernel / jnp.maximum(jnp.linalg.norm(kernel, axis=0, keepdims=True), 1e-6)
        kernel = jnp.where(is_frozen, jax.lax.stop_gradient(kernel), kernel)
        return p.full_cast(p.compute_cast(x) @ p.compute_cast(kernel))


def head_flops(width: int, prototypes: int, hidden: int, bottleneck: int, num_layers: int) -> int:
    """FLOPs (2 x MAC) of one row, forward."""
    sizes = [width, *[hidden] * (num_layers - 1), bottleneck, prototypes]
    return 2 * sum(a * b for a, b in itertools.pairwise(sizes))
