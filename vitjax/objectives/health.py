"""Numbers that say whether features still tell images apart."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def feature_rank(features: Float[Array, "B D"]) -> Float[Array, ""]:
    """In how many directions a batch's features spread: between 0 (all are equal) and min(B, D).

    The participation ratio of the covariance's eigenvalues, trace(C)^2 / trace(C^2), which takes
    no decomposition. Where a run has collapsed it falls to about 1, or to 0.
    """
    x = features.astype(jnp.float32)
    x = x - x.mean(0, keepdims=True)
    smaller = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x  # of the same eigenvalues
    total = jnp.trace(smaller)
    return total**2 / jnp.maximum((smaller**2).sum(), 1e-30)


def feature_std(features: Float[Array, "B D"]) -> Float[Array, ""]:
    """The mean over dimensions of the deviation over a batch of features of length 1, times
    sqrt(D): about 1 where they point anywhere, 0 where all are equal."""
    x = features.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return x.std(0).mean() * jnp.sqrt(x.shape[1])
