"""Pictures of maps: an image beside the same image under its map.

Array letters: Y X image, C channels, R rows and S columns of the map.
"""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vitjax.explain.placement import Region, spread

COLOURS = "viridis"  # perceptually uniform
OPACITY = 0.55
LARGEST = 512  # pixels along the longer side of what is drawn
LESION = "#ff3b30"


def _shown(
    image: UInt8[np.ndarray, "Y X C"], region: Region | None
) -> tuple[UInt8[np.ndarray, "Y2 X2"], UInt8[np.ndarray, "Y2 X2 3"], Region]:
    """The image in grey and in colour, made smaller where it is large, and the region on it."""
    height, width = image.shape[:2]
    region = region or (0.0, 0.0, float(height), float(width))
    opened = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    scale = min(1.0, LARGEST / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        opened = opened.resize(size, Image.Resampling.LANCZOS)
    down, across = opened.height / height, opened.width / width
    top, left, bottom, right = region
    moved = (top * down, left * across, bottom * down, right * across)
    return np.asarray(opened.convert("L")), np.asarray(opened), moved


def blend(
    image: UInt8[np.ndarray, "Y X C"],
    heat: Float[np.ndarray, "R S"],
    region: Region | None = None,
) -> UInt8[np.ndarray, "Y2 X2 3"]:
    """The image in grey under its map, whose lowest value is dark blue and highest yellow.

    Args:
      image: of any size; larger ones than 512 pixels are made smaller.
      heat: a map at grid resolution.
      region: the part of the image that the map covers (see `seen_region`); all by default.
    """
    grey, _, region = _shown(image, region)
    values = spread(heat, grey.shape[0], grey.shape[1], region)
    low, high = float(heat.min()), float(heat.max())
    colours = matplotlib.colormaps[COLOURS]((values - low) / max(high - low, 1e-30))[..., :3]
    base = np.repeat(grey[..., None] / 255.0, 3, axis=2)
    mixed = np.where(np.isnan(values)[..., None], base, (1 - OPACITY) * base + OPACITY * colours)
    return (mixed * 255).round().astype(np.uint8)


def _outline(axes: Any, mask: Bool[np.ndarray, "Y X"], size: tuple[int, int]) -> None:
    small = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    values = np.asarray(small, np.float64)
    if values.min() != values.max():
        axes.contour(values, [0.5], colors=[LESION], linewidths=1.2)


def draw_overlay(
    image: UInt8[np.ndarray, "Y X C"],
    heat: Float[np.ndarray, "R S"],
    *,
    title: str,
    unit: str = "",
    region: Region | None = None,
    mask: Bool[np.ndarray, "Y X"] | None = None,
) -> bytes:
    """An image and its overlay side by side, with a colour bar of the map's values, as a PNG.

    Args:
      image, heat, region: as for `blend`.
      title: what the map is of; a line break makes two lines.
      unit: of the map's values, beside the bar.
      mask: outlined in red, of the image's size.
    """
    grey, shown, placed = _shown(image, region)
    height, width = grey.shape
    tall = float(np.clip(3.1 * height / width, 1.2, 6.0))
    figure = Figure(figsize=(7.4, tall + 0.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    how = "nearest" if max(height, width) < LARGEST else "antialiased"
    left.imshow(shown, interpolation=how)
    right.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation=how)
    values = np.ma.masked_invalid(spread(heat, height, width, placed))
    low, high = float(heat.min()), float(heat.max())
    drawn = right.imshow(
        values, cmap=COLOURS, vmin=low, vmax=high if high > low else low + 1e-6,
        alpha=OPACITY, interpolation="nearest",
    )  # fmt: skip
    bar = figure.colorbar(drawn, ax=right, fraction=0.046, pad=0.03)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    for axes in (left, right):
        axes.set_axis_off()
        if mask is not None:
            _outline(axes, mask, (width, height))
    figure.suptitle(title, fontsize=10, parse_math=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(file, format="png")
    return file.getvalue()
