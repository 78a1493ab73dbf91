"""TIFFs that OpenSlide does not read: strips, sub-IFDs, one plain image.

tifffile finds the levels and where their tiles or strips lie; each is decoded alone, by Pillow.
"""

import collections
import io
import re
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.slides.slide import CACHE_BYTES, extra, stated_resolution

WHITE = 255
LARGEST_SEGMENT = 2**26  # pixels that are decoded at once
HORIZONTAL = 2  # TIFF's predictor of differences
PICTURES = (0, 1, 2, 6)  # photometric interpretations: grey from white or black, RGB, YCbCr
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS = (
    256, 257, 258, 259, 262, 273, 277, 278, 279,
)  # fmt: skip
PREDICTOR, EXTRA_SAMPLES, JPEG_TABLES, SUBSAMPLING = 317, 338, 347, 530
LONG = (WIDTH, HEIGHT, OFFSETS, ROWS, COUNTS)
SHORT, FOUR_BYTES, BYTES = (3, "H"), (4, "I"), (7, "B")  # types of values


def _alone(page: Any, data: bytes, width: int, height: int) -> Image.Image:
    """A tile or strip as an image of its own: the same bytes under a header of one strip."""
    samples = int(page.samplesperpixel)
    entries: dict[int, tuple[int, ...] | bytes] = {
        WIDTH: (width,), HEIGHT: (height,), BITS: (8,) * samples,
        COMPRESSION: (int(page.compression),), PHOTOMETRIC: (int(page.photometric),),
        OFFSETS: (8,), SAMPLES: (samples,), ROWS: (height,), COUNTS: (len(data),),
    }  # fmt: skip
    if page.predictor == HORIZONTAL:
        entries[PREDICTOR] = (HORIZONTAL,)
    if page.jpegtables is not None:
        entries[JPEG_TABLES] = bytes(page.jpegtables)
    for tag in (SUBSAMPLING, EXTRA_SAMPLES):
        if tag in page.tags:
            entries[tag] = tuple(int(v) for v in np.atleast_1d(page.tags[tag].value))
    # The header, the data, the directory, and what does not fit into the directory's four bytes.
    data += bytes(len(data) % 2)
    directory = 8 + len(data)
    beyond_at = directory + 2 + 12 * len(entries) + 4
    listed, beyond = struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        kind = BYTES if isinstance(values, bytes) else FOUR_BYTES if tag in LONG else SHORT
        packed = struct.pack(f"<{len(values)}{kind[1]}", *values)
        listed += struct.pack("<HHI", tag, kind[0], len(values))
        if len(packed) <= 4:
            listed += packed.ljust(4, b"\0")
        else:
            listed += struct.pack("<I", beyond_at + len(beyond))
            beyond += packed
    start = struct.pack("<2sHI", b"II", 42, directory)
    return Image.open(io.BytesIO(start + data + listed + bytes(4) + beyond), formats=["TIFF"])


class _Level:
    """One resolution: where its tiles or strips lie, and the whole of it if it is not packed."""

    def __init__(self, page: Any, path: Path):
        self.page = page
        self.width, self.height = int(page.imagewidth), int(page.imagelength)
        shape = (page.tilewidth, page.tilelength) if page.is_tiled else None
        self.columns, self.rows = shape or (self.width, min(page.rowsperstrip, self.height))
        self.across = -(-self.width // self.columns)
        self.plain = None
        samples = (self.samples,) if self.samples > 1 else ()
        if page.is_memmappable:
            offset, whole = page.dataoffsets[0], (self.height, self.width, *samples)
            self.plain = np.memmap(path, np.uint8, "r", offset, whole)
        elif self.columns * self.rows > LARGEST_SEGMENT:
            raise InputError(
                f"{path} holds {self.columns} x {self.rows} pixels in one compressed piece, which "
                "would have to be decoded whole; write it as a tiled TIFF"
            )

    @property
    def samples(self) -> int:
        return int(self.page.samplesperpixel)


def _refusal(page: Any) -> str:
    """Why a page is no picture of a slide; "" if it is one."""
    if page.bitspersample != 8 or page.sampleformat != 1:
        return f"has {page.bitspersample} bits a sample; allowed: 8, unsigned"
    if page.samplesperpixel not in (1, 3, 4) or page.photometric not in PICTURES:
        return f"is neither grey nor RGB: {page.samplesperpixel} samples, {page.photometric!r}"
    if page.planarconfig != 1 and page.samplesperpixel > 1:
        return "stores its colours in separate planes; allowed: contiguous"
    return "is a stack of images" if page.imagedepth > 1 else ""


def _pages(file: Any) -> list[Any]:
    """The largest page and the smaller versions of it, the largest first."""
    found = [level.keyframe for series in file.series for level in series.levels]
    found = [page for page in found if page.imagewidth and page.imagelength]
    if not found:
        return []
    found.sort(key=lambda page: -page.imagewidth * page.imagelength)
    base, kept = found[0], [found[0]]
    for page in found[1:]:
        ratio = page.imagewidth * base.imagelength / (page.imagelength * base.imagewidth)
        is_level = page.is_tiled or page.is_reduced or not base.is_tiled
        is_smaller = page.imagewidth < kept[-1].imagewidth
        slack = 0.02 + 1 / page.imagewidth + 1 / page.imagelength  # rounded sides
        if is_level and is_smaller and abs(ratio - 1) < slack and not _refusal(page):
            kept.append(page)
    return kept


def _resolution(file: Any, page: Any) -> float | None:
    """Microns per pixel by OME's metadata, Aperio's description, or the resolution tags."""
    if file.ome_metadata:
        size = re.search(r'PhysicalSizeX="([\d.eE+-]+)"', file.ome_metadata)
        unit = re.search(r'PhysicalSizeXUnit="([^"]*)"', file.ome_metadata)
        microns = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
        if size and (unit is None or unit[1] in microns):
            return float(size[1]) * microns[unit[1] if unit else "µm"] or None
    if stated := re.search(r"\bMPP\s*=\s*([\d.]+)", page.description or ""):
        return float(stated[1]) or None
    tags = page.tags
    if "XResolution" not in tags:
        return None
    above, below = tags["XResolution"].value
    unit = int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 2
    return stated_resolution(above / below if below else None, unit)


class TiffSlide:
    """A plain or pyramidal TIFF; safe to use from many threads.

    Raises:
      InputError: not a TIFF, a damaged one, or one whose pixels are not 8-bit grey or RGB.
    """

    def __init__(self, path: Path):
        tifffile = extra("tifffile", f"reading {path.name}")
        try:
            self._file = tifffile.TiffFile(path)
        except Exception as error:  # tifffile's and struct's, of many kinds
            raise InputError(f"{path} is no TIFF that can be read: {error}") from error
        try:
            pages = _pages(self._file)
            if not pages:
                raise InputError(f"{path} holds no image")
            if why := _refusal(pages[0]):
                raise InputError(f"{path} {why}")
            end = path.stat().st_size
            for page in pages:
                if max(a + b for a, b in zip(page.dataoffsets, page.databytecounts)) > end:  # noqa: B905
                    raise InputError(f"{path} is damaged: it is shorter than it says")
            self._levels = [_Level(page, path) for page in pages]
            self.microns_per_pixel = _resolution(self._file, pages[0])
        except InputError:
            self._file.close()
            raise
        except Exception as error:  # at tags that are cut off
            self._file.close()
            raise InputError(f"{path} is damaged: {error}") from error
        self.levels = tuple((level.width, level.height) for level in self._levels)
        self._handle = path.open("rb")
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[tuple[int, int], np.ndarray] = (
            collections.OrderedDict()
        )
        self._cached_bytes = 0

    def close(self) -> None:
        self._file.close()
        self._handle.close()
        self._cache.clear()

    def read(
        self, x: int, y: int, width: int, height: int, level: int
    ) -> UInt8[np.ndarray, "Y X 3"]:
        """See `Slide.read`; a corner between two pixels of the level is the nearest one."""
        at, (whole_width, whole_height) = self._levels[level], self.levels[0]
        factor = (whole_width / at.width + whole_height / at.height) / 2
        left, top = round(x / factor), round(y / factor)
        out = np.full((height, width, 3), WHITE, np.uint8)
        x0, x1 = max(left, 0), min(left + width, at.width)
        y0, y1 = max(top, 0), min(top + height, at.height)
        if x0 >= x1 or y0 >= y1:
            return out
        inside = out[y0 - top : y1 - top, x0 - left : x1 - left]
        if at.plain is not None:
            inside[:] = _to_rgb(np.asarray(at.plain[y0:y1, x0:x1]), at.page)
            return out
        for row in range(y0 // at.rows, -(-y1 // at.rows)):
            for column in range(x0 // at.columns, -(-x1 // at.columns)):
                piece = self._piece(level, row * at.across + column)
                if piece is None:
                    continue
                px, py = column * at.columns, row * at.rows
                a0, a1 = max(x0, px), min(x1, px + piece.shape[1])
                b0, b1 = max(y0, py), min(y1, py + piece.shape[0])
                part = piece[b0 - py : b1 - py, a0 - px : a1 - px]
                inside[b0 - y0 : b1 - y0, a0 - x0 : a1 - x0] = part
        return out

    def _piece(self, level: int, index: int) -> np.ndarray | None:
        """A decoded tile or strip, from the cache if it is there; None if it was left out."""
        key = (level, index)
        at = self._levels[level]
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            if index >= len(at.page.dataoffsets):
                raise UnreadableImage(f"piece {index} is missing")
            count = int(at.page.databytecounts[index])
            if count == 0:
                return None
            self._handle.seek(int(at.page.dataoffsets[index]))
            data = self._handle.read(count)
        if len(data) < count:
            raise UnreadableImage("the file ends too early")
        rows = at.rows if at.page.is_tiled else min(at.rows, at.height - index * at.rows)
        try:
            with _alone(at.page, data, at.columns, rows) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's, of many kinds
            raise UnreadableImage(f"piece {index} cannot be decoded: {error}") from error
        with self._lock:
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels


def _to_rgb(pixels: np.ndarray, page: Any) -> np.ndarray:
    """Values of an unpacked page as RGB; "min is white" is turned round."""
    if pixels.ndim == 2:
        pixels = 255 - pixels if page.photometric == 0 else pixels
        return np.repeat(pixels[..., None], 3, -1)
    return pixels[..., :3]
