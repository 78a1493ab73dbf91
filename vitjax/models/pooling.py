"""From tokens to one vector an image.

Array letters: B batch, N tokens, D width.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.models import layers
from vitjax.models.attention import attend
from vitjax.models.shapes import Shape
from vitjax.precision import Precision

POOLS = ("cls", "gap", "map", "cls_gap")


class AttentionPool(nnx.Module):
    """Multi-head attention pooling: a learned query attends to all tokens, then a residual MLP.

    Source: Zhai et al. 2021 (arXiv 2106.04560), appendix; Lee et al. 2019 (arXiv 1810.00825).
    """

    def __init__(self, shape: Shape, *, precision: Precision, rngs: nnx.Rngs, activation, norm):
        width, heads = shape.width, shape.num_heads
        head_dim = width // heads
        make = {"precision": precision, "rngs": rngs}
        limit = (6.0 / (1 + width)) ** 0.5
        self.probe = nnx.Param(
            jax.random.uniform(rngs.params(), (1, width), precision.params, -limit, limit)
        )
        self.query = layers.Linear((width,), (heads, head_dim), **make)
        self.key_value = layers.Linear((width,), (2, heads, head_dim), fan_out=width, **make)
        self.out = layers.Linear((heads, head_dim), (width,), **make)
        self.norm = layers.LayerNorm(width, precision=precision, **norm)
        self.mlp = layers.Mlp(width, shape.mlp_dim, activation=activation, **make)
        self.precision = precision

    def __call__(
        self, tokens: Float[Array, "B N D"], offsets: Mapping[str, Array] | None = None
    ) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        """Returns the pooled tokens, and what `attend` computed on the way: N is 1 there."""
        probe = jnp.broadcast_to(self.probe[...][None], (tokens.shape[0], 1, tokens.shape[-1]))
        query = jnp.transpose(self.query(probe), (0, 2, 1, 3))
        key, value = jnp.transpose(self.key_value(tokens), (2, 0, 3, 1, 4))
        mixed, seen = attend(query, key, value, self.precision, offsets)
        x = self.out(jnp.transpose(mixed, (0, 2, 1, 3)))
        return (x + self.mlp(self.norm(x)))[:, 0], seen


def pool_tokens(
    tokens: Float[Array, "B N D"], pool: str, prefix: int, precision: Precision
) -> Float[Array, "B E"]:
    """The class token, the mean of the patches, or both side by side (as DINOv2's linear heads).

    Args:
      pool: "cls", "gap" or "cls_gap".
      prefix: how many tokens come before the patches.
    """
    cls = tokens[:, 0]
    if pool == "cls":
        return cls
    patches = jax.lax.slice_in_dim(tokens, prefix, tokens.shape[1], axis=1)
    mean = precision.compute_cast(precision.full_cast(patches).mean(1))
    return mean if pool == "gap" else jnp.concatenate([cls, mean], axis=-1)
