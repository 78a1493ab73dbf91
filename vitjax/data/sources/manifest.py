"""A table of image files: a CSV with a header and a row for each image."""

import array
import csv
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vitjax.data.sources.folders import read_file
from vitjax.data.sources.labels import AllLabels, LabelCodes, Labels, label_problems, to_integer
from vitjax.data.sources.names import Groups, Names
from vitjax.errors import InputError, suggest


class Manifest:
    """Images whose paths, labels, and perhaps groups and splits, stand in a CSV or TSV file.

    Labels are integers, or names: of class_names, or else the sorted names of the whole file, all
    splits together. Rows that cannot be used are left out, and named in `problems()`.

    Args:
      path: the file; its columns are parted by tabs if it ends in .tsv, by commas otherwise.
      root: the folder of the images; the manifest's own by default.
      split: the rows whose split_column says so; None for all rows.
      path_column, label_column: columns that must be there.
      group_column, split_column: columns that may be there (a patient, a slide; train or val).
      class_names: one a class, in the labels' order.
      multi_label: labels are joined by the separator; a blank is an example without labels.
      separator: between the labels of one example.
      label_columns: instead of label_column: a column for each class, of 0 and 1 (blank is 0).
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        split: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        group_column: str = "group",
        split_column: str = "split",
        class_names: Sequence[str] | None = None,
        multi_label: bool = False,
        separator: str = "|",
        label_columns: Sequence[str] = (),
    ):
        if class_names and label_columns and len(class_names) != len(label_columns):
            raise InputError(
                f"{path}: {len(class_names)} class_names, but {len(label_columns)} label_columns"
            )
        self._root = os.path.dirname(path) if root is None else root
        self._separator, self._label_columns = separator, tuple(label_columns)
        self._multi = multi_label or bool(label_columns)
        self._label_column = label_column
        self._names, groups, self._problems = Names(), Groups(), []
        values, ends, lines, splits = array.array("i"), array.array("q"), array.array("q"), set()
        codes = LabelCodes(tuple(label_columns) if label_columns else class_names)
        rows = _rows(path)
        _, header = next(rows)
        needed = [path_column, *(label_columns or [label_column])]
        needed += [split_column] if split is not None or split_column != "split" else []
        needed += [group_column] if group_column != "group" else []
        for column in needed:
            if column not in header:
                raise InputError(f"{path} has no column {column!r}; {suggest(column, header)}")
        places = {column: header.index(column) for column in header}
        has_groups = group_column in places
        for line, row in rows:
            if len(row) != len(header):
                self._problems.append(
                    f"{path}, line {line}: {len(row)} columns, the header has {len(header)}"
                )
                continue
            splits.add(row[places[split_column]] if split_column in places else "")
            try:
                if not row[places[path_column]]:
                    raise ValueError("it has no path")
                labels = self._labels_of(row, places, codes)
            except ValueError as error:
                self._problems.append(f"{path}, line {line}: {error}")
                continue
            if split is not None and row[places[split_column]] != split:
                continue
            self._names.append(row[places[path_column]])
            values.extend(labels)
            ends.append(len(values))
            lines.append(line)
            if has_groups:
                groups.append(row[places[group_column]])
        if split is not None and split not in splits:
            raise InputError(f"no split {split!r} in {path}; {suggest(split, sorted(splits))}")
        if not len(self._names):
            listed = "\n  ".join(self._problems[:5])
            raise InputError(f"no row of {path} can be used:\n  {listed or 'it has none'}")
        self._path, self._lines = path, lines
        self._groups = groups if has_groups else None
        self._labels = Labels(
            np.asarray(values, np.int32), np.asarray(ends, np.int64) if self._multi else None
        ).renumbered(codes.table())
        self.class_names = tuple(class_names) if class_names else codes.class_names
        self.num_classes = codes.num_classes
        used = set(codes.table().tolist())  # of the whole file, not of the split
        self._problems += [
            f"class {name!r} has no row in {path}"
            for number, name in enumerate(self.class_names or ())
            if number not in used
        ]

    def _labels_of(self, row: list[str], places: dict[str, int], codes: LabelCodes) -> list[int]:
        """Codes of a row's labels.

        Raises:
          ValueError: one is blank or not allowed.
        """
        if not self._label_columns:
            text = row[places[self._label_column]]
            parts = text.split(self._separator) if self._multi else [text]
            return [codes(part) for part in parts if part.strip() or not self._multi]
        labels = []
        for column in self._label_columns:
            text = row[places[column]].strip()
            number = to_integer(text or "0")
            if number not in (0, 1):
                raise ValueError(f"column {column!r} says {text!r}; allowed: 0, 1 or blank")
            labels += [codes(column)] if number else []
        return labels

    def _path_of(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._path_of(index)
        record = {"image": read_file(path), "label": self._labels[index], "id": path}
        return record if self._groups is None else record | {"group": self._groups[index]}

    def all_labels(self) -> AllLabels:
        return self._labels.of_all()

    def all_groups(self) -> list[str] | None:
        return None if self._groups is None else self._groups.of_all()

    def problems(self) -> list[str]:
        """Also looks whether each file is there."""
        problems = self._problems + label_problems(self.all_labels(), self.num_classes)
        seen: dict[str, int] = {}
        for index, line in enumerate(self._lines):
            path = os.path.normpath(self._path_of(index))
            if path in seen:
                problems.append(
                    f"{self._path}, line {line}: {path} stands in line {seen[path]} too"
                )
            elif not os.path.isfile(path):
                problems.append(f"{self._path}, line {line}: no such file: {path}")
            seen.setdefault(path, line)
        return problems


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The number of its last line, from 1, and the cells of each row that is not blank.

    Raises:
      InputError: the file is not there, or no text of this kind, or has no header.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path or '(the path is empty)'}")
    is_empty = True
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",")
            for row in reader:
                if row:
                    is_empty = False
                    yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"cannot read {path} as a table in UTF-8: {error}") from error
    if is_empty:
        raise InputError(f"{path} is empty; expected a header, such as path,label")
