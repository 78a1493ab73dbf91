"""Parquet files in the layout of Hugging Face data sets."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitjax.data.sources.labels import (
    LARGEST,
    AllLabels,
    LabelCodes,
    Labels,
    count_classes,
    label_problems,
)
from vitjax.data.sources.names import Groups
from vitjax.data.sources.shards import find_files
from vitjax.errors import InputError, UnreadableImage, suggest

MISSING = -(2**31)
KEPT_BYTES = 64 * 2**20  # of row groups, in each thread


def _import() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need: pip install 'vitjax[parquet]'") from error
    return pyarrow


def names_in_metadata(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """The class names that Hugging Face's `datasets` wrote for a column, if it did."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
    except (KeyError, TypeError, ValueError):
        return None
    while isinstance(feature, list | dict):
        if isinstance(feature, list):
            feature = feature[0] if feature else None
        elif "names" in feature:
            return tuple(feature["names"])
        else:
            feature = feature.get("feature")
    return None


class Parquet:
    """Rows of Parquet files; a read unpacks the row group that holds the row.

    A few row groups stay in memory, up to 64 MiB a thread. Read in random order, that costs about
    one row group an image: files for training should have row groups of few rows.
    Rows without a label are left out, and named in `problems()`.

    Args:
      pattern: a glob of the files, or several; also with braces.
      image: the column of the encoded images: bytes, or a struct with a field `bytes`.
      label: the column of integers, of names, or of lists of either (then `multi_label`).
      class_names: by default those that `datasets` left in the file, or the sorted names.
      num_classes: by default as many as class_names, or the largest label and one more.
      group: a column of names (patients, slides), or None.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        image: str = "image",
        label: str = "label",
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        multi_label: bool = False,
        group: str | None = None,
    ):
        self._pyarrow = _import()
        self._paths, self._image, self._problems = find_files(pattern), image, []
        self._metadata, self._row_groups, tables = [], [], []
        self._column: str | None = None
        ends: list[int] = []
        for number, path in enumerate(self._paths):
            table, metadata = self._open(path, [image, label] + ([group] if group else []))
            if number == 0:
                class_names = class_names or names_in_metadata(table.schema.metadata, label)
            tables.append(table)
            self._metadata.append(metadata)
            for row_group in range(metadata.num_row_groups):
                ends.append(metadata.row_group(row_group).num_rows)
                self._row_groups.append((number, row_group))
        self._ends = np.cumsum(ends, dtype=np.int64)
        self._rows, self._labels, codes = self._number(
            [table[label] for table in tables], class_names, multi_label
        )
        if not len(self._rows):
            listed = "\n  ".join(self._problems[:5])
            raise InputError(f"no rows with a label in {pattern!r}:\n  {listed or 'it is empty'}")
        self._groups = None
        if group:
            names = [name for table in tables for name in table[group].to_pylist()]
            self._groups = Groups("" if names[i] is None else str(names[i]) for i in self._rows)
        self.class_names = codes.class_names
        self.num_classes = count_classes(
            num_classes, self.class_names, self._labels.largest, str(pattern)
        )
        self._local = threading.local()

    def _open(self, path: str, columns: list[str]) -> tuple[Any, Any]:
        """The table of all columns but the first, which is the image, and the file's metadata."""
        try:
            with self._pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                for column in columns:
                    if column not in schema.names:
                        raise InputError(
                            f"{path} has no column {column!r}; {suggest(column, schema.names)}"
                        )
                column = self._column_of_bytes(schema.field(columns[0]).type, path)
                if column != (self._column or column):
                    raise InputError(f"images lie in {self._column!r}, but in {path} in {column!r}")
                self._column = column
                return file.read(columns=columns[1:]), file.metadata
        except (self._pyarrow.ArrowException, OSError) as error:
            raise InputError(f"cannot read {path} as Parquet: {error}") from error

    def _column_of_bytes(self, kind: Any, path: str) -> str:
        types = self._pyarrow.types
        if types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(len(kind))]:
            return f"{self._image}.bytes"
        if types.is_binary(kind) or types.is_large_binary(kind):
            return self._image
        raise InputError(
            f"column {self._image!r} of {path} holds {kind}; "
            "allowed: binary, or a struct with bytes"
        )

    def _number(
        self, columns: list[Any], class_names: Sequence[str] | None, multi_label: bool
    ) -> tuple[np.ndarray, Labels, LabelCodes]:
        """Which rows have labels, and these labels."""
        codes, are_names = LabelCodes(class_names), set()
        rows, values, lengths, start = [], [], [], 0
        for path, column in zip(self._paths, columns, strict=True):
            column = column.combine_chunks()
            types = self._pyarrow.types
            is_list = types.is_list(column.type) or types.is_large_list(column.type)
            if is_list != multi_label:
                raise InputError(
                    f"the labels of {path} are {column.type}: multi_label must be {is_list}"
                )
            sizes = np.ones(len(column), np.int64)
            is_whole = column.is_valid().to_numpy(zero_copy_only=False)
            if is_list:
                sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                column = column.flatten()
            numbers, is_name = self._numbers(column, codes, path)
            are_names.add(is_name)
            owners = np.repeat(np.arange(len(sizes)), sizes)
            is_whole[owners[numbers == MISSING]] = False
            if not is_whole.all():
                self._problems.append(
                    f"{path}: {(~is_whole).sum()} rows have no label that is allowed, "
                    f"the first is row {np.argmin(is_whole)}"
                )
            rows.append(start + np.flatnonzero(is_whole))
            values.append(numbers[is_whole[owners]])
            lengths.append(sizes[is_whole])
            start += len(sizes)
        if len(are_names) > 1:
            raise InputError(
                f"labels are names in some files and integers in others: {self._paths}"
            )
        ends = np.cumsum(np.concatenate(lengths)) if multi_label else None
        labels = Labels(np.concatenate(values), ends)
        labels = labels.renumbered(codes.table()) if True in are_names else labels
        return np.concatenate(rows), labels, codes

    def _numbers(self, column: Any, codes: LabelCodes, path: str) -> tuple[np.ndarray, bool]:
        """Integers, or codes of names (then True); MISSING where there is no label."""
        types = self._pyarrow.types
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if types.is_integer(column.type) or types.is_boolean(column.type):
            numbers = column.cast("int64").fill_null(MISSING).to_numpy(zero_copy_only=False)
            return np.clip(numbers, MISSING, LARGEST), False
        if not (types.is_string(column.type) or types.is_large_string(column.type)):
            raise InputError(
                f"the labels of {path} are {column.type}; "
                "allowed: integers, names, or lists of them"
            )
        column = column.dictionary_encode()
        table = []
        for text in column.dictionary.to_pylist():
            try:
                table.append(codes(text))
            except ValueError as error:
                self._problems.append(f"{path}: {error}")
                table.append(MISSING)
        table.append(MISSING)
        places = column.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)
        return np.array(table, np.int64)[places], True

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self._rows[index])
        place = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[place - 1]) if place else 0
        image = self._row_group(place)[self._image][row - first].as_py()
        if isinstance(image, dict):
            image = image["bytes"]
        example_id = f"{self._paths[self._row_groups[place][0]]}[{row}]"
        if not image:
            raise UnreadableImage(f"{example_id} holds no bytes of an image")
        record = {"image": image, "label": self._labels[index], "id": example_id}
        return record if self._groups is None else record | {"group": self._groups[index]}

    def _row_group(self, place: int) -> Any:
        """The images of a row group; the last few of each thread are at hand."""
        if not hasattr(self._local, "tables"):
            self._local.tables = OrderedDict()
        tables: OrderedDict[int, Any] = self._local.tables
        if place in tables:
            tables.move_to_end(place)
            return tables[place]
        number, row_group = self._row_groups[place]
        path, metadata = self._paths[number], self._metadata[number]
        try:
            with self._pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
                table = file.read_row_group(row_group, columns=[self._column], use_threads=False)
        except (self._pyarrow.ArrowException, OSError) as error:
            raise UnreadableImage(
                f"cannot read row group {row_group} of {path}: {error}"
            ) from error
        tables[place] = table
        while len(tables) > 1 and sum(t.nbytes for t in tables.values()) > KEPT_BYTES:
            tables.popitem(last=False)
        return table

    def all_labels(self) -> AllLabels:
        return self._labels.of_all()

    def all_groups(self) -> list[str] | None:
        return None if self._groups is None else self._groups.of_all()

    def problems(self) -> list[str]:
        return self._problems + label_problems(self.all_labels(), self.num_classes)
