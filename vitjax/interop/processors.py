"""Preprocessing contracts as other libraries write them down."""

from collections.abc import Mapping
from typing import Any

from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.interop.contents import choice, number

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
PILLOW = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
PILLOW_NUMBERS = {name: value for value, name in PILLOW.items()}


def _sizes(processor: Mapping[str, Any], where: str) -> tuple[int | None, int | None, bool]:
    """The side that images are resized to, the crop, and whether the aspect ratio is kept."""
    size, crop = processor.get("size"), processor.get("crop_size")
    has_crop = bool(processor.get("do_center_crop", crop is not None)) and crop is not None
    if isinstance(crop, Mapping):
        crop = number(crop, "height", where, crop.get("shortest_edge"))
    if not processor.get("do_resize", True):
        return None, int(crop) if has_crop and crop else None, True
    is_short = has_crop
    if isinstance(size, Mapping):
        is_short = "shortest_edge" in size
        if not is_short and size.get("height") != size.get("width"):
            raise InputError(f"{where}: size={dict(size)} is not square")
        size = number(size, "shortest_edge" if is_short else "height", where)
    elif size is not None:
        size = number(processor, "size", where)
    if processor.get("crop_pct") and isinstance(size, int) and size < 384:  # ConvNeXt's
        return round(size / processor["crop_pct"]), size, True
    if processor.get("crop_pct"):
        is_short = False
    return size, int(crop) if has_crop and crop else None, is_short


def from_processor(
    processor: Mapping[str, Any], image_size: int, channels: int, where: str
) -> dict[str, Any]:
    """The contract of a Hugging Face `preprocessor_config.json`.

    Args:
      image_size: the model's, where the file gives none.

    Raises:
      InputError: it asks for something that `Preprocess` has no name for.
    """
    size, crop, is_short = _sizes(processor, where)
    found: dict[str, Any] = {"channels": channels, "image_size": int(crop or size or image_size)}
    if is_short:
        found["resize"] = "shorter_side"
        found["crop_fraction"] = min(1.0, found["image_size"] / (size or found["image_size"]))
    else:
        found["resize"] = "squash"
    resample = processor.get("resample", 2)
    found["interpolation"] = choice(resample, PILLOW, "resample", where)
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean"), processor.get("image_std")
        if not mean or not std:
            raise InputError(f"{where}: image_mean and image_std are missing")
        found |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    else:
        found |= {"mean": (0.0,), "std": (1.0,)}
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    high = float(factor) * 255
    found["value_range"] = (0.0, 1.0 if abs(high - 1) < 1e-6 else high)
    return found


def unit_normalisation(p: Preprocess) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, a number for each channel, of values in [0, 1]."""
    low, high = p.value_range
    mean = [(value - low) / (high - low) for value in p.mean]
    std = [value / (high - low) for value in p.std]
    times = p.channels
    return mean * times if len(mean) == 1 else mean, std * times if len(std) == 1 else std


def refuse_padding(p: Preprocess) -> None:
    """Raises InputError for a contract that formats of other libraries cannot tell."""
    if p.resize == "pad":
        raise InputError(
            'this format cannot say resize="pad", which the checkpoint was trained with; export as '
            "safetensors, onnx or stablehlo"
        )


def to_processor(p: Preprocess) -> dict[str, Any]:
    """`preprocessor_config.json` for a contract, of a processor that does what it says."""
    refuse_padding(p)
    mean, std = unit_normalisation(p)
    found: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "rescale_factor": 1 / 255,
        "resample": PILLOW_NUMBERS[p.interpolation],
    }
    if p.resize == "squash":
        side = {"height": p.image_size, "width": p.image_size}
        return found | {"image_processor_type": "ViTImageProcessor", "size": side}
    return found | {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(p.image_size / p.crop_fraction)},
        "do_center_crop": True,
        "crop_size": {"height": p.image_size, "width": p.image_size},
    }
