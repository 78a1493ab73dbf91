"""Decoding: bytes, files and arrays of any kind to uint8 `[Y, X, C]`."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from vitjax.data import dicom, jpeg
from vitjax.data.dicom import is_dicom
from vitjax.data.jpeg import Region
from vitjax.errors import InputError, UnreadableImage

ImageFile.LOAD_TRUNCATED_IMAGES = False
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".dcm",
    ".dicom",
)  # fmt: skip


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Grey or RGB, whatever the file held; transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit
        image = Image.fromarray(_stretched(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width, from the header alone where the format allows.

    Raises:
      UnreadableImage: the bytes are no image.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if jpeg.is_jpeg(image) and (found := jpeg.size(image)):
        return found
    if is_dicom(image):
        return dicom.size(image)
    with _opened(image) as opened:
        return opened.height, opened.width


def decode(
    image: bytes | np.ndarray,
    channels: int,
    region: Region | None = None,
    least: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "Y X C"]:
    """Decodes one image, or a region of it, to 1 (grey) or 3 (RGB) channels.

    Args:
      image: an encoded file (JPEG, PNG, BMP, GIF, WebP, TIFF, PNM, DICOM), or a uint8 or uint16
        array `[Y, X]`, `[Y, X, 1]`, `[Y, X, 3]` or `[Y, X, 4]`. Of several frames the first counts;
        of a DICOM file there may be only one.
      region: (left, top, width, height); all of it by default.
      least: (height, width): a JPEG's region of twice this or more may be decoded smaller.

    Raises:
      UnreadableImage: the bytes are no image, or a damaged one.
    """
    if isinstance(image, np.ndarray):
        return _cut(_from_array(image, channels), region)
    if jpeg.is_jpeg(image) and (pixels := jpeg.decode(image, region, least)) is not None:
        if pixels.shape[2] == channels:
            return pixels
        return _channels_of(Image.fromarray(_flat(pixels)), channels)
    if is_dicom(image):
        return _cut(_from_array(_dicom_frame(image), channels), region)
    with _opened(image) as opened:
        try:
            array = _channels_of(opened, channels)
        except Exception as error:  # Pillow's decoders raise nearly every type there is
            raise UnreadableImage(str(error) or type(error).__name__) from error
    return _cut(array, region)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is no matter
        try:
            opened = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:  # whose words are of a place in memory
            raise UnreadableImage("it is no image of a kind that is read") from error
        except Exception as error:
            raise UnreadableImage(str(error) or type(error).__name__) from error
        with opened:
            yield opened


def _cut(array: np.ndarray, region: Region | None) -> np.ndarray:
    if region is None:
        return array
    left, top, width, height = region
    return array[top : top + height, left : left + width]


def _flat(array: np.ndarray) -> np.ndarray:
    """What Pillow makes an image of: grey has two dimensions there."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _channels_of(image: Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(to_channels(image, channels))
    return array if array.ndim == 3 else array[..., None]


def _from_array(image: np.ndarray, channels: int) -> np.ndarray:
    if image.dtype == np.uint16:
        image = _stretched(image)
    if image.dtype != np.uint8:
        raise UnreadableImage(f"an array of {image.dtype}, not uint8 or uint16")
    if image.ndim == 3 and image.shape[2] == channels:
        return image
    if image.ndim == 2 and channels == 1:
        return image[..., None]
    return _channels_of(Image.fromarray(_flat(image)), channels)


def _stretched(values: np.ndarray) -> np.ndarray:
    """The used range of 16 or 32 bits to 0..255."""
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)


def _dicom_frame(file: bytes) -> np.ndarray:
    """The only frame of a DICOM file as the file asks it to be shown."""
    frames = dicom.num_frames(dicom.header(file))
    if frames != 1:
        raise UnreadableImage(f"it has {frames} frames; one is expected")
    return dicom.shown(file)


def read_file(path: Path, channels: int) -> UInt8[np.ndarray, "Y X C"]:
    """Reads an image file of any kind that `vitjax predict` takes."""
    try:
        return decode(path.read_bytes(), channels)
    except UnreadableImage as error:
        raise InputError(f"cannot read {path} as an image: {error}") from error
