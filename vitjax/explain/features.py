"""A map from the last features: Grad-CAM.

Array letters: B batch, Y X image, N tokens, D width, R rows and S columns of the map.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vitjax.explain.grid import (
    at_targets,
    geometry_of,
    grid_of,
    has_attention,
    intermediate_shapes,
)
from vitjax.models.functional import Model


def class_activation(
    features: Float[Array, "B N D"], gradients: Float[Array, "B N D"]
) -> Float[Array, "B N"]:
    """The features' sum, weighed by their mean gradient; only what is positive.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2.
    """
    return jax.nn.relu(jnp.einsum("bnd,bd->bn", features, gradients.mean(1)))


@functools.partial(jax.jit, static_argnums=0)
def gradcam(
    model: Model, params: Any, images: Float[Array, "B Y X C"], targets: Int[Array, "B"]
) -> Float[Array, "B R S"]:
    """Grad-CAM of each image's target class.

    On a convolutional model's last map; on a Vision Transformer on the patches that enter the last
    block's attention, after the norm. Of those that leave the block none has a gradient where the
    class token is pooled, and elsewhere they have mixed what they saw (docs/explain.md).

    Args:
      images: normalised.

    Source: see `class_activation`.
    """
    shapes = intermediate_shapes(model, params, images)
    if not has_attention(model):
        name, prefix = "features", 0
        zeros: Any = {name: jnp.zeros(shapes["stages"][-1].shape)}
    else:
        name, prefix = "norm1", geometry_of(model).num_prefix
        zeros = {"blocks": {name: jnp.zeros(shapes["blocks"][name].shape)}}

    def score(offsets):
        out = model.apply(params, images, intermediates=True, offsets=offsets)
        features = out["blocks"][name][-1] if has_attention(model) else out["tokens"]
        return at_targets(out["logits"], targets).sum(), features

    gradients, features = jax.grad(score, has_aux=True)(zeros)
    if has_attention(model):
        gradient = gradients["blocks"][name][-1]
    else:
        gradient = gradients[name].reshape(features.shape)
    num_tokens = features.shape[1]
    patches, slopes = (
        jax.lax.slice_in_dim(x, prefix, num_tokens, axis=1) for x in (features, gradient)
    )
    grid = grid_of(model, images.shape[1], images.shape[2])
    return class_activation(patches, slopes).reshape(-1, *grid)
