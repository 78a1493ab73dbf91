"""Per-example transforms on the host, for training: pure functions of (image, generator).

What can run on the device lives in `augment`; here is what must happen before images of one size
can be batched.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitjax.data.jpeg import Region
from vitjax.data.preprocess import INTERPOLATIONS
from vitjax.errors import InputError, suggest

OPENCV = {"bilinear": 1, "bicubic": 2, "lanczos": 4}  # cv2.INTER_LINEAR and so on


@functools.cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)  # the loader has threads of its own
    return cv2


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to the model's size.

    Of an encoded image only that part is decoded, and JPEGs of which it is large at a half, a
    quarter or an eighth of their size.

    Attributes:
      image_size: given by the data config.
      min_area, max_area: the part's area over the image's.
      min_aspect, max_aspect: the part's width over its height.
      interpolation: "bilinear", "bicubic" or "lanczos".
      antialias: filter when shrinking, as Pillow does; half the speed of the whole pipeline.

    Source: Szegedy et al. 2015 (arXiv 1409.4842); ten tries, then the whole image's centre.
    """

    image_size: int
    min_area: float = 0.08
    max_area: float = 1.0
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3
    interpolation: str = "bilinear"
    antialias: bool = False

    def __post_init__(self):
        if not 0 < self.min_area <= self.max_area <= 1:
            raise InputError(
                f"RandomResizedCrop needs 0 < min_area <= max_area <= 1, "
                f"got {self.min_area} and {self.max_area}"
            )
        if not 0 < self.min_aspect <= self.max_aspect:
            raise InputError(
                f"RandomResizedCrop needs 0 < min_aspect <= max_aspect, "
                f"got {self.min_aspect} and {self.max_aspect}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}; "
                f"{suggest(self.interpolation, INTERPOLATIONS)}"
            )

    def region(self, height: int, width: int, generator: np.random.Generator) -> Region:
        """The part of an image of this size: (left, top, width, height)."""
        log_aspects = math.log(self.min_aspect), math.log(self.max_aspect)
        for _ in range(10):
            area = height * width * generator.uniform(self.min_area, self.max_area)
            log_aspect = generator.uniform(*log_aspects)
            w = round(math.sqrt(area * math.exp(log_aspect)))
            h = round(math.sqrt(area / math.exp(log_aspect)))
            if 0 < w <= width and 0 < h <= height:
                left = int(generator.integers(0, width - w + 1))
                top = int(generator.integers(0, height - h + 1))
                return left, top, w, h
        side = min(height, width)
        return (width - side) // 2, (height - side) // 2, side, side

    def resize(
        self, part: UInt8[np.ndarray, "Y X C"], out: UInt8[np.ndarray, "S S C"] | None = None
    ) -> UInt8[np.ndarray, "S S C"]:
        """The part at the model's size; in `out`, if given."""
        size = (self.image_size, self.image_size)
        if out is None:
            out = np.empty((*size, part.shape[2]), np.uint8)
        if self.antialias:
            out[...] = _to_array(_to_pil(part).resize(size, INTERPOLATIONS[self.interpolation]))
        else:
            _opencv().resize(part, size, dst=out, interpolation=OPENCV[self.interpolation])
        return out

    def __call__(
        self, image: UInt8[np.ndarray, "Y X C"], generator: np.random.Generator
    ) -> UInt8[np.ndarray, "S S C"]:
        left, top, w, h = self.region(image.shape[0], image.shape[1], generator)
        return self.resize(image[top : top + h, left : left + w])
