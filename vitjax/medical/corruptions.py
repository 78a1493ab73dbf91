"""Corruptions of images as scanners, cameras and archives make them, in five severities.

The families and the idea of severities follow Hendrycks and Dietterich 2019 (arXiv 1903.12261), the
choice for medical images Di Salvo et al. 2024 (MedMNIST-C, arXiv 2406.17536); the levels are our
own. A draw depends on the family and the key alone, so that a higher severity is more of the same:
the same noise, scaled; the same square, grown.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from vitjax.errors import InputError, suggest

SEVERITIES = (1, 2, 3, 4, 5)
Image = Float[np.ndarray, "Y X C"]  # 0 to 255
Function = Callable[[Any, float, np.random.Generator], Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One way to spoil an image.

    Attributes:
      function: of a float image of 0 to 255, a level and a generator, to such an image.
      levels: one for each severity, mildest first.
      meaning: of the levels, in words.
    """

    function: Function
    levels: tuple[float, float, float, float, float]
    meaning: str


def corrupt(
    image: UInt8[np.ndarray, "Y X C"], family: str, severity: int, key: Any
) -> UInt8[np.ndarray, "Y X C"]:
    """The image, spoilt; the same for the same family, severity and key.

    Args:
      family: of FAMILIES.
      severity: 1 to 5.
      key: the image's id.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; {suggest(family, FAMILIES)}")
    return apply(FAMILIES[family], family, image, severity, key)


def apply(
    family: Family, name: str, image: UInt8[np.ndarray, "Y X C"], severity: int, key: Any
) -> UInt8[np.ndarray, "Y X C"]:
    """`corrupt` by a family that need not be one of FAMILIES."""
    if severity not in SEVERITIES:
        raise InputError(f"severity must be one of {SEVERITIES}, got {severity}")
    digest = hashlib.sha256(f"{name}:{key}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    found = family.function(image.astype(np.float32), family.levels[severity - 1], generator)
    return np.clip(np.rint(found), 0, 255).astype(np.uint8).reshape(image.shape)


def _pixels(image: Image, length: float) -> float:
    """A length that is told for 28 pixels, in pixels of this image.

    Lengths grow with the root of the side, about as those of ImageNet-C differ from those of
    CIFAR-10-C: between the same number of pixels, which nobody sees in a large image, and the same
    share, which leaves of a large image what a small one has.
    """
    return length * (min(image.shape[:2]) / 28) ** 0.5


def _sign(generator: np.random.Generator) -> int:
    return 1 if generator.random() < 0.5 else -1


def _gaussian_noise(image: Image, level: float, generator: np.random.Generator) -> Image:
    return image + 255 * level * generator.standard_normal(image.shape)


def _shot_noise(image: Image, level: float, generator: np.random.Generator) -> Image:
    """Counted photons, by the normal distribution of the same variance."""
    return image + np.sqrt(image * (255 / level)) * generator.standard_normal(image.shape)


def _speckle_noise(image: Image, level: float, generator: np.random.Generator) -> Image:
    return image * (1 + level * generator.standard_normal(image.shape))


def _gaussian_blur(image: Image, level: float, generator: np.random.Generator) -> Image:
    sigma = _pixels(image, level)
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="mirror")


def _motion_blur(image: Image, level: float, generator: np.random.Generator) -> Image:
    """The mean along a line, at an angle of the draw's."""
    length, angle = _pixels(image, level), np.pi * generator.random()
    side = 2 * int(np.ceil(length / 2)) + 3
    kernel = np.zeros((side, side))
    for at in np.linspace(-length / 2, length / 2, 8 * side):
        y, x = side // 2 + at * np.sin(angle), side // 2 + at * np.cos(angle)
        top, left = int(y), int(x)
        for row, share in ((top, top + 1 - y), (top + 1, y - top)):
            kernel[row, left] += share * (left + 1 - x)
            kernel[row, left + 1] += share * (x - left)
    kernel /= kernel.sum()
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(image.shape)


def _contrast(image: Image, level: float, generator: np.random.Generator) -> Image:
    mean = image.mean((0, 1), keepdims=True)
    return mean + level * (image - mean)


def _brightness(image: Image, level: float, generator: np.random.Generator) -> Image:
    return image + 255 * level * _sign(generator)


def _gamma(image: Image, level: float, generator: np.random.Generator) -> Image:
    return 255 * (image / 255) ** (level ** _sign(generator))


def _bias_field(image: Image, level: float, generator: np.random.Generator) -> Image:
    """A smooth factor, as of an MRI coil or the heel of an X-ray tube: the exponential of a
    polynomial of order 3 in the place, as Van Leemput et al. 1999 model it."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape[:2])
    weights = generator.uniform(-1, 1, (4, 4))
    terms = [weights[i, j] * np.outer(y**i, x**j) for i in range(4) for j in range(4 - i) if i + j]
    field = np.sum(terms, 0)
    field = field - field.mean()
    return image * np.exp(level * field / field.std())[..., None]


def _occlusion(image: Image, level: float, generator: np.random.Generator) -> Image:
    """A square of the image's mean; larger ones cover the smaller."""
    sides = [max(1, round(n * level**0.5)) for n in image.shape[:2]]
    begin = [round(u * (n - s)) for u, n, s in
             zip(generator.random(2), image.shape[:2], sides, strict=True)]  # fmt: skip
    found = image.copy()
    place = tuple(slice(b, b + s) for b, s in zip(begin, sides, strict=True))
    found[place] = image.mean((0, 1))
    return found


def _jpeg(image: Image, level: float, generator: np.random.Generator) -> Image:
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(level)]
    written = cv2.imencode(".jpg", image[..., ::-1].astype(np.uint8), quality)[1]
    found = np.asarray(cv2.imdecode(written, cv2.IMREAD_UNCHANGED), np.float32)
    return found.reshape(image.shape)[..., ::-1]


def _pixelate(image: Image, level: float, generator: np.random.Generator) -> Image:
    """Blocks of one value each, of so many pixels a side, then shown at the old size."""
    rows, columns = (max(1, round(n / _pixels(image, level))) for n in image.shape[:2])
    small = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    size = image.shape[1::-1]  # INTER_NEAREST would move the image by up to half a block
    return cv2.resize(small, size, interpolation=cv2.INTER_NEAREST_EXACT).reshape(image.shape)


FAMILIES: dict[str, Family] = {
    "gaussian_noise": Family(
        _gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26), "standard deviation, of the full range"
    ),
    "shot_noise": Family(_shot_noise, (60, 25, 12, 6, 3), "photons of a white pixel"),
    "speckle_noise": Family(
        _speckle_noise, (0.1, 0.2, 0.32, 0.45, 0.6), "standard deviation, of the pixel's value"
    ),
    "gaussian_blur": Family(
        _gaussian_blur, (0.35, 0.5, 0.7, 0.9, 1.2), "sigma in pixels, for images of 28 pixels"
    ),
    "motion_blur": Family(
        _motion_blur, (1.5, 2.2, 3, 4, 5.5), "length in pixels, for images of 28 pixels"
    ),
    "contrast": Family(_contrast, (0.7, 0.55, 0.4, 0.28, 0.18), "factor around the mean"),
    "brightness": Family(
        _brightness, (0.08, 0.16, 0.24, 0.32, 0.4), "added or taken, of the full range"
    ),
    "gamma": Family(_gamma, (1.2, 1.5, 1.9, 2.4, 3.0), "exponent, or one over it"),
    "bias_field": Family(
        _bias_field, (0.1, 0.18, 0.27, 0.38, 0.5), "deviation of the log of a smooth factor"
    ),
    "occlusion": Family(_occlusion, (0.04, 0.09, 0.16, 0.25, 0.36), "share covered by a square"),
    "jpeg": Family(_jpeg, (50, 30, 20, 12, 7), "quality"),
    "pixelate": Family(
        _pixelate, (1.2, 1.5, 2, 2.8, 4), "block in pixels, for images of 28 pixels"
    ),
}
