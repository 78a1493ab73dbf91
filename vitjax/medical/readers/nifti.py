"""NIfTI volumes with a label each, read slice by slice."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitjax.data.dicom import PRESETS, Window, check_window, linear
from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.medical.cohort import Cohort
from vitjax.medical.readers.arrays import slice_places
from vitjax.medical.readers.own import read_labels
from vitjax.medical.readers.splits import complete
from vitjax.medical.readers.tables import check_files, read_table, refuse, refuse_repeated

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
KEPT = 4  # volumes in memory
TAILS = (0.5, 99.5)  # per cent of a volume's values, between which it is shown


class Slices:
    """Slices of volumes, uint8, with front or head up and the patient's right on the left.

    A packed volume is read whole for one slice; the last few stay in memory, so an order that
    goes through one volume after the other is much faster than a shuffled one.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], axis: int, window: Window):
        self.rows, self.axis, self.window = rows, axis, window
        self.paths = [path for path, _ in rows]
        self._volume = functools.lru_cache(KEPT)(self._shown)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        path, place = self.rows[index]
        plane = np.take(self._volume(path), place, self.axis)
        return np.ascontiguousarray(plane.T[::-1, ::-1])

    def _shown(self, path: str) -> np.ndarray:
        try:
            values = np.asarray(_opened(path).dataobj, np.float32)
        except InputError as error:
            raise UnreadableImage(str(error)) from error
        except Exception as error:  # damaged files raise nearly every type there is
            raise UnreadableImage(f"cannot read {path}: {error}") from error
        values = np.nan_to_num(values)
        window = PRESETS[self.window] if isinstance(self.window, str) else self.window
        if window is None or isinstance(window, int):
            low, high = np.percentile(values, TAILS)
            part = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
        else:
            part = linear(values, float(window[0]), float(window[1]))
        return (part * 255).round().astype(np.uint8)


def nifti(
    root: str,
    labels_csv: str,
    axis: str = "axial",
    slices: str | int = "all",
    window: Window = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Cohort:
    """Volumes in NIfTI files, each with a label; slices are the rows.

    Layout: any folders of `.nii` or `.nii.gz`, three-dimensional, and a table whose columns are
    as in `vitjax.medical.readers.own:own`, with paths relative to root.

    Labels: of a volume, as the table says. Splits: the table's; what is missing is carved by
    group. Groups: the table's patients, else volumes. A volume is scored, by the mean of its
    slices. Licence: the user's own.

    Args:
      axis: "axial", "coronal" or "sagittal", by the file's own orientation.
      slices: "all", "middle", or how many, evenly spaced.
      window: (centre, width) or a name of `vitjax.data.dicom.PRESETS`; by default the range of a
        volume without half a per cent at either end.
    """
    if axis not in AXES:
        raise InputError(f"axis is {axis!r}; {suggest(axis, AXES)}")
    check_window(window)
    if isinstance(window, int):
        raise InputError("window is a number, but a NIfTI file has no windows of its own")
    found = read_labels(labels_csv, read_table(labels_csv))
    refuse_repeated(labels_csv, "path", found.paths)
    paths = [os.path.join(root, name) for name in found.paths]
    check_files(labels_csv, paths)
    volumes, taken, places, problems = [], [], [], []
    for number, path in enumerate(paths):
        try:
            shape = _opened(path).shape
            if len(shape) != 3:
                raise InputError(f"{path} has the shape {shape}: three dimensions are expected")
            chosen = slice_places(shape[AXES[axis]], slices)
        except InputError as error:
            problems.append(str(error))
            continue
        volumes += [(path, int(place)) for place in chosen]
        places += chosen.tolist()
        taken += [number] * len(chosen)
    refuse(labels_csv, problems)
    names = np.array(found.paths)
    groups = names if found.groups is None else found.groups
    splits, notes = complete(found.splits, groups, found.labels, val_fraction, test_fraction, seed)
    rows = np.array(taken)
    return Cohort(
        name=os.path.basename(os.path.normpath(root)),
        images=Slices(volumes, AXES[axis], window),
        ids=[f"{found.paths[r]}#{p}" for r, p in zip(taken, places, strict=True)],
        label_sets=(found.label_set,),
        labels={found.label_set.name: found.labels[rows]},
        splits=splits[rows],
        groups=groups[rows],
        group_kind="volume" if found.groups is None else found.group_kind,
        units=names[rows],
        unit_kind="volume",
        columns={name: values[rows] for name, values in found.columns.items()},
        notes=(*notes, f"Rows are {axis} slices; the label is of the volume."),
        files=(labels_csv,),
    )


def _opened(path: str) -> Any:
    """A volume with axes to the right, the front and the head; only its header is read."""
    try:
        import nibabel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("a NIfTI file needs: pip install 'vitjax[medical]'") from error
    try:
        return nibabel.as_closest_canonical(nibabel.load(path))  # pyright: ignore
    except Exception as error:  # damaged files raise nearly every type there is
        raise InputError(f"cannot read {path} as NIfTI: {error}") from error
