"""Maps from a Vision Transformer's attention: rollout and relevance.

Array letters: B batch, Y X image, L layers, H heads, N tokens, R rows and S columns of patches.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vitjax.explain.grid import at_targets, geometry_of, grid_of, intermediate_shapes
from vitjax.models.functional import Model

WEIGHTS = "attention_weights"


def rollout_matrix(attention: Float[Array, "L B H N N"]) -> Float[Array, "B N N"]:
    """How much of each input token is in each output token, were attention all there is.

    Every row sums to 1.

    Source: Abnar and Zuidema 2020 (arXiv 2005.00928): the mean over heads, half of it the
    residual path, multiplied over layers.
    """
    mean = attention.mean(2)
    eye = jnp.eye(mean.shape[-1], dtype=mean.dtype)
    mixed = (mean + eye[None, None]) / 2
    mixed = mixed / mixed.sum(-1, keepdims=True)
    first = jnp.broadcast_to(eye[None], mean.shape[1:])
    return jax.lax.scan(lambda joint, layer: (layer @ joint, None), first, mixed)[0]


def relevance_matrix(
    attention: Float[Array, "L B H N N"], gradients: Float[Array, "L B H N N"]
) -> Float[Array, "B N N"]:
    """How relevant each input token is to each output token, for what the gradients are of.

    Source: Chefer, Gur and Wolf 2021 (arXiv 2103.15679), equations 5 and 6: attention times its
    gradient, only what is positive, the mean over heads; R grows by its product with R.
    """
    weighed = jax.nn.relu(attention * gradients).mean(2)
    eye = jnp.eye(weighed.shape[-1], dtype=weighed.dtype)
    first = jnp.broadcast_to(eye[None], weighed.shape[1:])
    return jax.lax.scan(lambda joint, layer: (joint + layer @ joint, None), first, weighed)[0]


def _readers(model: Model, num_tokens: int) -> Float[np.ndarray, "N"]:
    """How much the head reads of each token that leaves the encoder; sums to 1.

    The class token where pooling uses it, else all patches alike; half of it the distillation
    token where that has a head.
    """
    g = geometry_of(model)
    row = np.zeros(num_tokens, np.float32)
    if g.pool in ("cls", "cls_gap"):
        row[0] = 1.0
    else:
        row[g.num_prefix :] = 1.0 / (num_tokens - g.num_prefix)
    if g.distill_head:
        row /= 2
        row[1] += 0.5
    return row


def _on_patches(
    model: Model, row: Float[Array, "B N"], images: Float[Array, "B Y X C"]
) -> Float[Array, "B R S"]:
    """The patches' part of a value for every token."""
    grid = grid_of(model, images.shape[1], images.shape[2])
    prefix = geometry_of(model).num_prefix
    return jax.lax.slice_in_dim(row, prefix, row.shape[1], axis=1).reshape(-1, *grid)


@functools.partial(jax.jit, static_argnums=0)
def rollout(
    model: Model, params: Any, images: Float[Array, "B Y X C"], targets: Int[Array, "B"]
) -> Float[Array, "B R S"]:
    """Attention rollout to the patches; the same for every class.

    Read from the class token where pooling uses it, from the pool's own attention (pool="map"),
    or else as the mean over the patches' rows.

    Args:
      images: normalised.
      targets: not used: rollout is not class-specific.

    Source: see `rollout_matrix`.
    """
    del targets
    out = model.apply(params, images, intermediates=True)
    joint = rollout_matrix(out["blocks"][WEIGHTS])
    if "pool" in out:
        row = out["pool"][WEIGHTS].mean(1)[:, 0]
    else:
        one = jnp.asarray(_readers(model, joint.shape[-1]))
        row = jnp.broadcast_to(one[None], joint.shape[:2])
    return _on_patches(model, jnp.einsum("bn,bnm->bm", row, joint), images)


def attention_gradients(
    model: Model, params: Any, images: Float[Array, "B Y X C"], targets: Int[Array, "B"]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Attention weights, and the gradients of the target classes' logits with respect to them.

    Returns:
      Twice a dict with `blocks` [L, B, H, N, N] and, where pool="map", `pool` [B, H, 1, N].
    """
    shapes = intermediate_shapes(model, params, images)
    parts = [name for name in ("blocks", "pool") if name in shapes]
    zeros = {name: {WEIGHTS: jnp.zeros(shapes[name][WEIGHTS].shape)} for name in parts}

    def score(offsets):
        out = model.apply(params, images, intermediates=True, offsets=offsets)
        weights = {name: out[name][WEIGHTS] for name in parts}
        return at_targets(out["logits"], targets).sum(), weights

    gradients, weights = jax.grad(score, has_aux=True)(zeros)
    return weights, {name: gradients[name][WEIGHTS] for name in parts}


@functools.partial(jax.jit, static_argnums=0)
def relevance(
    model: Model, params: Any, images: Float[Array, "B Y X C"], targets: Int[Array, "B"]
) -> Float[Array, "B R S"]:
    """Generic attention explainability of each image's target class.

    Read as `rollout` is; a pool with attention of its own counts as a last layer, whose attention
    is weighed by its gradient too (the paper's rule for attention between two sets of tokens).

    Source: see `relevance_matrix`.
    """
    weights, gradients = attention_gradients(model, params, images, targets)
    joint = relevance_matrix(weights["blocks"], gradients["blocks"])
    if "pool" in weights:
        row = jax.nn.relu(weights["pool"] * gradients["pool"]).mean(1)[:, 0]
    else:
        one = jnp.asarray(_readers(model, joint.shape[-1]))
        row = jnp.broadcast_to(one[None], joint.shape[:2])
    return _on_patches(model, jnp.einsum("bn,bnm->bm", row, joint), images)
