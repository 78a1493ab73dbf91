"""The part of a JPEG that a crop needs, decoded by libjpeg-turbo.

TurboJPEG's third interface decodes a region: rows above it are passed over without their transform,
rows below it are not read, columns beside it are not transformed. It comes with the package
`turbojpeg`, or as a library of the system; where there is neither, Pillow decodes whole images.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import logging
import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vitjax.errors import UnreadableImage

log = logging.getLogger("vitjax")
Region = tuple[int, int, int, int]  # left, top, width, height

# From turbojpeg.h.
DECOMPRESS, SUBSAMPLING, WIDTH, HEIGHT, PRECISION, COLOURSPACE = 1, 4, 5, 6, 7, 8
RGB, GREY = 0, 6  # pixel formats
IS_RGB, IS_YCBCR, IS_GREY = 0, 1, 2  # colour spaces of a file
BLOCKS = ((8, 8), (16, 8), (16, 16), (8, 8), (8, 16), (32, 8), (8, 32))  # by the subsampling


class _Box(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Scale(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


@functools.cache
def library() -> Any:
    """TurboJPEG's shared library, or None where there is none of version 3."""
    names = []
    try:
        files = importlib.metadata.files("turbojpeg") or []
        names = [str(f.locate()) for f in files if "libturbojpeg" in f.name.lower()
                 or (f.name.lower().startswith("turbojpeg") and f.suffix == ".dll")]  # fmt: skip
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in (*names, ctypes.util.find_library("turbojpeg")):
        try:
            # Short calls keep the interpreter's lock; to give it up and wait for it costs more.
            found: Any = ctypes.PyDLL(name) if name else None
            if found is None or not hasattr(found, "tj3SetCroppingRegion"):
                continue
        except OSError:
            continue
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        data = (pointer, ctypes.c_char_p, ctypes.c_size_t)
        found.tj3Init.restype, found.tj3Init.argtypes = pointer, (integer,)
        found.tj3Destroy.restype, found.tj3Destroy.argtypes = None, (pointer,)
        found.tj3Get.argtypes = (pointer, integer)
        found.tj3DecompressHeader.argtypes = data
        found.tj3SetCroppingRegion.argtypes = (pointer, _Box)
        found.tj3SetScalingFactor.argtypes = (pointer, _Scale)
        found.decompress = ctypes.CDLL(name).tj3Decompress8
        found.decompress.argtypes = (*data, pointer, integer, integer)
        found.tj3GetErrorStr.restype, found.tj3GetErrorStr.argtypes = ctypes.c_char_p, (pointer,)
        return found
    log.warning("no libjpeg-turbo of version 3 (pip install turbojpeg): JPEGs are decoded whole")
    return None


class _Handle:
    """A decompressor; each thread has its own."""

    def __init__(self, found: Any):
        self.library, self.pointer = found, found.tj3Init(DECOMPRESS)
        self.fresh: bytes | None = None  # the file whose header was read last, if nothing else
        self._destroy = found.tj3Destroy

    def __del__(self):
        self._destroy(self.pointer)


_threads = threading.local()


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _open(data: bytes) -> _Handle | None:
    """A decompressor that has read the header, if this is a file for it."""
    found, handle = library(), getattr(_threads, "handle", None)
    if found is None or b"\xff\xd9" not in data[-2048:]:  # cut off: Pillow says so
        return None
    if handle is None:
        handle = _threads.handle = _Handle(found)
    if handle.fresh is data:
        return handle
    handle.fresh = None
    found.tj3SetCroppingRegion(handle.pointer, _Box(0, 0, 0, 0))
    found.tj3SetScalingFactor(handle.pointer, _Scale(1, 1))
    if found.tj3DecompressHeader(handle.pointer, data, len(data)):
        return None
    is_plain = (
        found.tj3Get(handle.pointer, COLOURSPACE) in (IS_RGB, IS_YCBCR, IS_GREY)
        and found.tj3Get(handle.pointer, PRECISION) == 8
        and 0 <= found.tj3Get(handle.pointer, SUBSAMPLING) < len(BLOCKS)
    )
    if not is_plain:
        return None
    handle.fresh = data
    return handle


def size(data: bytes) -> tuple[int, int] | None:
    """Height and width, or None if this is no JPEG for `decode`."""
    handle = _open(data)
    if handle is None:
        return None
    get = handle.library.tj3Get
    return get(handle.pointer, HEIGHT), get(handle.pointer, WIDTH)


def decode(
    data: bytes, region: Region | None = None, least: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "Y X C"] | None:
    """Decodes a region: bit for bit what decoding the whole image (by Pillow) has there.

    Args:
      data: the file.
      region: (left, top, width, height); all of it by default.
      least: (height, width). A region of at least twice this is decoded at a half, a quarter or an
        eighth of its size, which libjpeg does within the transform; never to less than this.

    Returns:
      One channel of a grey file, three of another; None if this is no JPEG for this decoder.

    Raises:
      UnreadableImage: the region is damaged.
    """
    handle = _open(data)
    if handle is None:
        return None
    found, pointer, handle.fresh = handle.library, handle.pointer, None
    total = found.tj3Get(pointer, WIDTH), found.tj3Get(pointer, HEIGHT)
    left, top, width, height = region or (0, 0, *total)
    divisor = 1
    while least and divisor < 8 and min(height // least[0], width // least[1]) >= 2 * divisor:
        divisor *= 2
    if divisor > 1:
        found.tj3SetScalingFactor(pointer, _Scale(1, divisor))
        total = tuple(-(-n // divisor) for n in total)
        left, top, width, height = (n // divisor for n in (left, top, width, height))
    block = BLOCKS[found.tj3Get(pointer, SUBSAMPLING)][0] // divisor
    # One column more on each side: colours are interpolated from their neighbours.
    first = max(0, left - 1) // max(block, 1) * max(block, 1)
    last = min(total[0], left + width + 1)
    is_grey = found.tj3Get(pointer, COLOURSPACE) == IS_GREY
    pixels = np.empty((height, last - first, 1 if is_grey else 3), np.uint8)
    box = _Box(first, top, last - first, height)
    if found.tj3SetCroppingRegion(pointer, box):
        return None
    where, kind = pixels.ctypes.data, GREY if is_grey else RGB
    if found.decompress(pointer, data, len(data), where, 0, kind):
        reason = found.tj3GetErrorStr(pointer).decode(errors="replace")
        if "extraneous bytes" not in reason:  # these harm nothing, and some cameras write them
            raise UnreadableImage(reason)
    return pixels[:, left - first : left - first + width]
