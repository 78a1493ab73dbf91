"""A folder of DICOM files, with labels from its subfolders or from a table."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vitjax.data import dicom
from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.medical.cohort import Cohort
from vitjax.medical.privacy import hashed
from vitjax.medical.readers.arrays import slice_places
from vitjax.medical.readers.own import read_labels
from vitjax.medical.readers.splits import complete
from vitjax.medical.readers.tables import Table, read_table, refuse

AGE_UNITS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


class Frames:
    """Frames of DICOM files as they are shown, read when they are asked for."""

    def __init__(self, paths: Sequence[str], frames: Sequence[int], window: dicom.Window):
        self.paths, self.frames, self.window = paths, frames, window

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return dicom.shown(self.paths[index], self.frames[index], self.window)


def dicom_folder(
    root: str,
    labels_csv: str | None = None,
    window: dicom.Window = None,
    frame: str | int = "all",
    group: str = "PatientID",
    salt: str = "",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Cohort:
    """A user's DICOM files, of any name, found by what stands at byte 128.

    Layout: `ROOT/CLASS/...`, or `ROOT/{train,val,test}/CLASS/...`; or any folders with a table,
    whose columns are as in `vitjax.medical.readers.own:own`, and whose paths are relative to root.

    Labels: the folders' names, or the table's. Splits: the folders' or the table's; what is
    missing is carved by group, each class in each.
    Groups: PatientID, hashed; a file without one is a group of its own. Of several frames each is
    a row, and the mean of them is the file's score.
    Columns: sex, age in years, view and site (the maker of the machine), from the headers.
    Licence: the user's own.

    Args:
      window: (centre, width), a name of `vitjax.data.dicom.PRESETS`, or the number of one of a
        file's own; by default what each file asks.
      frame: of files of several: "all", "middle", or a number from 0.
      group: the keyword of the element that tells what may not be parted.
      salt: a secret that keeps hashes from being guessed.
      val_fraction, test_fraction: of rows, where there is no such split.
    """
    dicom.check_window(window)
    is_number = isinstance(frame, int) and not isinstance(frame, bool) and frame >= 0
    if frame not in ("all", "middle") and not is_number:
        raise InputError(f"frame is {frame!r}; allowed: 'all', 'middle' or a number from 0")
    if not os.path.isdir(root):
        raise InputError(f"no such folder: {root}")
    names = sorted(_dicom_files(root))
    if not names:
        raise InputError(f"{root} holds no DICOM file: DICM stands at byte 128 of none")
    if labels_csv is None:
        table, used = _from_folders(root, names), ()
    else:
        table, used = read_table(labels_csv), (labels_csv,)
    found = read_labels(labels_csv or root, table)
    known = set(names)
    paths = [name.replace("\\", "/").removeprefix("./") for name in found.paths]
    refuse(
        labels_csv or root,
        (f"row {row}: no DICOM file {name!r}" for row, name in enumerate(paths, 1)
         if name not in known),
    )  # fmt: skip
    rows, frames, facts, problems, colours = [], [], [], [], set()
    for row, name in enumerate(paths):
        try:
            data = dicom.header(os.path.join(root, name))
            dicom.with_pixels(data)
            places = _frames(dicom.num_frames(data), frame)
        except (UnreadableImage, InputError) as error:
            problems.append(f"{name}: {error}")
            continue
        facts.append(_facts(data, group, salt, name))
        colours.add(int(data.get("SamplesPerPixel") or 1) == 3 or _is_palette(data))
        rows += [row] * len(places)
        frames += places
    refuse(root, problems)
    taken = np.array(rows)
    columns = {
        key: np.array([fact[key] for fact in facts])[taken]
        for key in ("sex", "age", "view", "site", "group")
    }
    groups, kind, notes = columns.pop("group"), group, [f"Groups are hashes of {group}."]
    if found.groups is not None:
        groups, kind, notes = found.groups[taken], found.group_kind, []
    columns |= {key: values[taken] for key, values in found.columns.items()}
    labels = found.labels[taken]
    splits = found.splits[taken]
    splits, more = complete(splits, groups, labels, val_fraction, test_fraction, seed)
    several = len(rows) > len(paths)
    ids = [f"{paths[r]}#{f}" if several else paths[r] for r, f in zip(rows, frames, strict=True)]
    return Cohort(
        name=os.path.basename(os.path.normpath(root)),
        images=Frames([os.path.join(root, paths[row]) for row in rows], frames, window),
        ids=ids,
        label_sets=(found.label_set,),
        labels={found.label_set.name: labels},
        splits=splits,
        groups=groups,
        group_kind="patient" if kind == "PatientID" else kind,
        units=np.array(paths)[taken],
        unit_kind="file",
        columns=columns,
        channels=3 if True in colours else 1,
        notes=(*more, *notes),
        files=used,
    )


def _dicom_files(root: str) -> Iterator[str]:
    """Relative names, with slashes, of the DICOM files under a folder."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                if dicom.is_dicom(file.read(132)):
                    yield os.path.relpath(path, root).replace(os.sep, "/")


def _from_folders(root: str, names: list[str]) -> Table:
    """A table of path, label and split, as the folders tell them."""
    parts = [name.split("/") for name in names]
    has_splits = all(part[0] in SPLIT_FOLDERS for part in parts)
    depth = 3 if has_splits else 2
    shallow = [name for name, part in zip(names, parts, strict=True) if len(part) < depth]
    wanted = "SPLIT/CLASS/FILE" if has_splits else "CLASS/FILE"
    refuse(root, (f"{name} is not {wanted}; or give labels_csv" for name in shallow))
    table: Table = {"path": names, "label": [part[depth - 2] for part in parts]}
    if has_splits:
        table["split"] = [SPLIT_FOLDERS[part[0]] for part in parts]
    return table


def _frames(total: int, frame: str | int) -> list[int]:
    if isinstance(frame, str):
        return slice_places(total, frame).tolist()
    if frame >= total:
        raise InputError(
            f"there is no frame {frame}; {suggest(str(frame), map(str, range(total)))}"
        )
    return [frame]


def _is_palette(data: Any) -> bool:
    return str(data.get("PhotometricInterpretation", "")) == "PALETTE COLOR"


def _facts(data: Any, group: str, salt: str, name: str) -> dict[str, Any]:
    who = str(data.get(group) or "").strip()
    sex = str(data.get("PatientSex") or "").strip().upper()
    view = data.get("ViewPosition") or data.get("PatientOrientation") or ""
    return {
        "group": hashed(who or f"file {name}", salt),
        "sex": {"M": "Male", "F": "Female", "O": "Other"}.get(sex, ""),
        "age": years(str(data.get("PatientAge") or "")),
        "view": str(view) if isinstance(view, str) else "/".join(map(str, view)),
        "site": str(data.get("Manufacturer") or "").strip(),
    }


def years(age: str) -> float:
    """Of DICOM's ages: 045Y, 011M, 003W, 010D; NaN of others."""
    match = re.fullmatch(r"\s*(\d{1,3})([DWMY])\s*", age)
    return int(match[1]) / AGE_UNITS[match[2]] if match else math.nan
