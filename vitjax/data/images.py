"""Decoding: bytes, files and arrays of any kind to uint8 `[Y, X, C]`."""

import io
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from vitjax.errors import InputError

ImageFile.LOAD_TRUNCATED_IMAGES = False
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class UnreadableImage(Exception):
    """One example cannot be decoded; the loader counts these and goes on."""


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Grey or RGB, whatever the file held; transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit: stretch the used range
        values = np.asarray(image, np.float32)
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / max(high - low, 1e-12))
        image = Image.fromarray(scaled.round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if channels == 1 else "RGB")


def decode(image: bytes | np.ndarray, channels: int) -> UInt8[np.ndarray, "Y X C"]:
    """Decodes one image to 1 (grey) or 3 (RGB) channels.

    Args:
      image: an encoded file, or uint8 `[Y, X]`, `[Y, X, 1]`, `[Y, X, 3]` or `[Y, X, 4]`.

    Raises:
      UnreadableImage: the bytes are no image, or a damaged one.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UnreadableImage(f"an array of {image.dtype}, not uint8")
        if image.ndim == 3 and image.shape[2] == channels:
            return image
        if image.ndim == 2 and channels == 1:
            return image[..., None]
        opened = Image.fromarray(
            image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        )
        array = np.asarray(to_channels(opened, channels))
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is no matter
                with Image.open(io.BytesIO(image)) as opened:
                    array = np.asarray(to_channels(opened, channels))
        except Exception as error:  # Pillow's decoders raise nearly every type there is
            raise UnreadableImage(str(error) or type(error).__name__) from error
    return array if array.ndim == 3 else array[..., None]


def read_dicom(path: Path, channels: int) -> UInt8[np.ndarray, "Y X C"]:
    """One DICOM frame as the file asks it to be shown (rescale, window, MONOCHROME1 inverted)."""
    try:
        import pydicom  # pyright: ignore[reportMissingImports]
        from pydicom.pixels import (  # pyright: ignore[reportMissingImports]
            apply_modality_lut,
            apply_voi_lut,
        )
    except ImportError as error:
        raise InputError(f"{path} is a DICOM file: pip install 'vitjax[medical]'") from error
    try:
        data = pydicom.dcmread(path)
        pixels = data.pixel_array
    except Exception as error:  # missing codecs, missing pixel data, damaged files
        raise InputError(f"cannot read the pixels of {path}: {error}") from error
    if pixels.ndim > 2 and data.get("NumberOfFrames", 1) not in (None, 1):
        raise InputError(f"{path} has {data.NumberOfFrames} frames; one is expected")
    if pixels.ndim == 2:
        pixels = apply_voi_lut(apply_modality_lut(pixels, data), data).astype(np.float32)
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) * (255.0 / max(high - low, 1e-12))
        if data.PhotometricInterpretation == "MONOCHROME1":
            pixels = 255.0 - pixels
    return decode(pixels.round().astype(np.uint8), channels)


def read_file(path: Path, channels: int) -> UInt8[np.ndarray, "Y X C"]:
    """Reads an image file of any kind that `vitjax predict` takes."""
    if path.suffix.lower() in (".dcm", ".dicom"):
        return read_dicom(path, channels)
    try:
        return decode(path.read_bytes(), channels)
    except UnreadableImage as error:
        raise InputError(f"cannot read {path} as an image: {error}") from error
