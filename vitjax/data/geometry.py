"""Geometric augmentation on the device: turns, affine maps, elastic deformation, erasing.

Images and masks are resampled once, at the same places.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vitjax.data.augment import (
    Batch,
    check_between,
    check_interval,
    mirror,
    random_words,
    where_chosen,
)
from vitjax.errors import InputError

Fill = float | str


def _check_fill(name: str, fill: Fill, words: tuple[str, ...]) -> None:
    is_value = isinstance(fill, int | float) and 0 <= fill <= 1
    if not is_value and fill not in words:
        allowed = " or ".join(repr(word) for word in words)
        raise InputError(f"{name} must be {allowed} or a value from 0 to 1, got {fill!r}")


def _padded(images: Num[Array, "B Y X C"], fill: Fill) -> Num[Array, "B N C"]:
    """A margin of one pixel on all sides, and the pixels in one row."""
    margins = ((0, 0), (1, 1), (1, 1), (0, 0))
    if fill == "edge":
        padded = jnp.pad(images, margins, mode="edge")
    else:
        padded = jnp.pad(images, margins, constant_values=fill)
    return padded.reshape(images.shape[0], -1, images.shape[3])


def _take(flat: Num[Array, "B N C"], index: Int[Array, "B Y X"]) -> Num[Array, "B Y X C"]:
    take = lambda image, place: image.at[place].get(mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(take)(flat, index)


def sample_bilinear(
    images: Float[Array, "B Y X C"],
    y: Float[Array, "B Y X"],
    x: Float[Array, "B Y X"],
    fill: Fill,
) -> Float[Array, "B Y X C"]:
    """Values between pixels, each of the four neighbours weighted by its nearness.

    Args:
      y, x: where to look, in pixels; the centre of the first pixel is (0, 0).
      fill: the value of all pixels outside, or "edge": the nearest pixel's.
    """
    _, height, width, _ = images.shape
    y, x = jnp.clip(y, -1, height), jnp.clip(x, -1, width)
    top = jnp.minimum(jnp.floor(y), height - 1)
    left = jnp.minimum(jnp.floor(x), width - 1)
    down, right = (y - top)[..., None], (x - left)[..., None]
    row = width + 2  # of the padded image
    corner = (top.astype(jnp.int32) + 1) * row + left.astype(jnp.int32) + 1
    flat = _padded(images, fill)
    above = (1 - right) * _take(flat, corner) + right * _take(flat, corner + 1)
    below = (1 - right) * _take(flat, corner + row) + right * _take(flat, corner + row + 1)
    return (1 - down) * above + down * below


def sample_nearest(
    images: Num[Array, "B Y X C"],
    y: Float[Array, "B Y X"],
    x: Float[Array, "B Y X"],
    fill: Fill,
) -> Num[Array, "B Y X C"]:
    """The value of the nearest pixel; the arguments are those of `sample_bilinear`."""
    _, height, width, _ = images.shape
    row = jnp.floor(jnp.clip(y, -1, height) + 0.5).astype(jnp.int32) + 1
    column = jnp.floor(jnp.clip(x, -1, width) + 0.5).astype(jnp.int32) + 1
    return _take(_padded(images, fill), row * (width + 2) + column)


def resample(
    batch: Batch,
    y: Float[Array, "B Y X"],
    x: Float[Array, "B Y X"],
    fill: Fill,
    mask_fill: float,
) -> Batch:
    """Moves images bilinearly and their masks with them, integer masks by the nearest pixel."""
    moved = {"images": sample_bilinear(batch["images"], y, x, fill)}
    if "masks" in batch:
        masks = batch["masks"]
        is_float = jnp.issubdtype(masks.dtype, jnp.floating)
        sample = sample_bilinear if is_float else sample_nearest
        moved["masks"] = sample(masks[..., None], y, x, mask_fill)[..., 0]
    return batch | moved


@dataclasses.dataclass(frozen=True)
class RandomQuarterTurn:
    """Turns each image by 0, 90, 180 or 270 degrees; where there is no upright, as in histology.

    Raises:
      InputError: the images are not square.
    """

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        number, height, width, _ = batch["images"].shape
        if height != width:
            raise InputError(f"RandomQuarterTurn needs square images, got {height} x {width}")
        turns = jax.random.randint(key, (number,), 0, 4)
        names = [name for name in ("images", "masks") if name in batch]
        turned = batch | {
            name: where_chosen(turns % 2 == 1, batch[name].swapaxes(1, 2), batch[name])
            for name in names
        }
        turned = mirror(turned, (turns == 1) | (turns == 2), 1)
        return mirror(turned, turns >= 2, 2)


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Rotates, shears, scales and moves each image about its centre, in one bilinear resampling.

    Attributes:
      degrees: rotations are uniform in [-degrees, degrees]; 180 for any angle.
      scale: the range of the magnification.
      translate: the largest move, over the image's height and width.
      shear: the largest angle, in degrees, of a shear along X and one along Y.
      fill: the value outside the image, or "edge": the nearest pixel's.
      mask_fill: the value outside the masks.
    """

    degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    translate: float = 0.0
    shear: float = 0.0
    fill: Fill = 0.5
    mask_fill: float = 0

    def __post_init__(self):
        check_between("RandomAffine.degrees", self.degrees, 0, 180)
        check_interval("RandomAffine.scale", self.scale, 0.01, 100)
        check_between("RandomAffine.translate", self.translate, 0, 1)
        check_between("RandomAffine.shear", self.shear, 0, 80)
        _check_fill("RandomAffine.fill", self.fill, ("edge",))

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        number, height, width, _ = batch["images"].shape
        angle_key, shear_key, scale_key, move_key = jax.random.split(key, 4)

        def signed(key, most, size):
            return most * jax.random.uniform(key, (size, number), minval=-1)

        (angle,) = signed(angle_key, math.radians(self.degrees), 1)
        shear_x, shear_y = jnp.tan(signed(shear_key, math.radians(self.shear), 2))
        move_y, move_x = signed(move_key, self.translate, 2)
        low, high = self.scale
        scale = jax.random.uniform(scale_key, (number,), minval=low, maxval=high)
        # The inverse map, row by row: turn back, then undo one shear and the other.
        x_of_x, x_of_y = jnp.cos(angle), -jnp.sin(angle)
        y_of_x, y_of_y = jnp.sin(angle), jnp.cos(angle)
        x_of_x, x_of_y = x_of_x - shear_x * y_of_x, x_of_y - shear_x * y_of_y
        y_of_x, y_of_y = y_of_x - shear_y * x_of_x, y_of_y - shear_y * x_of_y

        def wide(value):
            return value[:, None, None]

        centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
        y = (jnp.arange(height) - centre_y)[None, :, None] - wide(move_y) * height
        x = (jnp.arange(width) - centre_x)[None, None, :] - wide(move_x) * width
        from_y = wide(y_of_x / scale) * x + wide(y_of_y / scale) * y + centre_y
        from_x = wide(x_of_x / scale) * x + wide(x_of_y / scale) * y + centre_x
        return resample(batch, from_y, from_x, self.fill, self.mask_fill)


@functools.cache
def _smoothing(size: int, sigma: float) -> Float[np.ndarray, "S G"]:
    """A Gaussian of every pixel over a grid of spacing sigma; rows have unit square sums."""
    count = math.ceil((size - 1) / sigma) + 9
    grid = sigma * (np.arange(count) - 4)
    weights = np.exp(-((np.arange(size)[:, None] - grid) ** 2) / (2 * sigma**2))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Elastic:
    """Moves every pixel by a smooth random field of its image's own.

    Attributes:
      alpha: the strength, as in the source and in torchvision: the moves along Y and X have a
        standard deviation of alpha / (6.14 sigma) pixels.
      sigma: of the Gaussian that smooths the field, in pixels, at least 1.
      fill: the value outside the image, or "edge": the nearest pixel's.
      mask_fill: the value outside the masks.

    The field is drawn on a grid of spacing sigma and spread by the Gaussian; its covariance is that
    of white noise at every pixel smoothed by it.

    Source: Simard et al. 2003, Best practices for convolutional neural networks applied to visual
    document analysis.
    """

    alpha: float
    sigma: float
    fill: Fill = "edge"
    mask_fill: float = 0

    def __post_init__(self):
        check_between("Elastic.alpha", self.alpha, 0, 1e6)
        check_between("Elastic.sigma", self.sigma, 1, 1e4)
        _check_fill("Elastic.fill", self.fill, ("edge",))

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        number, height, width, _ = batch["images"].shape
        along_y, along_x = _smoothing(height, self.sigma), _smoothing(width, self.sigma)
        shape = (2, number, along_y.shape[1], along_x.shape[1])
        noise = jax.random.normal(key, shape)
        field = jnp.einsum("yg,dbgh,xh->dbyx", along_y, noise, along_x)
        # Uniform noise in [-1, 1] has variance 1/3, and 1/3 / (4 pi sigma^2) once smoothed.
        field = field * (self.alpha / (self.sigma * math.sqrt(12 * math.pi)))
        y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + field[0]
        x = jnp.arange(width, dtype=jnp.float32)[None, None, :] + field[1]
        return resample(batch, y, x, self.fill, self.mask_fill)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Paints over a rectangle of some images; masks stay as they are.

    Attributes:
      probability: how often an image loses a rectangle.
      area: the range of its area, over the image's.
      aspect: the range of its height over its width, whose logarithm is uniform. A side longer
        than the image is cut to it, where the paper draws again.
      fill: "noise" (uniform, every pixel and channel), "mean" (the image's mean colour) or a
        value from 0 to 1.

    Source: Zhong et al. 2017 (arXiv 1708.04896).
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    aspect: tuple[float, float] = (0.3, 3.33)
    fill: Fill = "noise"

    def __post_init__(self):
        check_between("RandomErasing.probability", self.probability, 0, 1)
        check_interval("RandomErasing.area", self.area, 0, 1)
        check_interval("RandomErasing.aspect", self.aspect, 0.01, 100)
        _check_fill("RandomErasing.fill", self.fill, ("noise", "mean"))

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["images"]
        number, height, width, _ = images.shape
        chosen_key, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
        chosen = jax.random.bernoulli(chosen_key, self.probability, (number,))
        low, high = self.area
        area = jax.random.uniform(area_key, (number,), minval=low, maxval=high) * height * width
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        aspect = jnp.exp(jax.random.uniform(aspect_key, (number,), minval=low, maxval=high))
        place_y, place_x = jax.random.uniform(place_key, (2, number))

        def within(length, place, size):
            """Whether each position of an axis lies in the rectangle: [B, size]."""
            length = jnp.minimum(jnp.round(length), size)
            start = jnp.floor(place * (size - length + 1))
            position = jnp.arange(size, dtype=jnp.float32)[None]
            return (position >= start[:, None]) & (position < (start + length)[:, None])

        in_y = within(jnp.sqrt(area * aspect), place_y, height)
        in_x = within(jnp.sqrt(area / aspect), place_x, width)
        inside = (in_y & chosen[:, None])[:, :, None, None] & in_x[:, None, :, None]
        if isinstance(self.fill, float | int):
            fill = jnp.full((1, 1, 1, 1), self.fill, images.dtype)
        elif self.fill == "noise":
            fill = random_words(noise_key, images.shape, jnp.uint8).astype(jnp.float32) / 255
        else:
            fill = images.mean((1, 2), keepdims=True)
        return batch | {"images": jnp.where(inside, fill, images)}
