"""Where a model looks: attention as a map of the slide, and over its picture."""

import os
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.stats import rankdata

from vitjax.errors import InputError
from vitjax.medical.slides.bags import read_bag
from vitjax.medical.slides.slide import Slide

COVERED = 0.25  # the part of a cell that tiles must cover for it to have a value
COLOURS = "turbo"
PICTURE_SIDE = 1536


def heat_map(
    coords: Int[np.ndarray, "N 2"],
    attention: Float[np.ndarray, "_"],
    slide_size: tuple[int, int],
    tile: float,
    *,
    cell: float | None = None,
) -> Float[np.ndarray, "Y X"]:
    """A number for each cell of a slide: the mean of the tiles over it, weighted by their overlap.

    Args:
      coords: x and y of each tile's upper left corner, in pixels of level 0.
      slide_size: width and height of level 0.
      tile: pixels of level 0 along a tile.
      cell: pixels of level 0 along a cell; those of a tile by default.

    Returns:
      NaN where there is no tile.
    """
    if len(coords) != len(attention):
        raise InputError(f"{len(coords)} tiles, but {len(attention)} numbers of attention")
    cell = tile if cell is None else cell
    if not (tile > 0 and cell > 0):
        raise InputError(f"tile and cell must be positive, got {tile} and {cell}")
    columns, rows = (max(1, int(np.ceil(side / cell - 1e-6))) for side in slide_size)
    area, total = np.zeros((rows, columns)), np.zeros((rows, columns))
    low = coords / cell
    high = (coords + tile) / cell
    start = np.floor(low).astype(int)
    reach = int(np.ceil(tile / cell)) + 1
    for down in range(reach):
        for across in range(reach):
            x, y = start[:, 0] + across, start[:, 1] + down
            width = np.minimum(high[:, 0], x + 1) - np.maximum(low[:, 0], x)
            height = np.minimum(high[:, 1], y + 1) - np.maximum(low[:, 1], y)
            there = (width > 0) & (height > 0) & (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
            part = (width * height)[there]
            np.add.at(area, (y[there], x[there]), part)
            np.add.at(total, (y[there], x[there]), part * attention[there])
    is_covered = area >= COVERED * min(1.0, tile / cell) ** 2
    return np.where(is_covered, total / np.maximum(area, 1e-12), np.nan).astype(np.float32)


def draw_heat_map(
    thumbnail: UInt8[np.ndarray, "Y X 3"],
    heat: Float[np.ndarray, "My Mx"],
    path: str | Path,
    *,
    covered: tuple[float, float] = (1.0, 1.0),
    opacity: float = 0.5,
) -> None:
    """Writes a PNG of the slide with the map over it, coloured by the rank of each value.

    Args:
      thumbnail: of the whole slide.
      covered: how much of the map's width and height lies within the slide: its last cells may
        hang over the edge.
    """
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must be in [0, 1], got {opacity}")
    height, width = thumbnail.shape[:2]
    known = np.isfinite(heat)
    ranks = np.zeros(heat.shape)
    if known.any():
        ranks[known] = (rankdata(heat[known]) - 0.5) / known.sum()
    rows, columns = heat.shape
    x = np.minimum((np.arange(width) + 0.5) / width * covered[0] * columns, columns - 1)
    y = np.minimum((np.arange(height) + 0.5) / height * covered[1] * rows, rows - 1)
    places = np.ix_(y.astype(int), x.astype(int))
    colours = matplotlib.colormaps[COLOURS](ranks[places])[..., :3] * 255
    share = opacity * known[places][..., None]
    pixels = np.rint(thumbnail * (1 - share) + colours * share).astype(np.uint8)
    edges = cv2.Canny(known[places].astype(np.uint8) * 255, 50, 150) > 0
    pixels[edges] = 60
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp")
    Image.fromarray(pixels).save(beside, format="PNG")
    os.replace(beside, path)


def draw_attention(
    slide_path: str | Path, bag_path: str | Path, attention: Float[np.ndarray, " N"], out: Path
) -> None:
    """Writes the picture of a slide with the attention that its tiles got.

    Raises:
      InputError: the bag does not state the size of its tiles.
    """
    bag = read_bag(bag_path)
    if "span" not in bag.attributes:
        raise InputError(f"{bag_path} does not state the pixels of level 0 along a tile (span)")
    span = float(bag.attributes["span"])
    with Slide(slide_path) as slide:
        thumbnail, (width, height) = slide.thumbnail(PICTURE_SIDE), slide.size
    heat = heat_map(bag.coords, attention, (width, height), span)
    rows, columns = heat.shape
    covered = (width / (columns * span), height / (rows * span))
    draw_heat_map(thumbnail, heat, out, covered=covered)
