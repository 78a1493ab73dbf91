"""The preprocessing contract: what an image goes through before the model, at evaluation.

It is written into every checkpoint, so that whoever loads the weights feeds them what they were
trained for.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from vitjax.errors import InputError, suggest

RESIZES = ("shorter_side", "squash", "pad")
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a uint8 image becomes a model's input.

    Attributes:
      image_size: pixels along each side of the model's input.
      channels: 1 (grey) or 3 (RGB).
      mean, std: per channel, after scaling to `value_range`; one number serves all channels.
      value_range: what 0 and 255 become before the mean is subtracted.
      resize: "shorter_side" keeps the aspect ratio and crops the centre; "squash" does not keep it;
        "pad" keeps it and lays the whole image on black.
      crop_fraction: the part of the shorter side that the centre crop keeps.
      interpolation: antialiased.
    """

    image_size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    value_range: tuple[float, float] = (0.0, 1.0)
    resize: str = "shorter_side"
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise InputError(f"data.channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.image_size < 1:
            raise InputError(f"data.image_size must be positive, got {self.image_size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise InputError(f"{name} {values} must hold 1 or {self.channels} numbers")
        if not all(value > 0 for value in self.std):
            raise InputError(f"std must be positive, got {self.std}")
        for name, value, allowed in (
            ("resize", self.resize, RESIZES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in allowed:
                raise InputError(f"unknown {name} {value!r}; {suggest(value, allowed)}")
        if not 0 < self.crop_fraction <= 1:
            raise InputError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """Rebuilds the contract from JSON, or from options where one number serves all channels."""
        read: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        for name in ("mean", "std"):
            if isinstance(read.get(name), int | float):
                read[name] = (float(read[name]),)
        return cls(**read)

    def fit(self, image: UInt8[np.ndarray, "Y X C"]) -> UInt8[np.ndarray, "S S C"]:
        """Resizes (and crops) a decoded image to the model's size, on the host."""
        size = self.image_size
        height, width = image.shape[:2]
        if (height, width) == (size, size) and self.crop_fraction == 1.0:
            return image
        box = (0.0, 0.0, float(width), float(height))
        if self.resize == "shorter_side":
            side = min(height, width) * self.crop_fraction
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        rows = columns = size
        if self.resize == "pad":
            longer = max(height, width)
            rows, columns = (max(1, round(size * n / longer)) for n in (height, width))
        opened = Image.fromarray(image[..., 0] if self.channels == 1 else image)
        resized = opened.resize((columns, rows), INTERPOLATIONS[self.interpolation], box=box)
        pixels = np.asarray(resized).reshape(rows, columns, self.channels)
        if rows == columns == size:
            return pixels
        top, left = (size - rows) // 2, (size - columns) // 2
        whole = np.zeros((size, size, self.channels), np.uint8)
        whole[top : top + rows, left : left + columns] = pixels
        return whole

    def normalise(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Values in [0, 1] to what the model sees, on the device."""
        low, high = self.value_range
        mean = jnp.asarray(self.mean, jnp.float32).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.std, jnp.float32).reshape(1, 1, 1, -1)
        return (images * (high - low) + low - mean) / std


def to_unit(images: UInt8[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
    """uint8 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0
