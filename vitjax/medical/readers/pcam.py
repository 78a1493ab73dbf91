"""PatchCamelyon: 327,680 patches of lymph nodes; is there tumour in the centre?"""

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.readers.tables import read_table

FILES = {"train": "train", "valid": "val", "test": "test"}
SIDE, CENTRE = 96, 32
SLIDE_COLUMNS = ("wsi", "slide", "slide_id")


def least_crop_area(max_aspect: float = 4 / 3) -> float:
    """The least part of the area that a random crop may have, to hold the centre wherever it lies.

    Args:
      max_aspect: of a crop's sides; with 4 / 3, as RandomResizedCrop has, it is 0.593.
    """
    return max_aspect * ((1 + CENTRE / SIDE) / 2) ** 2


def pcam(root: str, slides: bool = True) -> Cohort:
    """PatchCamelyon from its HDF5 files, unpacked; patches are read when they are asked for.

    Layout: `ROOT/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5` with the arrays x, uint8
    `[N, 96, 96, 3]`, and y, uint8 `[N, 1, 1, 1]`; perhaps `..._SPLIT_meta.csv`, whose column wsi
    names the slide.

    Labels: 1 where the central 32 x 32 pixels hold tumour; crops must keep them.
    Splits: the official ones, whose slides are disjoint.
    Groups: slides where the tables of all splits are there, else each patch.
    Metric: accuracy and AUC.
    Licence: CC0. Source: Veeling et al. 2018, arXiv 1806.03962.

    Args:
      slides: whether to look for the tables.
    """
    names = {s: os.path.join(root, f"camelyonpatch_level_2_split_{s}") for s in FILES}
    labels = [_labels(f"{name}_y.h5") for name in names.values()]
    sizes = [len(part) for part in labels]
    images = Patches([f"{name}_x.h5" for name in names.values()], sizes)
    splits = np.repeat(list(FILES.values()), sizes)
    ids = [f"{split}_{n}" for split, size in zip(FILES, sizes, strict=True) for n in range(size)]
    tables = [f"{name}_meta.csv" for name in names.values()]
    has_slides = slides and all(map(os.path.isfile, tables))
    groups = np.array(ids)
    if has_slides:
        groups = np.concatenate(
            [_slides(path, size) for path, size in zip(tables, sizes, strict=True)]
        )
    notes = ["The label is of the central 32 x 32 pixels: a crop must keep them (0.6 of the area)."]
    if not has_slides:
        notes.append("Slides are not known: intervals take each patch as independent.")
    return Cohort(
        name="pcam",
        images=images,
        ids=ids,
        label_sets=(LabelSet("tumour", "single", ("no tumour", "tumour")),),
        labels={"tumour": np.concatenate(labels)},
        splits=splits,
        groups=groups,
        group_kind="slide" if has_slides else "image",
        policy="histology",
        min_crop_area=least_crop_area(),
        official="vitjax.medical.official:pcam",
        channels=3,
        notes=tuple(notes),
        licence="CC0",
        files=tuple(f"{name}_{x}.h5" for name in names.values() for x in "xy")
        + (tuple(tables) if has_slides else ()),
    )


class Patches:
    """Patches of several HDF5 files, one after the other.

    HDF5 itself is not made for threads: one at a time reads. Files are opened when first read,
    in each process anew.
    """

    def __init__(self, paths: Sequence[str], sizes: Sequence[int]):
        self.paths, self.ends = paths, np.cumsum(sizes)
        for path, size in zip(paths, sizes, strict=True):
            with _opened(path) as file:
                shape = _array(file, "x", path).shape
                if shape != (size, SIDE, SIDE, 3):
                    raise InputError(f"{path}: x is {shape}, not {(size, SIDE, SIDE, 3)}")
        self._lock, self._files, self._process = threading.Lock(), {}, os.getpid()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[number - 1]) if number else 0
        path = self.paths[number]
        if os.getpid() != self._process:
            self._lock, self._files, self._process = threading.Lock(), {}, os.getpid()
        with self._lock:
            try:
                if path not in self._files:
                    self._files[path] = _opened(path)
                return np.asarray(self._files[path]["x"][index - start])
            except (OSError, KeyError, InputError) as error:
                raise UnreadableImage(f"{path}, patch {index - start}: {error}") from error


def _opened(path: str) -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("PatchCamelyon's files need: pip install 'vitjax[medical]'") from error
    if not os.path.isfile(path):
        packed = f"; unpack {path}.gz first" if os.path.isfile(f"{path}.gz") else ""
        raise InputError(f"no such file: {path}{packed}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"cannot read {path} as HDF5: {error}") from error


def _array(file: Any, key: str, path: str) -> Any:
    if key not in file:
        raise InputError(f"{path} has no array {key!r}; found: {', '.join(file)}")
    return file[key]


def _labels(path: str) -> np.ndarray:
    with _opened(path) as file:
        labels = np.asarray(_array(file, "y", path))
    if labels.shape != (len(labels), 1, 1, 1) or not np.isin(labels, (0, 1)).all():
        raise InputError(f"{path}: y is {labels.shape}; expected 0 and 1, [N, 1, 1, 1]")
    return labels.reshape(-1).astype(np.float32)


def _slides(path: str, size: int) -> np.ndarray:
    table = read_table(path)
    column = next((name for name in SLIDE_COLUMNS if name in table), None)
    if column is None:
        raise InputError(
            f"{path} has none of the columns {', '.join(SLIDE_COLUMNS)}; found: {', '.join(table)}"
        )
    if len(table[column]) != size:
        raise InputError(f"{path} has {len(table[column])} rows for {size} patches")
    return np.array(table[column])
