"""How well a map agrees with a mask of what should have been seen.

Array letters: Y X image.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError

from vitjax.errors import InputError

MASKS = (".png", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class MaskScores:
    """Agreement with a mask.

    Attributes:
      is_hit: the map's highest point lies in the mask (the pointing game: Zhang et al. 2016,
        arXiv 1608.00507; without the tolerance of 15 pixels there).
      iou: of the mask and the map's highest pixels, as many as the mask has.
      mass: the part of the map's positive values that lies in the mask; NaN if it has none.
      area: the part of what the model saw that the mask covers: what chance would give for the
        pointing game and for the mass.
    """

    is_hit: bool
    iou: float
    mass: float
    area: float


def score_mask(heat: Float[np.ndarray, "Y X"], mask: Bool[np.ndarray, "Y X"]) -> MaskScores | None:
    """Compares a map, at the image's pixels, with a mask.

    Args:
      heat: NaN where the model has seen nothing; such pixels do not count (see `spread`).

    Returns:
      None where nothing of the mask was seen.
    """
    is_seen = ~np.isnan(heat)
    values, inside = heat[is_seen], mask[is_seen]
    count = int(inside.sum())
    if not count:
        return None
    top = np.zeros(len(values), bool)
    top[np.argsort(-values, kind="stable")[:count]] = True
    positive = np.maximum(values, 0)
    total = positive.sum()
    return MaskScores(
        is_hit=bool(inside[values.argmax()]),
        iou=float((top & inside).sum() / (top | inside).sum()),
        mass=float(positive[inside].sum() / total) if total > 0 else float("nan"),
        area=count / len(values),
    )


def find_masks(masks: Path, names: list[Path]) -> list[Path]:
    """The mask of each image: the same name (and folder) under `masks`, as PNG or TIFF.

    Raises:
      InputError: there is no such folder, or an image has no mask; names the first.
    """
    if not masks.is_dir():
        raise InputError(f"--masks={masks} is no folder")
    found, missing = [], []
    for name in names:
        choices = [p for ext in MASKS if (p := (masks / name).with_suffix(ext)).is_file()]
        found += choices[:1]
        missing += [] if choices else [name]
    if missing:
        raise InputError(
            f"--masks={masks} lacks a mask for {len(missing)} of {len(names)} images, the first "
            f"{missing[0]}; expected is {missing[0].with_suffix('')} with {', '.join(MASKS)}"
        )
    return found


def read_mask(path: Path, height: int, width: int) -> Bool[np.ndarray, "Y X"]:
    """Reads a mask: everything that is not 0 in some colour; transparency does not count.

    Raises:
      InputError: it is no image, or not of the image's size.
    """
    try:
        with Image.open(path) as opened:
            if opened.size != (width, height):
                raise InputError(
                    f"mask {path} has {opened.height} x {opened.width} pixels, its image "
                    f"{height} x {width}"
                )
            bands, values = opened.getbands(), np.asarray(opened)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"cannot read mask {path}: {error}") from error
    if values.ndim == 2:
        return values != 0
    return (values[..., : len(bands) - (bands[-1] == "A")] != 0).any(-1)
