"""What images are like: their kinds, their sizes, the mean and spread of their values."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vitjax.data.images import is_dicom

MODES = {
    "1": "1-bit",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "F": "float",
}
GREY_KINDS = ("1-bit", "grey", "grey with alpha", "16-bit", "float")
ARRAYS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGBA"}


def kind_of(image: bytes | np.ndarray) -> str:
    """The channels that an image has: grey, RGB, RGBA, CMYK, palette, 16-bit and so on.

    It reads no more than the header; what has none is "unknown".
    """
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 1
        name = ARRAYS.get(channels, f"{channels} channels")
        if image.dtype != np.uint16:
            return name
        return "16-bit" if channels == 1 else f"16-bit {name}"
    if is_dicom(image):
        return "DICOM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(image)) as opened:
                mode = opened.mode
        except Exception:  # Pillow raises nearly every type there is
            return "unknown"
    return "16-bit" if mode.startswith("I") else MODES.get(mode, mode)


def pixel_sums(pixels: UInt8[np.ndarray, "Y X C"]) -> Int[np.ndarray, "2 C"]:
    """The sum of a channel's values and of their squares, exactly."""
    values = np.arange(256)
    sums = np.empty((2, pixels.shape[2]), np.int64)
    for channel in range(pixels.shape[2]):
        counts = np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        sums[:, channel] = counts @ values, counts @ values**2
    return sums


def mean_and_std(sums: Int[np.ndarray, "2 C"], num_pixels: int) -> tuple[list[float], list[float]]:
    """Of each channel in [0, 1]; every pixel counts the same. In integers up to the last step."""
    means, stds = [], []
    for total, squares in sums.T.tolist():
        means.append(round(total / (255 * num_pixels), 6))
        spread = num_pixels * squares - total**2
        stds.append(round(math.sqrt(spread) / (255 * num_pixels), 6))
    return means, stds


def size_summary(sizes: Int[np.ndarray, "N 2"]) -> dict[str, dict[str, int]]:
    """Least, median and largest height and width, in pixels."""
    return {
        name: {
            "min": int(column.min()),
            "median": int(np.median(column)),
            "max": int(column.max()),
        }
        for name, column in (("height", sizes[:, 0]), ("width", sizes[:, 1]))
    }


def count_labels(labels: Any, num_classes: int) -> list[int]:
    """How many examples each class has.

    Args:
      labels: int64 `[N]`, or a list of labels for each example.
    """
    if not isinstance(labels, np.ndarray):
        labels = np.array([label for each in labels for label in set(each)], np.int64)
    inside = labels[(labels >= 0) & (labels < num_classes)]
    return np.bincount(inside, minlength=num_classes).tolist()


def class_name(number: int, class_names: Sequence[str] | None) -> str:
    """What people call a class."""
    return class_names[number] if class_names and number < len(class_names) else str(number)
