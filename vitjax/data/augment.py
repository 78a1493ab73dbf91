"""Augmentation of a batch on the device, inside the training step.

Each operation is a frozen dataclass, called with (key, batch); images are float32 in [0, 1],
`[B, Y, X, C]` with one channel or three, and every image gets a draw of its own. `masks`
`[B, Y, X]`, where the batch has them, move with their images: integer masks (classes) by the
nearest pixel, float masks bilinearly. What comes into view from outside is `mask_fill` there. The
config lists operations by import path, and they run in that order.

Here: mirroring, shifting and mixing. `geometry`, `colour`, `randaugment` and `policies` hold the
rest.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from vitjax.errors import InputError

Batch = dict[str, Array]


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raises InputError unless `least <= value <= most`."""
    if not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"{name} must be a number from {least} to {most}, got {value!r}")


def check_interval(name: str, pair: Sequence[float], least: float, most: float) -> None:
    """Raises InputError unless the pair is (low, high) with `least <= low <= high <= most`."""
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(isinstance(v, int | float) for v in pair):
        raise InputError(f"{name} must be (low, high), got {pair!r}")
    if not least <= pair[0] <= pair[1] <= most:
        raise InputError(f"{name} needs {least} <= low <= high <= {most}, got {tuple(pair)}")


def where_chosen(chosen: Bool[Array, "B"], yes: Array, no: Array) -> Array:
    """Takes `yes` for the chosen examples and `no` for the others."""
    return jnp.where(chosen.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)


def mirror(batch: Batch, chosen: Bool[Array, "B"], axis: int) -> Batch:
    """Mirrors the chosen images and their masks along an axis: 1 for Y, 2 for X."""
    names = [name for name in ("images", "masks") if name in batch]
    return batch | {
        name: where_chosen(chosen, jnp.flip(batch[name], axis), batch[name]) for name in names
    }


def random_words(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Uniform uint8 or uint16 values [B, ...], several out of each 32 random bits.

    `jax.random.bits` spends 32 bits on each, and drawing them is what noise costs.
    """
    size = math.prod(shape[1:])
    per_word = 4 // jnp.dtype(dtype).itemsize
    bits = jax.random.bits(key, (shape[0], -(-size // per_word)))
    words = jax.lax.bitcast_convert_type(bits, dtype).reshape(shape[0], -1)
    return words[:, :size].reshape(shape)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors half of the images left to right, half of them top to bottom, or both.

    Attributes:
      horizontal: left to right; not where sides have a meaning, as in most radiographs.
      vertical: top to bottom; where there is no upright, as in microscopy.
    """

    horizontal: bool = True
    vertical: bool = False

    def __post_init__(self):
        if not (self.horizontal or self.vertical):
            raise InputError("RandomFlip needs horizontal=True or vertical=True")

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        number = batch["images"].shape[0]
        if self.horizontal:
            batch = mirror(batch, jax.random.bernoulli(key, 0.5, (number,)), 2)
        if self.vertical:
            chosen = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (number,))
            batch = mirror(batch, chosen, 1)
        return batch


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Moves each image by up to `pixels` in both directions; black fills the gap.

    With 4 pixels this is the pad-and-crop of CIFAR recipes.

    Attributes:
      mask_fill: what fills the gap in masks.
    """

    pixels: int
    mask_fill: float = 0

    def __post_init__(self):
        _positive("RandomShift.pixels", self.pixels)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        p = self.pixels
        starts = jax.random.randint(key, (batch["images"].shape[0], 2), 0, 2 * p + 1)

        def shift(x, fill):
            margins = ((0, 0), (p, p), (p, p), *((0, 0),) * (x.ndim - 3))
            padded = jnp.pad(x, margins, constant_values=fill)
            rest = (0,) * (x.ndim - 3)

            def crop(image, start):
                return jax.lax.dynamic_slice(image, (start[0], start[1], *rest), x.shape[1:])

            return jax.vmap(crop)(padded, starts)

        moved = {"images": shift(batch["images"], 0)}
        if "masks" in batch:
            moved["masks"] = shift(batch["masks"], self.mask_fill)
        return batch | moved


def _blend_weight(key: jax.Array, alpha: float, shape: tuple[int, ...] = ()) -> Array:
    return jax.random.beta(key, alpha, alpha, shape, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Blends every image, and its label, with its neighbour in the batch.

    The weights are at least one half: the batch gets `mix_labels` and `mix_weight`, the share
    of the image's own label.

    Attributes:
      per_example: a weight for each example, not one for the batch.

    Source: Zhang et al. 2018 (arXiv 1710.09412), as in big_vision.
    """

    alpha: float
    per_example: bool = False

    def __post_init__(self):
        _positive("Mixup.alpha", self.alpha)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images, labels = batch["images"], batch["labels"]
        if "masks" in batch:
            raise InputError("Mixup cannot blend masks; take Cutmix, which pastes them")
        number = images.shape[0]
        weight = _blend_weight(key, self.alpha, (number,) if self.per_example else ())
        weights = jnp.broadcast_to(jnp.maximum(weight, 1 - weight), (number,))
        share = weights[:, None, None, None]
        return batch | {
            "images": share * images + (1 - share) * jnp.roll(images, 1, axis=0),
            "mix_labels": jnp.roll(labels, 1, axis=0),
            "mix_weight": weights,
        }


@dataclasses.dataclass(frozen=True)
class Cutmix:
    """Pastes a rectangle of the neighbour in the batch; labels are weighted by area.

    Masks are pasted like the images.

    Source: Yun et al. 2019 (arXiv 1905.04899).
    """

    alpha: float = 1.0

    def __post_init__(self):
        _positive("Cutmix.alpha", self.alpha)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images, labels = batch["images"], batch["labels"]
        _, height, width, _ = images.shape
        weight_key, y_key, x_key = jax.random.split(key, 3)
        side = jnp.sqrt(1 - _blend_weight(weight_key, self.alpha))
        centre_y = jax.random.uniform(y_key) * height
        centre_x = jax.random.uniform(x_key) * width
        y, x = jnp.arange(height), jnp.arange(width)
        in_y = (jnp.abs(y + 0.5 - centre_y) < side * height / 2)[None, :, None]
        in_x = (jnp.abs(x + 0.5 - centre_x) < side * width / 2)[None, None, :]
        inside = in_y & in_x
        weights = jnp.full((images.shape[0],), 1 - inside.mean(dtype=jnp.float32))
        mixed = {
            "images": jnp.where(inside[..., None], jnp.roll(images, 1, axis=0), images),
            "mix_labels": jnp.roll(labels, 1, axis=0),
            "mix_weight": weights,
        }
        if "masks" in batch:
            masks = batch["masks"]
            mixed["masks"] = jnp.where(inside, jnp.roll(masks, 1, axis=0), masks)
        return batch | mixed


@dataclasses.dataclass(frozen=True)
class MixupOrCutmix:
    """Each step does the one or the other.

    Args:
      cutmix_probability: how often it is cutmix.
    """

    mixup_alpha: float
    cutmix_alpha: float = 1.0
    cutmix_probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.cutmix_probability <= 1:
            raise InputError(f"cutmix_probability must be in [0, 1], got {self.cutmix_probability}")

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        choice_key, key = jax.random.split(key)
        is_cutmix = jax.random.bernoulli(choice_key, self.cutmix_probability)
        cutmix, mixup = Cutmix(self.cutmix_alpha), Mixup(self.mixup_alpha)
        return jax.lax.cond(is_cutmix, cutmix, mixup, key, batch)
