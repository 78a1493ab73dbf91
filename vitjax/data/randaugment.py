"""RandAugment on the device, on 8-bit values and with the numbers of Pillow.

Every image draws one of sixteen operations in each layer. A layer does not compute sixteen images:
each operation is an affine map, a table over the 256 values, a blend with a simpler image, or a
rectangle, and a layer is one of each, of which all but one are the identity.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num, UInt8

from vitjax.data.augment import Batch, check_between
from vitjax.errors import InputError

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
)
GREY = 128  # of cutouts, and of what comes into view from outside
FIXED = 2**16  # Pillow's affine maps are fixed-point numbers with 16 bits after the point


def _is(operation: Int[Array, "B"], name: str, dims: int = 0) -> Bool[Array, "B ..."]:
    chosen = operation == OPERATIONS.index(name)
    return chosen.reshape(-1, *(1,) * dims)


def _affine(name: str, level: float, height: int, width: int) -> list[int]:
    """The inverse map of an operation in fixed point: x = (a X + b Y + c), y = (d X + e Y + f)."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "rotate":
        angle = math.radians(30 * level)
        a, b, d, e = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    elif name == "shear_x":
        b = 0.3 * level
    elif name == "shear_y":
        d = 0.3 * level
    elif name == "translate_x":
        c = 100 / 224 * width * level
    elif name == "translate_y":
        f = 100 / 224 * height * level
    x, y = (width - 1) / 2, (height - 1) / 2
    c, f = c + x - a * x - b * y, f + y - d * x - e * y
    values = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)  # from the middle of a pixel
    return [math.floor(value * FIXED + 0.5) for value in values]


def _lookup(name: str, level: float) -> np.ndarray:
    """What becomes of each value, for the operations that need not see the image."""
    values = np.arange(256)
    if name == "invert":
        values = 255 - values
    elif name == "posterize":
        bits = max(1, 8 - round(4 * abs(level)))
        values = values & ~(2 ** (8 - bits) - 1)
    elif name == "solarize":
        values = np.where(values < 256 - int(256 * abs(level)), values, 255 - values)
    elif name == "solarize_add":
        values = np.minimum(255, values + int(110 * abs(level)))
    return values.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """The parameters of all operations, at a positive level and at a negative one.

    Attributes:
      affine: [16, 2, 6]; lookup: [16, 256]; factor: [16, 2], of blends; half: of a cutout's side.
    """

    affine: np.ndarray
    lookup: np.ndarray
    factor: np.ndarray
    half: int


@functools.cache
def _tables(magnitude: float, height: int, width: int) -> _Tables:
    level = magnitude / 30
    levels = (level, -level)
    blends = ("color", "contrast", "brightness", "sharpness")
    affine = [[_affine(name, v, height, width) for v in levels] for name in OPERATIONS]
    factor = [[1 + 0.9 * v if name in blends else 1.0 for v in levels] for name in OPERATIONS]
    return _Tables(
        np.array(affine, np.int32),
        np.stack([_lookup(name, level) for name in OPERATIONS]),
        np.array(factor, np.float32),
        int(40 * level * width / 224),
    )


def histograms(images: UInt8[Array, "B C Y X"]) -> Int[Array, "B C 256"]:
    """How often each value occurs in each image and channel."""
    pixels = images.reshape(images.shape[0] * images.shape[1], -1)

    def scatter(pixels):
        empty = jnp.zeros(256, jnp.int32)
        count = lambda values: empty.at[values].add(1, mode="promise_in_bounds")  # noqa: E731
        return jax.vmap(count)(pixels.astype(jnp.int32))

    # Accelerators compare a value with all 256 at once, and scatter to few places slowly.
    counts = jax.lax.platform_dependent(pixels, cpu=scatter, default=count_by_comparing)
    return counts.reshape(*images.shape[:2], 256)


def count_by_comparing(pixels: UInt8[Array, "M N"]) -> Int[Array, "M 256"]:
    """The histogram of each row, without a scatter."""
    return (pixels[..., None] == jnp.arange(256, dtype=jnp.uint8)[None, None]).sum(1, jnp.int32)


def _autocontrast(counts: Int[Array, "B C 256"]) -> Int[Array, "B C 256"]:
    """The tables that stretch each channel to 0..255."""
    values = jnp.arange(256)[None, None]
    low = jnp.argmax(counts > 0, axis=2, keepdims=True)
    high = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=2, keepdims=True)
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def _equalize(counts: Int[Array, "B C 256"]) -> Int[Array, "B C 256"]:
    """The tables that make each channel's histogram flat."""
    highest = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=2, keepdims=True)
    last = jnp.take_along_axis(counts, highest, axis=2)
    step = (counts.sum(2, keepdims=True) - last) // 255
    before = jnp.cumsum(counts, axis=2) - counts
    flat = (before + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(flat, 255), jnp.arange(256)[None, None])


def _grey(images: UInt8[Array, "B C Y X"]) -> UInt8[Array, "B 1 Y X"]:
    """Pillow's conversion to grey."""
    if images.shape[1] == 1:
        return images
    values = images.astype(jnp.int32)
    red, green, blue = (values[:, i : i + 1] for i in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15 >> 16).astype(jnp.uint8)


def _smooth(images: UInt8[Array, "B C Y X"]) -> UInt8[Array, "B C Y X"]:
    """Pillow's SMOOTH: the centre counts five times, its eight neighbours once; borders stay."""
    _, _, height, width = images.shape
    if min(height, width) < 3:
        return images
    values = images.astype(jnp.int32)
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = (2 * (square + 4 * values[:, :, 1:-1, 1:-1]) + 13) // 26
    return images.at[:, :, 1:-1, 1:-1].set(inner.astype(jnp.uint8))


@dataclasses.dataclass(frozen=True)
class Draw:
    """What each image does in one layer.

    Attributes:
      operation: [B], a place in OPERATIONS.
      is_negative: [B], whether its level is.
      y, x: [B], the centre of a cutout.
    """

    operation: Int[Array, "B"]
    is_negative: Bool[Array, "B"]
    y: Int[Array, "B"]
    x: Int[Array, "B"]


def _places(
    draw: Draw, tables: _Tables, height: int, width: int
) -> tuple[Int[Array, "B Y X"], Bool[Array, "B Y X"]]:
    """Which pixel comes to each place, and whether it lies in the image."""
    rows = jnp.asarray(tables.affine)[draw.operation, draw.is_negative.astype(jnp.int32)]
    a, b, c, d, e, f = (rows[:, i][:, None, None] for i in range(6))
    y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    from_x, from_y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return jnp.where(inside, from_y * width + from_x, 0), inside


def _take(tables: Num[Array, "B C N"], index: Int[Array, "B #C Y X"]) -> Num[Array, "B C Y X"]:
    shape = (*tables.shape[:2], *index.shape[2:])
    rows, places = tables.shape[0] * tables.shape[1], index.shape[2] * index.shape[3]
    index = jnp.broadcast_to(index, shape).reshape(rows, places)
    take = lambda table, place: table.at[place].get(mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(take)(tables.reshape(rows, -1), index).reshape(shape)


def _move(
    images: Num[Array, "B C Y X"],
    places: tuple[Int[Array, "B Y X"], Bool[Array, "B Y X"]],
    fill: float,
) -> Num[Array, "B C Y X"]:
    index, inside = places
    moved = _take(images.reshape(*images.shape[:2], -1), index[:, None])
    return jnp.where(inside[:, None], moved, jnp.asarray(fill, images.dtype))


def apply_layer(
    images: UInt8[Array, "B C Y X"],
    draw: Draw,
    magnitude: float,
    masks: Num[Array, "B 1 Y X"] | None = None,
    mask_fill: float = 0,
) -> tuple[UInt8[Array, "B C Y X"], Num[Array, "B 1 Y X"] | None]:
    """Does to each image, and to its mask, what was drawn for it; channels come first here."""
    _, _, height, width = images.shape
    tables = _tables(magnitude, height, width)
    operation = draw.operation
    places = _places(draw, tables, height, width)
    if masks is not None:
        masks = _move(masks, places, mask_fill)
    grey = _grey(images)

    counts = histograms(images)
    is_equalize = _is(operation, "equalize", 2)
    seen = jnp.where(is_equalize, _equalize(counts), _autocontrast(counts)).astype(jnp.uint8)
    # Tables never fall, so this changes nothing; but XLA does not fuse a sort, and would work out
    # the table again for every pixel.
    seen = jnp.sort(seen, axis=2)
    fixed = jnp.asarray(tables.lookup)[operation][:, None]
    lookup = jnp.where(is_equalize | _is(operation, "autocontrast", 2), seen, fixed)
    moved = _move(images, places, GREY)
    looked_up = _take(lookup, moved.astype(jnp.int32))
    is_kept = _is(operation, "solarize_add", 3) & (grey >= 128)
    values = jnp.where(is_kept, moved, looked_up).astype(jnp.float32)

    number_of_pixels = height * width
    total = grey.sum((1, 2, 3), dtype=jnp.int32, keepdims=True)
    mean = (total + number_of_pixels // 2) // number_of_pixels
    simpler = jnp.where(_is(operation, "color", 3), grey, jnp.uint8(0))
    simpler = jnp.where(_is(operation, "contrast", 3), mean.astype(jnp.uint8), simpler)
    simpler = jnp.where(_is(operation, "sharpness", 3), _smooth(images), simpler)
    simpler = simpler.astype(jnp.float32)
    factor = jnp.asarray(tables.factor)[operation, draw.is_negative.astype(jnp.int32)]
    blended = simpler + factor[:, None, None, None] * (values - simpler)
    values = jnp.clip(blended, 0, 255).astype(jnp.uint8)

    y, x = jnp.arange(height)[None, None, :, None], jnp.arange(width)[None, None, None]
    away_y, away_x = y - draw.y[:, None, None, None], x - draw.x[:, None, None, None]
    half = tables.half
    inside = (away_y >= -half) & (away_y < half) & (away_x >= -half) & (away_x < half)
    inside &= _is(operation, "cutout", 3)
    return jnp.where(inside, jnp.uint8(GREY), values), masks


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `num_layers` operations drawn at random for each image, all at one magnitude.

    Attributes:
      magnitude: 0 (weak) to 30; 10 is every operation at a third of its range.
      mask_fill: what comes into view in masks, which move by the nearest pixel with their images;
        grey does in images.

    Source: Cubuk et al. 2019 (arXiv 1909.13719), with the sixteen operations of the version
    behind arXiv 2205.01580. Enhancements are drawn around the identity in both directions, and
    translations and cutouts are relative to a 224-pixel image. The images are rounded to 8 bits,
    as Pillow's operations are defined on these.
    """

    num_layers: int = 2
    magnitude: float = 10
    mask_fill: float = 0

    def __post_init__(self):
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise InputError(f"RandAugment.num_layers must be 1 or more, got {self.num_layers!r}")
        check_between("RandAugment.magnitude", self.magnitude, 0, 30)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        number, height, width, _ = batch["images"].shape
        images = jnp.round(batch["images"] * 255).astype(jnp.uint8).transpose(0, 3, 1, 2)
        masks = batch["masks"][:, None] if "masks" in batch else None

        def layer(moved, key):
            keys = jax.random.split(key, 4)
            draw = Draw(
                jax.random.randint(keys[0], (number,), 0, len(OPERATIONS)),
                jax.random.bernoulli(keys[1], 0.5, (number,)),
                jax.random.randint(keys[2], (number,), 0, height),
                jax.random.randint(keys[3], (number,), 0, width),
            )
            return apply_layer(moved[0], draw, self.magnitude, moved[1], self.mask_fill), None

        keys = jax.random.split(key, self.num_layers)
        (images, masks), _ = jax.lax.scan(layer, (images, masks), keys)
        changed = {"images": images.transpose(0, 2, 3, 1).astype(jnp.float32) / 255}
        return batch | changed | ({} if masks is None else {"masks": masks[:, 0]})
