"""A source of images with masks: a folder of each.

Array letters: Y X image, S side of the model's input.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vitjax.data.images import size_of
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.folders import is_image, read_file
from vitjax.errors import InputError, UnreadableImage
from vitjax.explain.placement import seen_region

IGNORED = 255  # the class of pixels that do not count


class SegmentationFolder:
    """`root/images/NAME.jpg` and `root/masks/NAME.png`, in the order of their names.

    A mask is an image file of one channel and of its image's size; of a palette the numbers count,
    but of a GIF, which always has one, the grey values. Its record has it as "mask" uint8 [Y, X],
    classes from 0, IGNORED where no class is known. There is one label for all images, 0.

    Args:
      root: the folder.
      images, masks: folders in it.
      values: the masks' values that stand for class 0, class 1, and so on.
      ignored: values of pixels that belong to no class.
      pattern: the part of both files' names, without their ending, by which an image finds its
        mask: the first group, or all that matches.
      class_names: one a class; None for numbers.

    Raises:
      InputError: a folder is missing or empty, an image has no mask, or two files have one name.
    """

    num_classes = 1
    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        root: str,
        images: str = "images",
        masks: str = "masks",
        values: Sequence[int] = (0, 255),
        ignored: Sequence[int] = (),
        pattern: str = ".+",
        class_names: Sequence[str] | None = None,
    ):
        wrong = [v for v in (*values, *ignored) if not 0 <= v <= 255]
        if wrong or len(values) < 2 or len({*values, *ignored}) < len(values) + len(ignored):
            raise InputError(
                "values must be two or more numbers in 0 to 255, and ignored others, each once; "
                f"got {tuple(values)} and {tuple(ignored)}"
            )
        if class_names and len(class_names) != len(values):
            raise InputError(f"{len(class_names)} class_names, but {len(values)} values of masks")
        found, of_images = self._find(Path(root, masks), pattern), self._find(
            Path(root, images), pattern
        )  # fmt: skip
        missing = sorted(set(of_images) - set(found))
        if missing:
            raise InputError(
                f"{of_images[missing[0]]} has no mask in {Path(root, masks)}, as have "
                f"{len(missing)} of {len(of_images)} images; masks are found by {pattern!r} of "
                "their names"
            )
        self._pairs = [(of_images[key], found[key]) for key in of_images]
        self.num_mask_classes = len(values)
        self.mask_names = tuple(class_names) if class_names else tuple(map(str, range(len(values))))
        self._table = np.full(256, -1, np.int16)
        self._table[list(values)] = np.arange(len(values))
        self._table[list(ignored)] = IGNORED

    @staticmethod
    def _find(folder: Path, pattern: str) -> dict[str, Path]:
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}")
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            match = re.fullmatch(pattern, path.stem) if is_image(path.name) else None
            if match is None:
                continue
            key = match[1] if match.re.groups else match[0]
            if key in found:
                raise InputError(f"{found[key]} and {path} both are {key!r} by {pattern!r}")
            found[key] = path
        if not found:
            raise InputError(f"no images whose names match {pattern!r} in {folder}")
        return found

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, of_mask = self._pairs[index]
        image, mask = read_file(str(path)), self._mask(of_mask)
        if size_of(image) != mask.shape:
            raise UnreadableImage(f"it is of {size_of(image)} pixels, but its mask of {mask.shape}")
        return {"image": image, "mask": mask, "label": 0, "id": str(path)}

    def _mask(self, path: Path) -> UInt8[np.ndarray, "Y X"]:
        try:
            with Image.open(io.BytesIO(read_file(str(path)))) as opened:
                values = np.asarray(opened.convert("L") if opened.format == "GIF" else opened)
        except (UnidentifiedImageError, OSError) as error:
            raise UnreadableImage(f"its mask {path.name}: {error}") from error
        if values.ndim != 2:
            raise UnreadableImage(f"its mask {path.name} has {values.shape[2]} channels, not one")
        if values.dtype == bool:
            values = values.astype(np.uint8) * 255
        classes = self._table[values]
        if classes.min() < 0:
            raise UnreadableImage(
                f"its mask {path.name} has the value {values[classes < 0][0]}, which is neither "
                "one of the source's values nor ignored"
            )
        return classes.astype(np.uint8)

    def fitted_mask(
        self, record: dict[str, Any], preprocess: Preprocess
    ) -> UInt8[np.ndarray, "S S"]:
        """The mask where the model sees it: the nearest pixel's class, IGNORED beyond the image."""
        mask = record["mask"]
        height, width = mask.shape
        top, left, bottom, right = seen_region(preprocess, height, width)
        middle = (np.arange(preprocess.image_size) + 0.5) / preprocess.image_size
        rows = np.floor(top + middle * (bottom - top)).astype(int)
        cols = np.floor(left + middle * (right - left)).astype(int)
        fitted = mask[np.clip(rows, 0, height - 1)[:, None], np.clip(cols, 0, width - 1)[None]]
        is_row, is_col = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
        return np.where(is_row[:, None] & is_col[None], fitted, np.uint8(IGNORED))

    def all_labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)
