"""Sources that lie in memory: scikit-learn's digits, and npz files."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest


class Arrays:
    """Images and labels as arrays.

    Args:
      images: uint8 `[N, Y, X]` or `[N, Y, X, C]`.
      labels: integers `[N]`.
      name: the prefix of every example's id.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        name: str,
        class_names: tuple[str, ...] | None = None,
    ):
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InputError(
                f"{name}: images must be uint8 [N, Y, X] or [N, Y, X, C], "
                f"got {images.dtype} {images.shape}"
            )
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(
                f"{name}: labels must be integers [N], got {labels.dtype} {labels.shape}"
            )
        if len(images) != len(labels) or not len(images):
            raise InputError(f"{name}: {len(images)} images and {len(labels)} labels")
        if labels.min() < 0:
            raise InputError(f"{name}: label {labels.min()} is negative")
        self.images, self.labels, self.name = images, labels, name
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index],
            "label": int(self.labels[index]),
            "id": f"{self.name}[{index}]",
        }


class Digits(Arrays):
    """1,797 real handwritten digits, 8x8 grey, from inside scikit-learn's wheel.

    Args:
      split: "train" (1,437) or "test" (360): a fixed random fifth is held out.
    """

    def __init__(self, split: str):
        if split not in ("train", "test"):
            raise InputError(
                f"unknown split {split!r} of the digits; {suggest(split, ('train', 'test'))}"
            )
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        test = len(order) // 5 + 1
        rows = np.sort(order[:test] if split == "test" else order[test:])
        images = (digits.images[rows] * (255.0 / 16.0)).round().astype(np.uint8)
        names = tuple(str(i) for i in range(10))
        super().__init__(images, digits.target[rows], name=f"digits/{split}", class_names=names)
        self.rows = rows


class Npz(Arrays):
    """One split of an npz file.

    Args:
      path: the file.
      split: "train" reads the arrays train_images and train_labels (MedMNIST's layout); None
        reads images and labels.
    """

    def __init__(self, path: str, split: str | None = None):
        prefix = f"{split}_" if split else ""
        if not Path(path).is_file():
            raise InputError(f"no such file: {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                needed = [f"{prefix}images", f"{prefix}labels"]
                for key in needed:
                    if key not in file.files:
                        raise InputError(f"{path} has no array {key!r}; {suggest(key, file.files)}")
                images, labels = (file[key] for key in needed)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read {path} as npz: {error}") from error
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        super().__init__(images, labels, name=f"{Path(path).name}:{split or 'all'}")
