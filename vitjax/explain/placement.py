"""Bringing a map to the pixels of the image as it came, before the model's resize and crop.

Array letters: Y X image, R rows and S columns of the map.
"""

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from vitjax.data.preprocess import Preprocess

Region = tuple[float, float, float, float]  # top, left, bottom, right, in pixels


def seen_region(preprocess: Preprocess, height: int, width: int) -> Region:
    """The part of an image that the model sees; beyond the image where the contract pads."""
    size = preprocess.image_size
    is_as_it_is = (height, width) == (size, size) and preprocess.crop_fraction == 1.0
    if preprocess.resize == "squash" or is_as_it_is:
        return 0.0, 0.0, float(height), float(width)
    if preprocess.resize == "pad":
        side = float(max(height, width))
    else:
        side = min(height, width) * preprocess.crop_fraction
    top, left = (height - side) / 2, (width - side) / 2
    return top, left, top + side, left + side


def spread(
    heat: Float[np.ndarray, "R S"], height: int, width: int, region: Region | None = None
) -> Float[np.ndarray, "Y X"]:
    """A map's values at an image's pixels, bilinear; NaN at pixels that the model has not seen.

    Args:
      region: of the image, that the map covers; all of it by default.
    """
    top, left, bottom, right = region or (0.0, 0.0, float(height), float(width))
    rows, cols = heat.shape
    down = (np.arange(height) + 0.5 - top) / (bottom - top) * rows
    across = (np.arange(width) + 0.5 - left) / (right - left) * cols
    places = np.meshgrid(down - 0.5, across - 0.5, indexing="ij")
    values = ndimage.map_coordinates(heat.astype(np.float64), places, order=1, mode="nearest")
    is_seen = ((down >= 0) & (down < rows))[:, None] & ((across >= 0) & (across < cols))[None]
    return np.where(is_seen, values, np.nan)
