"""The terms of DINO's loss. Array letters: N rows, K prototypes, D width."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn(
    logits: Float[Array, "N K"],
    temperature: Float[Array, ""] | float,
    weights: Float[Array, "N"] | None = None,
    num_iterations: int = 3,
) -> Float[Array, "N K"]:
    """Targets of which every row sums to 1 and every prototype gets an equal share.

    Args:
      weights: rows of weight 0 take no part; their targets mean nothing.

    Source: SwAV (Caron et al. 2020, arXiv 2006.09882), as DINOv2 uses it; the rows come last.
    """
    x = logits.astype(jnp.float32) / temperature
    log_row = jnp.zeros(x.shape[:1]) if weights is None else jnp.log(weights.astype(jnp.float32))
    rows = x.shape[0] if weights is None else jnp.maximum(weights.sum(), 1.0)
    kinds = x.shape[1]
    q = x + log_row[:, None]

    def divided(q, axis, parts):  # in logarithms, in which nothing overflows
        total = jax.nn.logsumexp(q, axis=axis, keepdims=True)
        return q - jnp.where(jnp.isfinite(total), total, 0.0) - jnp.log(parts)

    for _ in range(num_iterations):
        q = divided(divided(q, 0, kinds), 1, rows)
    return jnp.exp(q) * rows


def centred(
    logits: Float[Array, "N K"], temperature: Float[Array, ""] | float, centre: Float[Array, "K"]
) -> Float[Array, "N K"]:
    """Softmax targets with a running mean taken off (DINO, arXiv 2104.14294)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre[None]) / temperature, axis=-1)


def entropy(targets: Float[Array, "*rows K"]) -> Float[Array, "*rows"]:
    """In nats."""
    return -(targets * jnp.log(jnp.maximum(targets, 1e-30))).sum(-1)


def koleo(features: Float[Array, "N D"]) -> Float[Array, ""]:
    """Minus the mean logarithm of the distance to the nearest other, on the sphere.

    Source: Sablayrolles et al. 2019 (arXiv 1806.03198), as in DINOv2.
    """
    x = features.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
    cosines = jax.lax.stop_gradient(x) @ jax.lax.stop_gradient(x).T
    own = jnp.eye(x.shape[0], dtype=bool)
    nearest = jnp.where(own, -2.0, cosines).argmax(1)
    gap = x - x[nearest]
    distance = jnp.sqrt((gap**2).sum(-1) + 1e-16)
    return -jnp.log(distance + 1e-8).mean()


def gram_distance(
    patches: Float[Array, "B N D"], anchor: Float[Array, "B N D"]
) -> Float[Array, ""]:
    """Mean squared difference of the patches' cosines within each image.

    Source: DINOv3 (Simeoni et al. 2025, arXiv 2508.10104), section 4.
    """

    def gram(x):
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
        return jnp.einsum("bnd,bmd->bnm", x, x)

    return ((gram(patches) - gram(anchor)) ** 2).mean()
