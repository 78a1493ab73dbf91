"""What becomes of a class when parts of the image are hidden: occlusion, deletion, insertion.

Array letters: B batch, Y X image, C channels, R rows and S columns of the map, T steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vitjax.explain.grid import at_targets, cells, grid_of
from vitjax.models.functional import Model

AT_ONCE = 64  # images in one forward pass, if a batch has fewer


@functools.partial(jax.jit, static_argnums=0, static_argnames="window")
def occlusion(
    model: Model,
    params: Any,
    images: Float[Array, "B Y X C"],
    targets: Int[Array, "B"],
    *,
    window: int = 2,
) -> Float[Array, "B R S"]:
    """How far the target class's logit drops when a grey window hides a part of the image.

    The window stands at every place of the grid; a cell's value is the mean over all windows that
    cover it. Negative where hiding helps the class.

    Args:
      images: normalised: 0 is the mean of the contract, which is the grey.
      window: cells (patches) along each side; no more than there are.

    Source: Zeiler and Fergus 2014 (arXiv 1311.2901), section 4.2.
    """
    batch, height, width = images.shape[:3]
    rows, cols = grid_of(model, height, width)
    tall, wide = min(window, rows), min(window, cols)
    cell = cells(rows, cols, height, width)
    whole = at_targets(model.apply(params, images)["logits"], targets)

    def drop(place: Array) -> Array:
        down, across = jnp.asarray(cell // cols) - place[0], jnp.asarray(cell % cols) - place[1]
        is_hidden = (down >= 0) & (down < tall) & (across >= 0) & (across < wide)
        seen = jnp.where(is_hidden[None, :, :, None], 0.0, images)
        return whole - at_targets(model.apply(params, seen)["logits"], targets)

    places = np.argwhere(np.ones((rows - tall + 1, cols - wide + 1)))
    at_once = min(len(places), max(1, AT_ONCE // batch))
    drops = jax.lax.map(drop, jnp.asarray(places), batch_size=at_once)
    down, across = np.arange(rows)[None], np.arange(cols)[None]
    in_rows = (down >= places[:, :1]) & (down < places[:, :1] + tall)
    in_cols = (across >= places[:, 1:]) & (across < places[:, 1:] + wide)
    covered = jnp.asarray(in_rows[:, :, None] & in_cols[:, None], jnp.float32)
    return jnp.einsum("pb,prs->brs", drops, covered) / covered.sum(0)[None]


def _blurred(images: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
    """Behind a Gaussian of 5 pixels' deviation for 224, as the source; its tails are whole here."""

    def kernel(size: int) -> Array:
        distance = (np.arange(size)[:, None] - np.arange(size)[None]) / max(5 * size / 224, 1)
        weights = np.exp(-(distance**2) / 2)
        return jnp.asarray(weights / weights.sum(1, keepdims=True), jnp.float32)

    down, across = kernel(images.shape[1]), kernel(images.shape[2])
    return jnp.einsum("ij,bjkc,lk->bilc", down, images, across)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("is_multi_label", "steps"))
def deletion_insertion(
    model: Model,
    params: Any,
    images: Float[Array, "B Y X C"],
    targets: Int[Array, "B"],
    maps: Float[Array, "B R S"],
    *,
    is_multi_label: bool = False,
    steps: int = 16,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The target class's probability as cells are hidden, or shown, from the map's top down.

    Args:
      images: normalised; what is deleted becomes 0, the contract's mean. Insertion starts from
        the blurred image.
      is_multi_label: probabilities are sigmoids, not a softmax.
      steps: equal parts of the grid.

    Source: Petsiuk et al. 2018 (arXiv 1806.07421), section 4.1; cells there are pixels.
    """
    batch, rows, cols = maps.shape
    squash = jax.nn.sigmoid if is_multi_label else jax.nn.softmax
    order = jnp.argsort(-maps.reshape(batch, -1), axis=1)
    rank = jnp.argsort(order, axis=1)
    pixel_rank = rank[:, cells(rows, cols, images.shape[1], images.shape[2])][..., None]
    blurred = _blurred(images)

    def at(fraction: Array) -> tuple[Array, Array]:
        is_top = pixel_rank < jnp.round(fraction * rows * cols)
        both = jnp.where(is_top, 0.0, images), jnp.where(is_top, images, blurred)
        logits = (model.apply(params, x)["logits"] for x in both)
        deleted, inserted = (at_targets(squash(x), targets) for x in logits)
        return deleted, inserted

    deleted, inserted = jax.lax.map(at, jnp.linspace(0.0, 1.0, steps + 1))
    return deleted.T, inserted.T


def area(curve: Float[np.ndarray, "B T"]) -> Float[np.ndarray, "B"]:
    """Under a curve over [0, 1], by trapezia."""
    return (curve[:, 1:] + curve[:, :-1]).mean(1) / 2
