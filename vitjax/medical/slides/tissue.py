"""Which parts of a slide hold tissue."""

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from vitjax.errors import InputError, suggest

METHODS = ("otsu", "saturation")
PCAM_SATURATION = 0.07
# Otsu's threshold divides even a slide of nothing but glass, or of nothing but tissue: it is held
# between what no stain falls below and what no glass exceeds.
OTSU_RANGE = (0.04, 0.2)
BLACK = 16  # of 255: the scanner's frame and pen, whose saturation is noise


def saturation(image: UInt8[np.ndarray, "Y X 3"]) -> Float[np.ndarray, "Y X"]:
    """HSV's saturation in [0, 1]: 1 - min / max, and 0 where a pixel is black."""
    red, green, blue = (image[..., channel] for channel in range(3))  # far faster than max(-1)
    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    found = (largest - smallest) / np.maximum(largest, 1).astype(np.float32)
    found[largest < BLACK] = 0
    return found


def _kept(mask: np.ndarray, least: int) -> np.ndarray:
    """The connected parts of a mask that have so many pixels."""
    count, parts, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_large = facts[:, cv2.CC_STAT_AREA] >= least
    is_large[0] = False  # the background
    return is_large[np.asarray(parts, np.int32)] if count > 1 else np.zeros_like(mask, bool)


def tissue_mask(
    thumbnail: UInt8[np.ndarray, "Y X 3"],
    method: str = "otsu",
    *,
    closing: int = 5,
    least_part: float = 5e-5,
    largest_hole: float = 1e-3,
) -> Bool[np.ndarray, "Y X"]:
    """Where a picture of a whole slide shows tissue, by the saturation of its colours.

    Args:
      method: "otsu": above Otsu's threshold of the picture's saturations, held between 0.04 and
        0.2; "saturation": at least 0.07.
      closing: diameter in pixels of the gaps that are closed; 0 for none.
      least_part: of the picture's area; smaller pieces are dust.
      largest_hole: of the picture's area; larger holes are glass.

    Source: Otsu 1979; Veeling et al. 2018 (PatchCamelyon, arXiv 1806.03962), whose rule is a
    saturation of 0.07 after blurring.
    """
    if method not in METHODS:
        raise InputError(f"unknown tissue method {method!r}; {suggest(method, METHODS)}")
    values = saturation(cv2.medianBlur(thumbnail, 5) if min(thumbnail.shape[:2]) > 5 else thumbnail)
    threshold = PCAM_SATURATION
    if method == "otsu":
        scaled = np.rint(values * 255).astype(np.uint8)
        found, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        threshold = float(np.clip((found + 0.5) / 255, *OTSU_RANGE))
    mask = values >= threshold
    if closing > 1:
        shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (closing, closing))
        wide = np.pad(mask.astype(np.uint8), closing)
        closed = cv2.morphologyEx(wide, cv2.MORPH_CLOSE, shape)
        mask = closed[closing:-closing, closing:-closing] > 0
    mask = _kept(mask, max(1, round(least_part * mask.size)))
    holes = ~mask
    return mask | (holes & ~_kept(holes, max(1, round(largest_hole * mask.size))))
