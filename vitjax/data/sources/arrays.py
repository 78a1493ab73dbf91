"""Sources of arrays: scikit-learn's digits, npz files and npy files."""

import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.data.sources.labels import AllLabels, label_problems
from vitjax.errors import InputError, suggest


class Arrays:
    """Images and labels as arrays.

    Args:
      images: uint8 or uint16, `[N, Y, X]` or `[N, Y, X, C]`.
      labels: integers `[N]`; or 0 and 1 `[N, L]`, which is multi-label data: example i has the
        labels whose column holds 1 (or True) in row i.
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
        if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
            raise InputError(
                f"{name}: images must be uint8 or uint16, [N, Y, X] or [N, Y, X, C], "
                f"got {images.dtype} {images.shape}"
            )
        is_multi = labels.ndim == 2
        is_whole = np.issubdtype(labels.dtype, np.integer) or (is_multi and labels.dtype == bool)
        if labels.ndim not in (1, 2) or not is_whole:
            raise InputError(
                f"{name}: labels must be integers [N], or 0 and 1 [N, L] for multi-label data, "
                f"got {labels.dtype} {labels.shape}"
            )
        if len(images) != len(labels) or not len(images):
            raise InputError(f"{name}: {len(images)} images and {len(labels)} labels")
        if is_multi and (labels.min() < 0 or labels.max() > 1):
            raise InputError(
                f"{name}: labels [N, L] must be 0 or 1, got {labels.min()} to {labels.max()}"
            )
        if labels.min() < 0:
            raise InputError(f"{name}: label {labels.min()} is negative")
        if is_multi and class_names and len(class_names) != labels.shape[1]:
            raise InputError(
                f"{name}: {len(class_names)} class_names, but labels have {labels.shape[1]} columns"
            )
        self.images, self.labels, self.name = images, labels, name
        self.class_names = class_names
        found = labels.shape[1] if is_multi else int(labels.max()) + 1
        self.num_classes = len(class_names) if class_names else found

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index]
        return {
            "image": np.asarray(self.images[index]),
            "label": np.flatnonzero(label).tolist() if self.labels.ndim == 2 else int(label),
            "id": f"{self.name}[{index}]",
        }

    def all_labels(self) -> AllLabels:
        if self.labels.ndim == 2:
            return [np.flatnonzero(row).tolist() for row in self.labels]
        return self.labels.astype(np.int64)

    def problems(self) -> list[str]:
        if self.labels.ndim == 2:  # as many columns as classes
            return []
        return label_problems(self.all_labels(), self.num_classes)


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
        table = np.loadtxt(_digits_file(), np.int64, delimiter=",")  # 64 pixels and a label a row
        pixels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
        order = np.random.default_rng(0).permutation(len(labels))
        test = len(order) // 5 + 1
        rows = np.sort(order[:test] if split == "test" else order[test:])
        images = (pixels[rows] * (255.0 / 16.0)).round().astype(np.uint8)
        names = tuple(str(i) for i in range(10))
        super().__init__(images, labels[rows], name=f"digits/{split}", class_names=names)
        self.rows = rows


def _digits_file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads, found without importing sklearn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the digits are inside scikit-learn's wheel: pip install scikit-learn")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


class Npz(Arrays):
    """One split of an npz file.

    Args:
      path: the file.
      split: "train" reads the arrays train_images and train_labels (MedMNIST's layout); None
        reads images and labels. Labels are as in `Arrays`; `[N, 1]` are single labels.
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
        super().__init__(
            images, _without_one_column(labels), name=f"{Path(path).name}:{split or 'all'}"
        )


class Npy(Arrays):
    """Images and labels of two npy files.

    Args:
      images, labels: paths of arrays as in `Arrays`; labels `[N, 1]` are single labels.
      class_names: one a class, in the labels' order; None for numbers.
      mmap: leave the images on disk and read those that are asked for.
    """

    def __init__(
        self,
        images: str,
        labels: str,
        class_names: Sequence[str] | None = None,
        mmap: bool = True,
    ):
        super().__init__(
            _load_npy(images, mmap),
            _without_one_column(_load_npy(labels, mmap=False)),
            name=images,
            class_names=tuple(class_names) if class_names else None,
        )


def _without_one_column(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _load_npy(path: str, mmap: bool) -> np.ndarray:
    if not Path(path).is_file():
        raise InputError(f"no such file: {path or '(the path is empty)'}")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"cannot read {path} as npy: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an npz file; its source is vitjax.data.sources.arrays:Npz")
    return array
