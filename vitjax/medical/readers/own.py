"""A user's own images: a folder for each class, or a table."""

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from vitjax.data.images import decode
from vitjax.data.sources.folders import is_image
from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.medical.cohort import KINDS, Cohort, Files, LabelSet
from vitjax.medical.readers.splits import complete
from vitjax.medical.readers.tables import (
    Table,
    check_files,
    numbers,
    read_table,
    refuse,
    refuse_repeated,
)

PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path")
LABELS = ("label", "labels", "target", "diagnosis", "class", "finding", "findings", "dx")
GROUPS = {
    **dict.fromkeys(("patient", "patient_id", "patientid", "subject", "subject_id"), "patient"),
    **dict.fromkeys(("lesion", "lesion_id"), "lesion"),
    **dict.fromkeys(("slide", "slide_id", "wsi"), "slide"),
    **dict.fromkeys(("group", "group_id", "case", "case_id"), "group"),
}
SPLIT_COLUMNS = ("split", "subset", "partition")
SPLIT_WORDS = {
    "": "", "train": "train", "training": "train", "val": "val", "valid": "val",
    "validate": "val", "validation": "val", "test": "test", "testing": "test",
}  # fmt: skip
LOOKED_AT = 16
BITS = {"", "0", "1", "0.0", "1.0"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a table says of its images; groups are None where it has no such column."""

    paths: list[str]
    label_set: LabelSet
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray | None
    group_kind: str
    columns: dict[str, np.ndarray]


def own(
    path: str,
    root: str | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] = (),
    group_column: str | None = None,
    split_column: str | None = None,
    class_names: Sequence[str] | None = None,
    kind: str | None = None,
    separator: str = "|",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    channels: int | None = None,
    policy: str | None = None,
    licence: str = "",
) -> Cohort:
    """A user's own images.

    Layout: a folder `PATH/CLASS/.../IMAGE` or `PATH/{train,val,test}/CLASS/.../IMAGE`; or a CSV
    or TSV table with a row for each image.

    Labels: the folders' names; or a column of names or numbers, or of several joined by "|"
    (blank is none of them); or a column of 0 and 1 (blank is unknown) for each label.
    Splits: the folders', or the table's, blank where not used; a val or test that is missing is
    carved by group, each class in each.
    Groups: the column of patients, lesions or slides; without one, each image.
    Columns that are none of these are kept: as numbers where all cells are.
    Licence: the user's own.

    Args:
      root: where the table's paths begin; its own folder by default.
      path_column, label_column, group_column, split_column: by default they are found by their
        usual names: path, file, image; label, target, diagnosis, class; patient_id, subject,
        lesion_id, slide; split.
      label_columns: instead of label_column: a column of 0 and 1 for each label.
      class_names: in the labels' order; by default sorted, numbers as numbers.
      kind: "single", "ordinal" (class_names, or numbers, tell the order) or "multi"; by default
        "multi" where a label holds the separator, else "single".
      val_fraction, test_fraction: of the rows, where there is no such split; 0 for none.
      channels: 1 (grey) or 3; by default 1 if sixteen of the images, evenly spread, are all grey.
      policy: of augmentation; see vitjax.data.policies.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind is {kind!r}; {suggest(kind, KINDS)}")
    if os.path.isdir(path):
        table, base, used = _folder(path), path, ()
    else:
        table, used = read_table(path), (path,)
        base = os.path.dirname(path) if root is None else root
    found = read_labels(
        path, table, path_column, label_column, label_columns, group_column, split_column,
        class_names, kind, separator,
    )  # fmt: skip
    refuse_repeated(path, "path", found.paths)
    files = [os.path.join(base, name) for name in found.paths]
    check_files(path, files)
    images = Files(files)
    groups = np.array(found.paths) if found.groups is None else found.groups
    splits, notes = complete(found.splits, groups, found.labels, val_fraction, test_fraction, seed)
    if found.groups is None:
        notes += ("No column of patients: images of one patient may be in two splits.",)
    return Cohort(
        name=os.path.basename(os.path.normpath(path)).partition(".")[0],
        images=images,
        ids=found.paths,
        label_sets=(found.label_set,),
        labels={found.label_set.name: found.labels},
        splits=splits,
        groups=groups,
        group_kind=found.group_kind,
        columns=found.columns,
        policy=policy,
        channels=_channels(images) if channels is None else channels,
        notes=notes,
        licence=licence,
        files=used,
    )


def _folder(root: str) -> Table:
    """Path, label and split of each image of a folder."""
    table: Table = {"path": [], "label": [], "split": []}
    tops = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    has_splits = bool(tops) and all(name.lower() in SPLIT_WORDS for name in tops)
    for folder, inner, names in os.walk(root):
        inner.sort()
        inner[:] = [name for name in inner if not name.startswith(".")]
        parts = os.path.relpath(folder, root).split(os.sep)
        if len(parts) <= has_splits or parts == ["."]:
            continue
        for name in sorted(filter(is_image, names)):
            table["path"].append("/".join([*parts, name]))
            table["label"].append(parts[has_splits])
            table["split"].append(parts[0].lower() if has_splits else "")
    if not table["path"]:
        raise InputError(
            f"no images in class folders found in {root}; expected CLASS/IMAGE.jpg or "
            "train/CLASS/IMAGE.jpg"
        )
    return table


def read_labels(
    where: str,
    table: Table,
    path_column: str | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] = (),
    group_column: str | None = None,
    split_column: str | None = None,
    class_names: Sequence[str] | None = None,
    kind: str | None = None,
    separator: str = "|",
) -> Found:
    """Finds a table's columns, by their usual names where not given, and reads their labels.

    Raises:
      InputError: a column that is needed is not there, or a cell cannot be used; all are listed.
    """
    given = [path_column, label_column, *label_columns, group_column, split_column]
    missing = [name for name in given if name is not None and name not in table]
    if missing:
        found = ", ".join(table)
        raise InputError(f"{where} has no column {', '.join(map(repr, missing))}; found: {found}")
    path_column = path_column or _usual(table, PATHS)
    if label_column is None and not label_columns:
        label_column = _usual(table, LABELS)
    lacks = [] if path_column else [f"of paths ({', '.join(PATHS)})"]
    if label_column is None and not label_columns:
        bits = [name for name, cells in table.items() if set(cells) <= BITS and set(cells) != {""}]
        hint = f"; label_columns may be {bits}" if bits else ""
        lacks.append(f"of labels ({', '.join(LABELS)}{hint})")
    if lacks or path_column is None:
        raise InputError(f"{where} has no column {', nor '.join(lacks)}; found: {', '.join(table)}")
    group_column = group_column or _usual(table, GROUPS)
    split_column = split_column or _usual(table, SPLIT_COLUMNS)
    if label_columns:
        label_set = LabelSet("findings", "multi", tuple(class_names or label_columns))
        cells = [numbers(where, name, table[name], (0.0, 1.0)) for name in label_columns]
        labels = np.stack(cells, 1)
    else:
        assert label_column is not None
        label_set, labels = _labels(
            where, label_column, table[label_column], class_names, kind, separator
        )
    used = {path_column, label_column, *label_columns, group_column, split_column}
    blank = [row for row, name in enumerate(table[path_column], 1) if not name]
    refuse(where, (f"row {row}: {path_column} is blank" for row in blank))
    return Found(
        paths=table[path_column],
        label_set=label_set,
        labels=labels,
        splits=_splits(where, split_column, table),
        groups=_groups(group_column, table, table[path_column]),
        group_kind="image" if group_column is None else GROUPS.get(_plain(group_column), "group"),
        columns={n: _column(cells) for n, cells in table.items() if n and n not in used},
    )


def _plain(name: str) -> str:
    """`PatientID`, `Patient ID` and `patient-id` alike."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\s\-_]+", "_", parted).lower()


def _usual(table: Table, names: Sequence[str] | dict[str, str]) -> str | None:
    plain = {_plain(column): column for column in table}
    return next((plain[name] for name in names if name in plain), None)


def _labels(
    where: str,
    column: str,
    texts: list[str],
    class_names: Sequence[str] | None,
    kind: str | None,
    separator: str,
) -> tuple[LabelSet, np.ndarray]:
    is_multi = kind == "multi" or (kind is None and any(separator in text for text in texts))
    parts = {t: [p.strip() for p in t.split(separator)] if is_multi else [t] for t in set(texts)}
    found = {part for several in parts.values() for part in several if part}
    classes = tuple(class_names or _ordered(found))
    places = {name: number for number, name in enumerate(classes)}
    if class_names and not found & set(classes):  # numbers, of which the names are told
        places = {str(number): number for number in range(len(classes))}
    wrong = found - set(places)
    refuse(
        where,
        (
            f"row {row}: {column} is {text!r}; allowed: {', '.join(places)}"
            for row, text in enumerate(texts, 1)
            if (not is_multi and not text) or (wrong and wrong & set(parts[text]))
        ),
    )
    if not is_multi:
        label_set = LabelSet("class", kind or "single", classes)
        return label_set, np.array([places[text] for text in texts], np.float32)
    labels = np.zeros((len(texts), len(classes)), np.float32)
    for row, text in enumerate(texts):
        labels[row, [places[part] for part in parts[text] if part]] = 1
    return LabelSet("findings", "multi", classes), labels


def _ordered(names: set[str]) -> list[str]:
    return sorted(names, key=int) if all(n.isdecimal() for n in names) else sorted(names)


def _splits(where: str, column: str | None, table: Table) -> np.ndarray:
    if column is None:
        return np.full(len(next(iter(table.values()))), "", "U5")
    words = {text: SPLIT_WORDS.get(text.lower()) for text in set(table[column])}
    refuse(
        where,
        (
            f"row {row}: {column} is {text!r}; {suggest(text.lower(), list(SPLIT_WORDS)[1:])}"
            for row, text in enumerate(table[column], 1)
            if words[text] is None
        ),
    )
    return np.array([words[text] for text in table[column]], "U5")


def _groups(column: str | None, table: Table, paths: list[str]) -> np.ndarray | None:
    """An image whose group is blank is a group of its own."""
    if column is None:
        return None
    named = zip(table[column], paths, strict=True)
    return np.array([name or f"image {path}" for name, path in named])


def _column(cells: list[str]) -> np.ndarray:
    """Numbers where all cells are, NaN where blank; else texts."""
    try:
        values = [float(cell) if cell else np.nan for cell in cells]
    except ValueError:
        return np.array(cells)
    return np.array(values, np.float32) if any(cells) else np.array(cells)


def _channels(images: Files) -> int:
    """1 if those looked at are grey, whatever their files say; 3 if any is not, or none is read."""
    grey = []
    for index in np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            pixels = decode(images[index], 3)
        except UnreadableImage:
            continue
        grey.append((pixels == pixels[..., :1]).all())
    return 1 if grey and all(grey) else 3
