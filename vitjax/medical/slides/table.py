"""Tables of slides: which files there are, what is known of them, and their splits."""

import csv
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import SPLITS
from vitjax.medical.slides.slide import EXTENSIONS

COLUMNS = ("case_id", "slide_id", "label")
UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class SlideTable:
    """Slides with labels, splits and groups.

    Attributes:
      name: of the data set.
      slide_ids: of each slide, unique: its bag is `SLIDE_ID.h5`.
      paths: of each slide's file.
      classes: names, in the labels' order.
      labels: the number of each slide's class; -1 where unknown.
      splits: "train", "val" or "test" of each slide; "" for none.
      groups: what may not be parted between splits, of each slide.
      group_kind: what a group is: "patient", "slide".
      columns: what else is known of each slide.
      notes: what a reader of a report must know, a sentence each.
    """

    name: str
    slide_ids: tuple[str, ...]
    paths: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Int[np.ndarray, " S"]
    splits: np.ndarray
    groups: np.ndarray
    group_kind: str = "slide"
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        total = len(self.slide_ids)
        if not total:
            raise InputError(f"{self.name} has no slide that can be used")
        sizes = {"paths": self.paths, "labels": self.labels, "splits": self.splits}
        for name, values in {**sizes, "groups": self.groups, **self.columns}.items():
            if len(values) != total:
                raise InputError(f"{self.name}: {total} slides, but {len(values)} {name}")
        seen: set[str] = set()
        for slide_id in self.slide_ids:
            if slide_id in seen:
                raise InputError(f"{self.name}: slide {slide_id!r} is there twice")
            seen.add(slide_id)
        for split in set(self.splits.tolist()) - {*SPLITS, ""}:
            raise InputError(f"{self.name}: unknown split {split!r}; {suggest(split, SPLITS)}")
        if self.labels.max() >= len(self.classes) or self.labels.min() < UNKNOWN:
            raise InputError(f"{self.name}: labels must be below {len(self.classes)}, or -1")

    def __len__(self) -> int:
        return len(self.slide_ids)

    def rows(self, split: str) -> Int[np.ndarray, " n"]:
        """The numbers of the slides of a split."""
        return np.flatnonzero(self.splits == split)

    def chosen(self, rows: Sequence[int] | Int[np.ndarray, " n"]) -> "SlideTable":
        """The same table with only these slides."""
        rows = np.asarray(rows, np.int64)
        return dataclasses.replace(
            self,
            slide_ids=tuple(self.slide_ids[i] for i in rows),
            paths=tuple(self.paths[i] for i in rows),
            labels=self.labels[rows],
            splits=self.splits[rows],
            groups=self.groups[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
        )

    def check_groups(self) -> None:
        """Raises InputError if a group has slides in two splits."""
        home: dict[str, str] = {}
        for group, split in zip(self.groups.tolist(), self.splits.tolist(), strict=True):
            if split and home.setdefault(str(group), split) != split:
                raise InputError(
                    f"{self.name}: {self.group_kind} {group!r} is in {home[str(group)]!r} and in "
                    f"{split!r}"
                )


def read_rows(path: str | Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has these columns, and perhaps others.

    Raises:
      InputError: no such file, not text, a column lacks, or there is no row.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = [name or "" for name in reader.fieldnames or ()]
            for name in wanted:
                if name not in found:
                    raise InputError(
                        f"{path} has no column {name!r}; its columns are {', '.join(found)}"
                    )
            rows = [{k: (v or "").strip() for k, v in r.items() if k} for r in reader]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV: {error}") from error
    if not rows:
        raise InputError(f"{path} has no row")
    return rows


def read_splits(path: str | Path) -> dict[str, str]:
    """The split of each slide from `splits_0.csv`: columns train, val and test hold slide ids.

    Such a table may have a nameless first column, and columns end in blanks where they are shorter.
    """
    return _homes(path, read_rows(path, SPLITS), {split: split for split in SPLITS})


def read_fold(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """The split and the label of each slide from a fold of TransMIL's.

    Its columns are train, train_label, val, val_label, test and test_label, after a nameless one.

    Source: the layout of Shao et al. 2021 (TransMIL, arXiv 2106.00908).
    """
    wanted = [name for split in SPLITS for name in (split, f"{split}_label")]
    rows = read_rows(path, wanted)
    labels = {
        row[split]: _whole(row[f"{split}_label"]) for split in SPLITS for row in rows if row[split]
    }
    return _homes(path, rows, {split: split for split in SPLITS}), labels


def _whole(label: str) -> str:
    """A label as it was meant: tables with blanks hold whole numbers as "1.0"."""
    return label[:-2] if label.endswith(".0") and label[:-2].isdigit() else label


def _homes(path: str | Path, rows: list[dict[str, str]], columns: dict[str, str]) -> dict[str, str]:
    homes: dict[str, str] = {}
    for column, split in columns.items():
        for slide_id in (row[column] for row in rows if row[column]):
            if homes.setdefault(slide_id, split) != split:
                raise InputError(f"{path}: slide {slide_id!r} is in {homes[slide_id]} and {split}")
    return homes


def find_slides(folder: str | Path) -> dict[str, str]:
    """The slide files of a folder at any depth, by name without extension.

    Raises:
      InputError: no such folder, or two files for one name.
    """
    if not Path(folder).is_dir():
        raise InputError(f"no such folder: {folder}")
    found: dict[str, str] = {}
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS:
                continue
            if stem in found:
                raise InputError(f"two files for slide {stem!r}: {found[stem]} and {place}/{name}")
            found[stem] = os.path.join(place, name)
    return found


def class_numbers(
    labels: Iterable[str], classes: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], Int[np.ndarray, " S"]]:
    """Names of classes and the number of each label; blank is unknown (-1).

    Args:
      classes: in their order; else those found, numbers by size and names by alphabet.
    """
    labels = list(labels)
    if classes is None:
        found = {label for label in labels if label}
        is_number = all(label.isdigit() for label in found)
        classes = sorted(found, key=int) if is_number else sorted(found)
    if len(classes) < 2:
        raise InputError(f"{where} has {len(classes)} classes; two are the least")
    for label in labels:
        if label and label not in classes:
            raise InputError(f"{where}: unknown label {label!r}; {suggest(label, classes)}")
    number = {name: i for i, name in enumerate(classes)} | {"": UNKNOWN}
    return tuple(classes), np.array([number[label] for label in labels], np.int64)


def read_table(
    path: str | Path,
    slides: str | Path,
    *,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
) -> SlideTable:
    """A table of slides from a CSV with columns case_id, slide_id and label.

    Slides of one case are one group. Other columns are kept.

    Args:
      slides: the folder of the slide files, which are found by slide id at any depth.
      splits: a `splits_0.csv`, see `read_splits`; or None where a column "split" says it, if any.
      classes: names of the labels, in order.

    Raises:
      InputError: a column or a file is missing, or a slide is in two splits.
    """
    rows = read_rows(path, COLUMNS)
    found = find_slides(slides)
    ids = [row["slide_id"] for row in rows]
    for slide_id in ids:
        if slide_id not in found and os.path.splitext(slide_id)[0] not in found:
            close = suggest(slide_id, found) if len(found) <= 20 else f"{len(found)} others"
            raise InputError(f"{path}: no file for slide {slide_id!r} in {slides}; {close}")
    paths = [found.get(i) or found[os.path.splitext(i)[0]] for i in ids]
    names, labels = class_numbers([_whole(row["label"]) for row in rows], classes, str(path))
    homes = (
        read_splits(splits) if splits else {row["slide_id"]: row.get("split", "") for row in rows}
    )
    strangers = sorted(set(homes) - set(ids))
    if strangers:
        raise InputError(f"{splits}: slide {strangers[0]!r} is not in {path}")
    others = [name for name in rows[0] if name and name not in (*COLUMNS, "split")]
    table = SlideTable(
        name=Path(path).stem,
        slide_ids=tuple(os.path.splitext(i)[0] if i not in found else i for i in ids),
        paths=tuple(paths),
        classes=names,
        labels=labels,
        splits=np.array([homes.get(slide_id, "") for slide_id in ids]),
        groups=np.array([row["case_id"] for row in rows]),
        group_kind="patient",
        columns={name: np.array([row[name] for row in rows]) for name in others},
    )
    table.check_groups()
    return table
