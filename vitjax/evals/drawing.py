"""Pictures of evaluators, as PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8d5fd3", "#c98a1b", "#555555")
SMALL = 128  # pixels below which an image's pixels are drawn as squares


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw_grid(
    columns: Mapping[str, Sequence[UInt8[np.ndarray, "Y X C"]]], title: str, side: float = 1.25
) -> bytes:
    """Images in rows, each column under its name; many rows go on in further columns.

    Args:
      columns: as many images in each, of one channel or three.
      side: of an image, in inches.
    """
    names = list(columns)
    count = len(columns[names[0]])
    blocks = 1 if count <= 4 else 2
    rows = -(-count // blocks)
    figure = new_figure(side * len(names) * blocks + 0.15, side * rows + 0.6)
    grid = figure.subplots(rows, len(names) * blocks, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for at in range(count):
        block, row = divmod(at, rows)
        for place, name in enumerate(names):
            image = columns[name][at]
            axes = grid[row, block * len(names) + place]
            how = "nearest" if image.shape[0] <= SMALL else "antialiased"
            if image.shape[2] == 1:
                axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation=how)
            else:
                axes.imshow(image, interpolation=how)
            if row == 0:
                axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return to_png(figure)
