"""Which patches are hidden. Array letters: B batch, P patches, K of them kept."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masking:
    """A choice of patches for each image.

    Attributes:
      keep: row-major numbers of the visible patches.
      restore: for each patch where it stands in "visible, then masked": what undoes the shuffle.
      masked: whether a patch is hidden.
    """

    keep: Int[Array, "B K"]
    restore: Int[Array, "B P"]
    masked: Bool[Array, "B P"]


def draw_masking(key: jax.Array, batch_size: int, num_patches: int, num_kept: int) -> Masking:
    """Keeps as many random patches of each image, which has a key of its own.

    Source: He et al. 2022 (arXiv 2111.06377), section 3, "simple implementation".
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    noise = jax.vmap(lambda k: jax.random.uniform(k, (num_patches,)))(keys)
    return masking_of(jnp.argsort(noise, axis=1), num_kept)


def masking_of(order: Int[Array, "B P"], num_kept: int) -> Masking:
    """Keeps the first patches of an order."""
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :num_kept], restore, restore >= num_kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blobs:
    """Masked patches of each image, as many places as the most that any image can have.

    Attributes:
      places: row-major numbers of patches.
      valid: whether the place is masked; the others are fillers.
      masked: whether a patch is masked.
    """

    places: Int[Array, "B K"]
    valid: Bool[Array, "B K"]
    masked: Bool[Array, "B P"]


def most_masked(num_patches: int, most: float) -> int:
    """How many patches of an image are masked at most."""
    return int(num_patches * most)


def draw_blobs(
    key: jax.Array,
    batch_size: int,
    grid: tuple[int, int],
    ratio: tuple[float, float],
    probability: float,
) -> Blobs:
    """Masks a connected part or a few, of each image with that probability.

    The patches where smoothed noise is highest, so that shapes are fixed and compile; DINOv2 and
    BEiT add rectangles until enough is covered.

    Args:
      ratio: between which shares of the patches the masked ones are drawn.
    """
    keys = jax.random.split(key, 3)
    rows, cols = grid
    most = most_masked(rows * cols, ratio[1])
    noise = jax.random.normal(keys[0], (batch_size, rows, cols))
    for _ in range(2):
        padded = jnp.pad(noise, ((0, 0), (1, 1), (1, 1)), mode="edge")
        lines = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        noise = lines[:, :, :-2] + lines[:, :, 1:-1] + lines[:, :, 2:]
    order = jnp.argsort(-noise.reshape(batch_size, -1), axis=1)
    share = jax.random.uniform(keys[1], (batch_size,), minval=ratio[0], maxval=ratio[1])
    count = jnp.clip((share * rows * cols).astype(jnp.int32), 1, most)
    chosen = jax.random.bernoulli(keys[2], probability, (batch_size,))
    count = jnp.where(chosen, count, 0)
    masked = jnp.argsort(order, axis=1) < count[:, None]
    return Blobs(order[:, :most], jnp.arange(most)[None] < count[:, None], masked)
