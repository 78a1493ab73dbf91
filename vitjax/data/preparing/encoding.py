"""How a prepared data set holds an image: its own bytes, or a smaller JPEG."""

import dataclasses
import hashlib
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitjax.data.images import decode
from vitjax.data.preparing.statistics import GREY_KINDS, kind_of, pixel_sums
from vitjax.errors import UnreadableImage

JPEG_LARGEST = 65_500  # pixels along a side, by libjpeg


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images are written.

    Attributes:
      short_side: in pixels; a larger image is shrunk to it. None keeps every file as it is.
      quality: of the JPEGs that are written.
      channels: 1 (grey) or 3 (RGB): as what images are compared and measured.
    """

    short_side: int | None
    quality: int
    channels: int


@dataclasses.dataclass
class Written:
    """An image as it is written, and what is known of it."""

    data: bytes
    pixel_hash: bytes
    kind: str
    source_size: tuple[int, int]
    size: tuple[int, int]
    sums: np.ndarray


def _png(image: np.ndarray, pixels: np.ndarray) -> bytes:
    """An array, losslessly; 16 bits in several channels, which PNG by Pillow has not, as 8."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if flat.dtype == np.uint16 and flat.ndim == 3:
        flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    file = io.BytesIO()
    Image.fromarray(flat).save(file, "png")
    return file.getvalue()


def _shrunk(pixels: UInt8[np.ndarray, "Y X C"], encoding: Encoding, is_grey: bool) -> bytes:
    """The image with its shorter side as asked, by Lanczos with antialiasing, as a JPEG.

    Colour is stored at half its size (4:2:0), as cameras do: decoding is fastest so, and shrinking
    has kept of the colours of most files all there is.
    """
    height, width = pixels.shape[:2]
    short = encoding.short_side or 0
    scale = short / min(height, width)
    size = (short, max(short, round(height * scale)))
    if width >= height:
        size = (max(short, round(width * scale)), short)
    flat = pixels[..., 0] if is_grey or pixels.shape[2] == 1 else pixels
    resized = Image.fromarray(flat).resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(size) > JPEG_LARGEST:
        resized.save(file, "png")
    else:
        resized.save(file, "jpeg", quality=encoding.quality, subsampling="4:2:0")
    return file.getvalue()


def reason(error: UnreadableImage) -> str:
    """Why an image cannot be read, in one line."""
    return " ".join(str(error).split())


def encode(image: bytes | np.ndarray, encoding: Encoding) -> Written:
    """One image as it is to be written, decoded whole to see that it can be.

    Raises:
      UnreadableImage: it cannot.
    """
    pixels = decode(image, encoding.channels)
    if not pixels.size:
        raise UnreadableImage(f"it has no pixels: {pixels.shape}")
    kind = kind_of(image)
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    source_size = size = pixels.shape[:2]
    if encoding.short_side is not None and min(source_size) > encoding.short_side:
        data = _shrunk(pixels, encoding, kind in GREY_KINDS)
        pixels = decode(data, encoding.channels)
        size = pixels.shape[:2]
    else:
        data = _png(image, pixels) if isinstance(image, np.ndarray) else bytes(image)
    return Written(data, digest.digest(), kind, source_size, size, pixel_sums(pixels))
