"""Opening a whole-slide image and reading regions of it: `Slide`.

OpenSlide reads what scanners write; a TIFF that it does not read (no tiles, levels in sub-IFDs)
is read here, see `vitjax.medical.slides.tiff`.
"""

import importlib
import os
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from vitjax.errors import InputError, UnreadableImage, suggest

READERS = ("auto", "openslide", "tifffile")
EXTENSIONS = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".svslide", ".bif", ".czi",
)  # fmt: skip
CACHE_BYTES = 2**26  # of decoded tiles, for each open slide
COARSEST_STATED = 20.0  # microns a pixel; more is a printer's 72 dpi, not a microscope's
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LARGE = 8192  # pixels of a side; a slide that is larger has levels, unless they were overlooked


def extra(module: str, what: str) -> Any:
    """Imports a package of the extra "medical", or says how to get it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a C library that does not load
        raise InputError(f"{what} needs: pip install 'vitjax[medical]' ({error})") from error


def stated_resolution(pixels: float | None, unit: str | int | None) -> float | None:
    """Microns per pixel from a TIFF's XResolution, or None where it says nothing of a microscope.

    Args:
      pixels: in one unit.
      unit: "centimeter" or 3, "inch" or 2.
    """
    microns = {"centimeter": 1e4, "3": 1e4, "inch": 25400.0, "2": 25400.0}.get(str(unit).lower())
    if not pixels or microns is None:
        return None
    found = microns / pixels
    return found if found <= COARSEST_STATED else None


class _OpenSlide:
    """A slide by OpenSlide, which is thread safe itself."""

    def __init__(self, path: Path):
        openslide = extra("openslide", f"reading {path.name}")
        self._error = openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(os.fspath(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise InputError(f"{path} is no slide that OpenSlide reads") from error
        except openslide.OpenSlideError as error:
            raise InputError(f"{path} is damaged: {error}") from error
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.levels: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        found = self._slide.properties
        self.vendor = found.get("openslide.vendor", "")
        colour = found.get("openslide.background-color", "FFFFFF")
        self._background = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], np.float32)
        try:
            steps = [float(found[f"openslide.mpp-{side}"]) for side in "xy"]
            stated = float(np.sqrt(steps[0] * steps[1]))
            self.microns_per_pixel = stated if 0 < stated <= COARSEST_STATED else None
        except (KeyError, ValueError):
            pixels = float(found.get("tiff.XResolution", 0) or 0)
            unit = found.get("tiff.ResolutionUnit")
            self.microns_per_pixel = stated_resolution(pixels, unit)

    def read(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
        try:
            region = np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except self._error as error:
            raise UnreadableImage(str(error)) from error
        pixels, alpha = region[..., :3], region[..., 3]
        if alpha.min() == 255:
            return np.ascontiguousarray(pixels)
        share = alpha[..., None].astype(np.float32) / 255
        return np.rint(pixels * share + self._background * (1 - share)).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _open(path: Path, reader: str) -> Any:
    """A reader of the file: OpenSlide's, unless only tifffile reads it or sees its levels."""
    from vitjax.medical.slides.tiff import TiffSlide

    is_tiff = _start(path) in TIFF_STARTS
    if reader == "openslide":
        return _OpenSlide(path)
    if reader == "tifffile":
        return TiffSlide(path)
    try:
        opened = _OpenSlide(path)
    except InputError as error:
        if not is_tiff:
            raise
        try:
            return TiffSlide(path)
        except InputError as second:
            raise InputError(f"{error}; {second}") from second
    if opened.vendor == "generic-tiff" and len(opened.levels) == 1:
        if max(opened.levels[0]) < LARGE:
            return opened
        try:  # levels in sub-IFDs, as in OME-TIFF, are not seen by OpenSlide
            other = TiffSlide(path)
        except InputError:
            return opened
        if len(other.levels) > 1:
            opened.close()
            return other
        other.close()
    return opened


class Slide:
    """A whole-slide image, of which regions are read; safe to use from many threads.

    Attributes:
      path: of the file.
      size: width and height of level 0, in pixels.
      levels: width and height of each level, the largest first.
      downsamples: how many pixels of level 0 one of each level stands for.
      microns_per_pixel: of level 0, or None where the file does not say.
    """

    def __init__(self, path: str | Path, *, reader: str = "auto"):
        """Opens a slide.

        Args:
          reader: "openslide", "tifffile", or "auto" for the one that reads the file.

        Raises:
          InputError: no such file, or none that is a slide; the file is damaged; a package lacks.
        """
        self.path = Path(path)
        if reader not in READERS:
            raise InputError(f"unknown reader {reader!r}; {suggest(reader, READERS)}")
        if not self.path.is_file():
            raise InputError(f"no such slide: {path}")
        self._reader = _open(self.path, reader)
        self._lock, self._is_open = threading.Lock(), True
        self.levels: tuple[tuple[int, int], ...] = self._reader.levels
        self.size = self.levels[0]
        self.downsamples = tuple(
            (self.size[0] / width + self.size[1] / height) / 2 for width, height in self.levels
        )
        self.microns_per_pixel: float | None = self._reader.microns_per_pixel

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up the file; nothing can be read after that."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._reader.close()

    def read(
        self, x: int, y: int, width: int, height: int, level: int = 0
    ) -> UInt8[np.ndarray, "Y X 3"]:
        """A region of a level; white where it lies outside the slide or nothing was scanned.

        Args:
          x, y: of the region's upper left corner, in pixels of level 0 (OpenSlide's convention).
          width, height: of the region, in pixels of `level`.

        Raises:
          InputError: no such level, an empty region, or the slide is closed.
          UnreadableImage: this part of the file is damaged.
        """
        if not self._is_open:
            raise InputError(f"{self.path} is closed")
        if not 0 <= level < len(self.levels):
            raise InputError(f"level {level} of {self.path}: it has 0 to {len(self.levels) - 1}")
        if width < 1 or height < 1:
            raise InputError(f"a region of {width} x {height} pixels is empty")
        try:
            return self._reader.read(int(x), int(y), int(width), int(height), level)
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.path} at ({x}, {y}), level {level}: {error}") from error

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is not coarser than that."""
        allowed = [i for i, found in enumerate(self.downsamples) if found <= downsample * 1.001]
        return allowed[-1] if allowed else 0

    def thumbnail(self, max_side: int = 2048) -> UInt8[np.ndarray, "Y X 3"]:
        """The whole slide, its longer side at most that many pixels, averaged over areas.

        It is read in blocks: memory is bounded even where the file has a single level.
        """
        if max_side < 1:
            raise InputError(f"max_side must be positive, got {max_side}")
        factor = max(1.0, max(self.size) / max_side)
        level = self.level_for(factor)
        whole_width, whole_height = self.levels[level]
        columns, rows = (max(1, round(side / factor)) for side in self.size)
        across, down = whole_width / columns, whole_height / rows
        block = max(1, int(2048 / max(across, down)))
        pixels = np.empty((rows, columns, 3), np.uint8)
        for top in range(0, rows, block):
            for left in range(0, columns, block):
                bottom, right = min(top + block, rows), min(left + block, columns)
                x0, x1 = round(left * across), max(round(right * across), round(left * across) + 1)
                y0, y1 = round(top * down), max(round(bottom * down), round(top * down) + 1)
                corner = (round(x0 * self.downsamples[level]), round(y0 * self.downsamples[level]))
                part = self.read(*corner, x1 - x0, y1 - y0, level)
                size = (right - left, bottom - top)
                pixels[top:bottom, left:right] = cv2.resize(
                    part, size, interpolation=cv2.INTER_AREA
                )
        return pixels
