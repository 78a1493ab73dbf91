"""Colour, blur and noise on the device: what changes an image's values and not its geometry.

All of it leaves masks as they are, and images of one channel work everywhere.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.data.augment import Batch, check_between, check_interval, random_words, where_chosen

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision have it


def luma(images: Float[Array, "B Y X C"]) -> Float[Array, "B Y X 1"]:
    """The grey image of a colour image; of one channel, the image."""
    if images.shape[3] == 1:
        return images
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def turn_hue(images: Float[Array, "B Y X 3"], turn: Float[Array, "B"]) -> Float[Array, "B Y X 3"]:
    """Moves the hue by a part of the colour circle, at the same saturation and value."""
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = sixths + 6 * turn[:, None, None]

    def channel(offset):
        place = offset + sixths
        place = place - 6 * jnp.floor(place / 6)
        return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], 3)


def blur(
    images: Float[Array, "B Y X C"], sigma: Float[Array, "B"], radius: int
) -> Float[Array, "B Y X C"]:
    """A Gaussian blur of each image's own sigma, in pixels; the outermost pixels go on outside.

    Args:
      radius: the kernel has 2 * radius + 1 values along Y, and then along X.
    """
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)[None]
    kernel = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdims=True))[:, :, None, None, None]
    for axis in (1, 2):
        margins = [(0, 0)] * 4
        margins[axis] = (radius, radius)
        padded = jnp.pad(images, margins, mode="edge")
        parts = [
            jax.lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis)
            for i in range(2 * radius + 1)
        ]
        images = sum((kernel[:, i] * part for i, part in enumerate(parts)), start=jnp.zeros(()))
    return images


def _radius(sigma: float) -> int:
    return max(1, math.ceil(3 * sigma))


def _factors(key: jax.Array, strength: float, number: int) -> Float[Array, "B 1 1 1"]:
    least = max(0.0, 1 - strength)
    return jax.random.uniform(key, (number, 1, 1, 1), minval=least, maxval=1 + strength)


def _blend(
    factor: Float[Array, "B 1 1 1"], images: Float[Array, "B Y X C"], other: Array
) -> Float[Array, "B Y X C"]:
    return jnp.clip(factor * images + (1 - factor) * other, 0, 1)


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Changes brightness, contrast, saturation and hue, always in this order.

    Attributes:
      brightness, contrast, saturation: each factor is uniform in [1 - value, 1 + value], and
        never below 0. Contrast is about the image's mean grey, saturation about its grey image.
      hue: the turn is uniform in [-hue, hue]; 0.5 is half of the colour circle.

    Images of one channel have neither saturation nor hue. Source: torchvision's ColorJitter, which
    draws the order.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            check_between(f"ColourJitter.{name}", getattr(self, name), 0, 10)
        check_between("ColourJitter.hue", self.hue, 0, 0.5)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        number, has_colour = images.shape[0], images.shape[3] == 3
        keys = jax.random.split(key, 4)
        if self.brightness:
            factor = _factors(keys[0], self.brightness, number)
            images = jnp.clip(factor * images, 0, 1)
        if self.contrast:
            mean = luma(images).mean((1, 2, 3), keepdims=True)
            images = _blend(_factors(keys[1], self.contrast, number), images, mean)
        if self.saturation and has_colour:
            factor = _factors(keys[2], self.saturation, number)
            images = _blend(factor, images, luma(images))
        if self.hue and has_colour:
            turn = jax.random.uniform(keys[3], (number,), minval=-self.hue, maxval=self.hue)
            images = turn_hue(images, turn)
        return batch | {"images": images}


@dataclasses.dataclass(frozen=True)
class GaussianBlur:
    """Blurs some images.

    Attributes:
      sigma: its range, in pixels; the kernel reaches to three times the highest.
      probability: how often an image is blurred.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self):
        check_interval("GaussianBlur.sigma", self.sigma, 0, 100)
        check_between("GaussianBlur.probability", self.probability, 0, 1)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        chosen_key, sigma_key = jax.random.split(key)
        low, high = self.sigma
        sigma = jax.random.uniform(sigma_key, images.shape[:1], minval=low, maxval=high)
        chosen = jax.random.bernoulli(chosen_key, self.probability, images.shape[:1])
        blurred = blur(images, sigma, _radius(high))
        return batch | {"images": where_chosen(chosen, blurred, images)}


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Adds noise to every value, and clips to [0, 1].

    Attributes:
      std: the range of the noise's standard deviation, which each image draws uniformly.

    The noise is normal at 65,536 equally likely values, which halves its cost.
    """

    std: tuple[float, float] = (0.0, 0.05)

    def __post_init__(self):
        check_interval("GaussianNoise.std", self.std, 0, 1)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        std_key, noise_key = jax.random.split(key)
        low, high = self.std
        std = jax.random.uniform(std_key, (images.shape[0], 1, 1, 1), minval=low, maxval=high)
        words = random_words(noise_key, images.shape, jnp.uint16).astype(jnp.float32)
        noise = math.sqrt(2) * jax.lax.erf_inv((2 * words + 1) / 2**16 - 1)
        return batch | {"images": jnp.clip(images + std * noise, 0, 1)}


def solarize(images: Float[Array, "B Y X C"], threshold: float) -> Float[Array, "B Y X C"]:
    """Inverts the values from the threshold on."""
    return jnp.where(images < threshold, images, 1 - images)


@dataclasses.dataclass(frozen=True)
class Solarize:
    """Inverts the bright values of some images, those from the threshold on."""

    probability: float = 0.2
    threshold: float = 0.5

    def __post_init__(self):
        check_between("Solarize.probability", self.probability, 0, 1)
        check_between("Solarize.threshold", self.threshold, 0, 1)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        chosen = jax.random.bernoulli(key, self.probability, images.shape[:1])
        inverted = solarize(images, self.threshold)
        return batch | {"images": where_chosen(chosen, inverted, images)}


@dataclasses.dataclass(frozen=True)
class Grayscale:
    """Takes the colour of some images."""

    probability: float = 0.2

    def __post_init__(self):
        check_between("Grayscale.probability", self.probability, 0, 1)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        chosen = jax.random.bernoulli(key, self.probability, images.shape[:1])
        return batch | {"images": where_chosen(chosen, luma(images), images)}


@dataclasses.dataclass(frozen=True)
class Gamma:
    """Raises values to a power: below 1 brightens the dark parts, above 1 darkens them.

    Attributes:
      low, high: the power's range; its logarithm is uniform, so that 1/2 and 2 are as likely.
    """

    low: float = 0.8
    high: float = 1.25

    def __post_init__(self):
        check_interval("Gamma's (low, high)", (self.low, self.high), 0.01, 100)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        low, high = math.log(self.low), math.log(self.high)
        number = images.shape[0]
        power = jnp.exp(jax.random.uniform(key, (number, 1, 1, 1), minval=low, maxval=high))
        return batch | {"images": jnp.where(power == 1, images, images**power)}


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """Makes each image grey, solarizes it or blurs it, and then jitters its colour.

    Attributes:
      jitter: of brightness, contrast and saturation.

    On images of one channel the first of the three does nothing.

    Source: Touvron et al. 2022 (DeiT III, arXiv 2204.07118); there horizontal flips come before.
    """

    jitter: float = 0.3
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self):
        check_between("ThreeAugment.jitter", self.jitter, 0, 10)
        check_interval("ThreeAugment.sigma", self.sigma, 0, 100)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        choice_key, sigma_key, jitter_key = jax.random.split(key, 3)
        choice = jax.random.randint(choice_key, images.shape[:1], 0, 3)
        low, high = self.sigma
        sigma = jax.random.uniform(sigma_key, images.shape[:1], minval=low, maxval=high)
        changed = where_chosen(choice == 0, luma(images), blur(images, sigma, _radius(high)))
        changed = where_chosen(choice == 1, solarize(images, 0.5), changed)
        jitter = ColourJitter(self.jitter, self.jitter, self.jitter)
        return jitter(jitter_key, batch | {"images": changed})
