"""Where a model's map lies on the image.

Array letters: B batch, Y X image, N tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vitjax.models.encoder import ViT
from vitjax.models.functional import Model
from vitjax.models.shapes import Geometry


def has_attention(model: Model) -> bool:
    """Whether the model is a Vision Transformer; the others here are convolutional."""
    return model.module is ViT


def geometry_of(model: Model) -> Geometry:
    """The numbers of a Vision Transformer."""
    return dict(model.arguments)["geometry"]


def intermediate_shapes(model: Model, params: Any, images: Any) -> dict[str, Any]:
    """What the model returns with its intermediates, as shapes."""
    return jax.eval_shape(lambda p, x: model.apply(p, x, intermediates=True), params, images)


def grid_of(model: Model, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map of images of this size: patches, or the last map's pixels."""
    if has_attention(model):
        patch_size = geometry_of(model).patch_size
        return height // patch_size, width // patch_size
    channels = dict(model.arguments)["plan"].channels
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    last = intermediate_shapes(model, model.abstract_params, images)["stages"][-1]
    return last.shape[1], last.shape[2]


def cells(rows: int, cols: int, height: int, width: int) -> Int[np.ndarray, "Y X"]:
    """The number of the cell, row-major, that each pixel lies in."""
    down, across = np.arange(height) * rows // height, np.arange(width) * cols // width
    return down[:, None] * cols + across[None]


def at_targets(values: Float[Array, "B C"], targets: Int[Array, "B"]) -> Float[Array, "B"]:
    """Each row's value at its target class."""
    return jnp.take_along_axis(values, targets[:, None], axis=1)[:, 0]
