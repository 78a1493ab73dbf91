"""Augmentation of a batch on the device, inside the training step.

Each operation is a frozen dataclass, called with (key, batch); images are float32 in [0, 1],
`[B, Y, X, C]`. The config lists operations by import path, and they run in that order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.errors import InputError

Batch = dict[str, Array]


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors half of the images left to right."""

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
        return batch | {"images": jnp.where(flip, images[:, :, ::-1], images)}


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Moves each image by up to `pixels` in both directions; black fills the gap.

    With 4 pixels this is the pad-and-crop of CIFAR recipes.
    """

    pixels: int

    def __post_init__(self):
        _positive("RandomShift.pixels", self.pixels)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        p = self.pixels
        images = batch["images"]
        padded = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
        starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * p + 1)

        def crop(image, start):
            return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

        return batch | {"images": jax.vmap(crop)(padded, starts)}


def _blend_weight(key: jax.Array, alpha: float) -> Float[Array, ""]:
    return jax.random.beta(key, alpha, alpha, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Blends every image, and its label, with its neighbour in the batch.

    One weight a batch, at least one half: the batch gets `mix_labels` and `mix_weight`, the share
    of the image's own label.

    Source: Zhang et al. 2018 (arXiv 1710.09412), as in big_vision.
    """

    alpha: float

    def __post_init__(self):
        _positive("Mixup.alpha", self.alpha)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images, labels = batch["images"], batch["labels"]
        weight = _blend_weight(key, self.alpha)
        weight = jnp.maximum(weight, 1 - weight)
        mixed = weight * images + (1 - weight) * jnp.roll(images, 1, axis=0)
        weights = jnp.full((images.shape[0],), weight)
        return batch | {
            "images": mixed,
            "mix_labels": jnp.roll(labels, 1, axis=0),
            "mix_weight": weights,
        }


@dataclasses.dataclass(frozen=True)
class Cutmix:
    """Pastes a rectangle of the neighbour in the batch; labels are weighted by area.

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
        in_y = (jnp.abs(y + 0.5 - centre_y) < side * height / 2)[None, :, None, None]
        in_x = (jnp.abs(x + 0.5 - centre_x) < side * width / 2)[None, None, :, None]
        inside = in_y & in_x
        weights = jnp.full((images.shape[0],), 1 - inside.mean(dtype=jnp.float32))
        return batch | {
            "images": jnp.where(inside, jnp.roll(images, 1, axis=0), images),
            "mix_labels": jnp.roll(labels, 1, axis=0),
            "mix_weight": weights,
        }


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
