"""A grid of tiles over the tissue of a slide, and the stream of their pixels.

The pixels of a slide are never in memory at once: a few tiles are read ahead of what is asked for.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vitjax.cpu import usable_cores
from vitjax.errors import InputError
from vitjax.medical.slides.slide import Slide

FINEST = 0.9  # of the slide's microns a pixel: tiles that are asked for finer would be made up


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Squares of a slide.

    Attributes:
      coords: x and y of each tile's upper left corner, in pixels of level 0.
      level: that is read.
      scale: pixels of that level along one pixel of a tile; 1 where nothing is resized.
      tile_size: pixels along each side of a tile.
      span: pixels of level 0 along each side of a tile.
      microns_per_pixel: of the tiles; None where the slide does not say.
    """

    coords: Int[np.ndarray, "N 2"]
    level: int
    scale: float
    tile_size: int
    span: float
    microns_per_pixel: float | None

    def __len__(self) -> int:
        return len(self.coords)


def covered(
    mask: Bool[np.ndarray, "My Mx"],
    size: tuple[int, int],
    coords: Int[np.ndarray, "N 2"],
    span: float,
) -> Float[np.ndarray, " N"]:
    """The part of each tile that a mask of the whole slide covers, exact for the mask's pixels."""
    rows, columns = mask.shape
    table = np.zeros((rows + 1, columns + 1))
    table[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)

    def integral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Of the mask from its corner to (x, y): linear between the corners of its pixels."""
        x, y = x.clip(0, columns), y.clip(0, rows)
        left, top = np.minimum(x.astype(int), columns - 1), np.minimum(y.astype(int), rows - 1)
        a, b = x - left, y - top
        upper = table[top, left] * (1 - a) + table[top, left + 1] * a
        lower = table[top + 1, left] * (1 - a) + table[top + 1, left + 1] * a
        return upper * (1 - b) + lower * b

    across, down = columns / size[0], rows / size[1]
    x0, x1 = coords[:, 0] * across, (coords[:, 0] + span) * across
    y0, y1 = coords[:, 1] * down, (coords[:, 1] + span) * down
    area = integral(x1, y1) - integral(x0, y1) - integral(x1, y0) + integral(x0, y0)
    return area / (span * across * span * down)


def grid(
    slide: Slide,
    mask: Bool[np.ndarray, "My Mx"] | None,
    *,
    tile_size: int = 224,
    microns_per_pixel: float | None = 0.5,
    level: int | None = None,
    overlap: int = 0,
    min_tissue: float = 0.5,
) -> Tiles:
    """Tiles side by side from the slide's upper left corner, row by row, where there is tissue.

    Those at the right and lower edge may hang over it: what lies outside is white, and no tissue.

    Args:
      mask: of tissue, over the whole slide at any resolution; None takes every tile.
      microns_per_pixel: of the tiles: the next finer level is read and reduced.
      level: read this level as it is, whatever its microns; with `microns_per_pixel=None`.
      overlap: pixels of a tile that it shares with the next one.
      min_tissue: the part of a tile that must be tissue.

    Raises:
      InputError: the slide does not state its microns per pixel, or has no pixels so fine.
    """
    for name, value in (("tile_size", tile_size), ("overlap + 1", overlap + 1)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if overlap >= tile_size:
        raise InputError(f"overlap must be less than tile_size={tile_size}, got {overlap}")
    if not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue must be in [0, 1], got {min_tissue}")
    if (level is None) == (microns_per_pixel is None):
        raise InputError(
            f"give microns_per_pixel or level, and None for the other; got {microns_per_pixel} "
            f"and {level}"
        )
    stated, scale = slide.microns_per_pixel, 1.0
    if microns_per_pixel is not None:
        if not microns_per_pixel > 0:
            raise InputError(f"microns_per_pixel must be positive, got {microns_per_pixel}")
        if stated is None:
            raise InputError(
                f"{slide.path} does not state its microns per pixel, so tiles of "
                f"{microns_per_pixel} cannot be cut; give level=0 to "
                f"{len(slide.levels) - 1} (and microns_per_pixel=None) instead"
            )
        if microns_per_pixel < stated * FINEST:
            raise InputError(
                f"microns_per_pixel={microns_per_pixel} is finer than {slide.path}, which has "
                f"{stated:.4g}; allowed: {stated * FINEST:.4g} or more"
            )
        wanted = microns_per_pixel / stated
        level = slide.level_for(wanted)
        scale = wanted / slide.downsamples[level]
    assert level is not None
    if not 0 <= level < len(slide.levels):
        raise InputError(f"level {level} of {slide.path}: it has 0 to {len(slide.levels) - 1}")
    factor = scale * slide.downsamples[level]  # pixels of level 0 along one of a tile
    span, step = tile_size * factor, (tile_size - overlap) * factor
    counts = [max(1, int(np.ceil((side - overlap * factor) / step - 1e-6))) for side in slide.size]
    xs, ys = (np.rint(np.arange(count) * step).astype(np.int64) for count in counts)
    coords = np.stack([np.tile(xs, len(ys)), np.repeat(ys, len(xs))], -1)
    if mask is not None:
        share = covered(mask, slide.size, coords, span)
        coords = coords[(share >= min_tissue - 1e-9) & (share > 0)]
    microns = microns_per_pixel or (stated and stated * factor)
    return Tiles(coords, level, float(scale), tile_size, float(span), microns)


def read_tile(slide: Slide, tiles: Tiles, index: int) -> UInt8[np.ndarray, "S S 3"]:
    """One tile, reduced to its size by averaging over areas."""
    x, y = (int(value) for value in tiles.coords[index])
    size, side = tiles.tile_size, max(1, round(tiles.tile_size * tiles.scale))
    pixels = slide.read(x, y, side, side, tiles.level)
    if side == size:
        return pixels
    way = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=way), np.uint8)


def stream(
    slide: Slide, tiles: Tiles, batch_size: int = 64, *, threads: int | None = None
) -> Iterator[tuple[Int[np.ndarray, "B 2"], UInt8[np.ndarray, "B S S 3"]]]:
    """Batches of tiles in their order, decoded on threads; the last one may be smaller.

    At most one batch and four tiles a thread are read ahead.

    Args:
      threads: one for each core by default.

    Raises:
      UnreadableImage: a part of the slide is damaged.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    return _stream(slide, tiles, batch_size, threads)


def _stream(slide: Slide, tiles: Tiles, batch_size: int, threads: int) -> Iterator:
    pool = ThreadPoolExecutor(threads, "tiles")
    waiting: collections.deque[Future] = collections.deque()
    order = iter(range(len(tiles)))

    def ask(count: int) -> None:
        for index in itertools.islice(order, count):
            waiting.append(pool.submit(read_tile, slide, tiles, index))

    try:
        ask(batch_size + 4 * threads)
        for start in range(0, len(tiles), batch_size):
            coords = tiles.coords[start : start + batch_size]
            images = np.empty((len(coords), tiles.tile_size, tiles.tile_size, 3), np.uint8)
            for row in range(len(coords)):
                images[row] = waiting.popleft().result()
                ask(1)
            yield coords, images
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
