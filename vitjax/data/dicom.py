"""DICOM files: frames as they are to be shown, 8 bits a sample.

Source: DICOM PS3.3, C.11.1 (modality LUT), C.11.2 (VOI LUT and windows), C.7.6.3 (pixels).
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vitjax.errors import InputError, UnreadableImage, suggest

PRESETS = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (40.0, 400.0),
    "abdomen": (75.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
}  # centre and width in Hounsfield units
Window = str | int | Sequence[float] | None
JPEG, JPEG_2000 = "pylibjpeg pylibjpeg-libjpeg", "pylibjpeg pylibjpeg-openjpeg"
PACKAGES = {
    **dict.fromkeys((50, 51, 57, 70, 80, 81), JPEG),
    **dict.fromkeys((90, 91, 201, 202, 203), JPEG_2000),
}  # by the last number of 1.2.840.10008.1.2.4.x
COMPRESSED = "1.2.840.10008.1.2.4."


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def check_window(window: Window) -> None:
    """Raises InputError if it is no preset's name, no number of a window and no (centre, width)."""
    if window is None or (isinstance(window, int) and window >= 0):
        return
    if isinstance(window, str):
        if window not in PRESETS:
            raise InputError(f"unknown window {window!r}; {suggest(window, PRESETS)}")
    elif isinstance(window, int) or len(window) != 2 or not window[1] >= 1:
        raise InputError(
            f"window is {window!r}; allowed: (centre, width of at least 1), the number of one of "
            f"the file's own, or one of {', '.join(PRESETS)}"
        )


def header(file: bytes | str) -> Any:
    """The data set of a file, or of the path of one, without its pixels.

    Raises:
      UnreadableImage: it is no DICOM file, or a damaged one.
    """
    pydicom = _pydicom()
    try:
        start = file[:132] if isinstance(file, bytes) else _start(file)
    except OSError as error:
        raise UnreadableImage(f"{error.strerror}: {error.filename}") from error
    if not is_dicom(start):
        raise UnreadableImage("it is no DICOM file: DICM does not stand at byte 128")
    with _quiet():
        try:
            return pydicom.dcmread(_source(file), stop_before_pixels=True)
        except Exception as error:  # damaged files raise nearly every type there is
            raise UnreadableImage(f"cannot read its header: {_line(error)}") from error


def size(file: bytes | str) -> tuple[int, int]:
    """Height and width, from the header alone."""
    with _quiet():
        data = with_pixels(header(file))
        return int(data.Rows), int(data.Columns)


def num_frames(data: Any) -> int:
    with _quiet():
        try:
            return int(data.get("NumberOfFrames") or 1)
        except ValueError as error:
            raise UnreadableImage(f"its number of frames is none: {error}") from error


def shown(file: bytes | str, frame: int = 0, window: Window = None) -> UInt8[np.ndarray, "Y X C"]:
    """One frame as it is to be shown: grey (C = 1), or RGB.

    Args:
      file: its bytes or its path; of a path no more than the frame is read.
      window: of grey values after rescaling: (centre, width), a name of PRESETS, or the number of
        one of the file's own windows. By default what the file asks: its VOI LUT, or its first
        window, or the range of the frame.

    Raises:
      UnreadableImage: there is no such frame, or it cannot be read; what to install is told.
    """
    check_window(window)
    with _quiet():
        data = with_pixels(header(file))
        if not 0 <= frame < num_frames(data):
            raise UnreadableImage(f"there is no frame {frame}: it has {num_frames(data)}")
        pixels = _decoded(file, data, frame)
        colours = str(data.get("PhotometricInterpretation", ""))
        if pixels.ndim == 3 and pixels.shape[2] == 3:
            return _to_eight_bits(pixels, int(data.BitsStored))
        if pixels.ndim != 2:
            raise UnreadableImage(f"its frames are {pixels.shape}: neither grey nor of 3 samples")
        if colours == "PALETTE COLOR":
            return _through_palette(pixels, data)
        padding = _padding(pixels, data)
        grey = _windowed(_rescaled(pixels, data, frame), padding, data, frame, window)
    return (255 - grey if colours == "MONOCHROME1" else grey)[..., None]


def linear(
    values: Float[np.ndarray, "*shape"], centre: float, width: float
) -> Float[np.ndarray, "*shape"]:
    """A window of PS3.3 C.11.2.1.2.1: [0, 1], from centre - width/2 to centre + width/2 - 1."""
    scaled = (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    return np.clip(scaled, 0, 1).astype(np.float32)


def with_pixels(data: Any) -> Any:
    """The data set itself; raises UnreadableImage where it says of no pixels."""
    if not data.get("Rows") or not data.get("Columns"):
        name = getattr(data.get("SOPClassUID"), "name", None) or "of an unknown kind"
        raise UnreadableImage(f"it has no pixels: it is {name}")
    return data


def _decoded(file: bytes | str, data: Any, frame: int) -> np.ndarray:
    """Stored values of a frame, without bits above those stored; YBR is RGB."""
    from pydicom.pixels import get_decoder, pixel_array  # pyright: ignore[reportMissingImports]

    syntax = getattr(data, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax:
        raise UnreadableImage("it does not say its transfer syntax")
    try:
        is_read = get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise UnreadableImage(f"its transfer syntax, {syntax.name}, is not read") from error
    if not is_read:
        number = syntax.rpartition(".")[2] if syntax.startswith(COMPRESSED) else ""
        package = PACKAGES.get(int(number)) if number.isdigit() else None
        needs = f" needs: pip install {package}" if package else " is read by nothing installed"
        raise UnreadableImage(f"its transfer syntax, {syntax.name},{needs}")
    try:
        return np.asarray(pixel_array(_source(file), index=frame))
    except Exception as error:  # missing pixels, damaged ones
        raise UnreadableImage(f"cannot read its pixels: {_line(error)}") from error


def _rescaled(pixels: np.ndarray, data: Any, frame: int) -> Float[np.ndarray, "Y X"]:
    """Values with a meaning, such as Hounsfield units, whole until they are windowed."""
    if data.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut  # pyright: ignore[reportMissingImports]

        return apply_modality_lut(pixels, data).astype(np.float32)
    place = _place(data, frame, "PixelValueTransformationSequence")
    slope, intercept = _number(place.get("RescaleSlope")), _number(place.get("RescaleIntercept"))
    values = np.nan_to_num(pixels.astype(np.float32))
    return values * np.float32(1 if slope is None else slope) + np.float32(intercept or 0)


def _windowed(
    values: Float[np.ndarray, "Y X"], padding: np.ndarray, data: Any, frame: int, window: Window
) -> UInt8[np.ndarray, "Y X"]:
    place = _place(data, frame, "FrameVOILUTSequence")
    function = "LINEAR"
    if isinstance(window, str):
        window = PRESETS[window]
    if window is None and data.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi  # pyright: ignore[reportMissingImports]

        bits = data.VOILUTSequence[0].LUTDescriptor[2]
        return _to_eight_bits(apply_voi(values.round().astype(np.int32), data), bits)
    if window is None or isinstance(window, int):
        number, own = window, _own_windows(place)
        if number is not None and number >= len(own):
            raise UnreadableImage(f"there is no window {number}: it has {len(own)}")
        if not own:
            return _stretched(values, padding)
        window = own[number or 0]
        function = str(place.get("VOILUTFunction") or "LINEAR")
    centre, width = float(window[0]), float(window[1])
    if function == "SIGMOID":
        part = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / max(width, 1e-6), -80, 80)))
    elif function == "LINEAR_EXACT":
        part = np.clip((values - centre) / max(width, 1e-6) + 0.5, 0, 1)
    else:
        part = linear(values, centre, width)
    return (part * 255).round().astype(np.uint8)


def _own_windows(place: Any) -> list[tuple[float, float]]:
    centres, widths = (_numbers(place.get(f"Window{x}")) for x in ("Center", "Width"))
    return [(c, w) for c, w in zip(centres, widths, strict=False) if w > 0]


def _stretched(values: Float[np.ndarray, "Y X"], padding: np.ndarray) -> UInt8[np.ndarray, "Y X"]:
    """The range of the frame, without its padding, to 0..255."""
    used = values if padding.all() else values[~padding]
    low, high = float(used.min()), float(used.max())
    part = (values - low) / max(high - low, 1e-12)
    return (np.clip(part, 0, 1) * 255).round().astype(np.uint8)


def _padding(pixels: np.ndarray, data: Any) -> np.ndarray:
    """Where stored values say that nothing was there."""
    value = data.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(pixels.shape, bool)
    limit = data.get("PixelPaddingRangeLimit")
    limit = limit if isinstance(limit, int) else value
    return (pixels >= min(value, limit)) & (pixels <= max(value, limit))


def _through_palette(pixels: np.ndarray, data: Any) -> UInt8[np.ndarray, "Y X 3"]:
    try:
        if data.get("SegmentedRedPaletteColorLookupTableData"):
            from pydicom.pixels import apply_color_lut  # pyright: ignore[reportMissingImports]

            colours = np.asarray(apply_color_lut(pixels, data))[..., :3]
            return _to_eight_bits(colours, colours.dtype.itemsize * 8)
        tables = [_palette(pixels, data, colour) for colour in ("Red", "Green", "Blue")]
    except Exception as error:  # no palette, or a damaged one
        raise UnreadableImage(f"cannot use its palette: {_line(error)}") from error
    return np.stack(tables, -1)


def _palette(pixels: np.ndarray, data: Any, colour: str) -> UInt8[np.ndarray, "Y X"]:
    """One colour of a palette (C.7.6.3.1.5); its bytes are in the file's own order."""
    count, first, bits = data[f"{colour}PaletteColorLookupTableDescriptor"].value
    raw = data[f"{colour}PaletteColorLookupTableData"].value
    count = count or 65536
    order = "<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">"
    is_wide = bits == 16 or len(raw) >= 2 * count
    table = np.frombuffer(raw, f"{order}u{2 if is_wide else 1}", count)
    entries = _to_eight_bits(table, 16 if bits == 16 else 8)
    return entries[np.clip(pixels.astype(np.int64) - first, 0, count - 1)]


def _to_eight_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return pixels.astype(np.uint8)
    part = pixels.astype(np.float64) / (2.0**bits - 1)
    return (np.clip(part, 0, 1) * 255).round().astype(np.uint8)


def _place(data: Any, frame: int, sequence: str) -> Any:
    """Where an enhanced file says something of a frame: with it, with all of them, or on top."""
    groups = []
    if data.get("PerFrameFunctionalGroupsSequence"):
        groups += data.PerFrameFunctionalGroupsSequence[frame : frame + 1]
    groups += data.get("SharedFunctionalGroupsSequence") or []
    for group in groups:
        if group.get(sequence):
            return group[sequence].value[0]
    return data


def _number(value: Any) -> float | None:
    return next(iter(_numbers(value)), None)


def _numbers(value: Any) -> list[float]:
    """One or several, as a data element holds them; none of an empty one."""
    if value is None or value == "":
        return []
    many = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    return [float(x) for x in many if x not in (None, "")]


def _source(file: bytes | str) -> Any:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _start(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(132)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[:2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of odd values, which are used or refused
        yield


def _pydicom() -> Any:
    try:
        import pydicom  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("a DICOM file needs: pip install 'vitjax[medical]'") from error
    return pydicom
