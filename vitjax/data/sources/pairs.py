"""Images with captions: tables of pairs, and captions made of class names.

Beside `image`, `label` and `id` a record has `captions`, a tuple of texts; in training one of them
is drawn each time that the example comes, at evaluation the first is taken. Such a source has
`has_captions`, and tells `all_captions()`: a tuple for each example.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from vitjax import config as config_lib
from vitjax.data.sources import ask
from vitjax.data.sources.folders import read_file
from vitjax.data.sources.labels import AllLabels
from vitjax.errors import InputError, suggest

SHOWN = 10
ENDINGS = (".csv", ".tsv", ".jsonl")
PHOTO = ("a photo of a {}.",)
Captions = tuple[str, ...]


class Pairs:
    """Images and captions of a CSV, TSV or JSONL file, a row for each image.

    In JSONL a caption may be a list of them. All labels are 0: there are no classes.

    Args:
      path: the file; its ending says what it is.
      root: the folder of the images; the file's own by default.
      image, caption: the columns (keys in JSONL) of the path and the caption.
      split_column, split: take the rows whose split_column says so; None for all.

    Raises:
      InputError: the file or a column is not there, or it has no rows.
    """

    has_captions = True
    num_classes = 1
    class_names = None

    def __init__(
        self,
        path: str,
        root: str | None = None,
        image: str = "image",
        caption: str = "caption",
        split: str | None = None,
        split_column: str = "split",
    ):
        self._path = path
        self._root = os.path.dirname(path) if root is None else root
        self._names: list[str] = []
        self._captions: list[Captions] = []
        self._lines: list[int] = []
        no_image, no_caption, splits = [], [], set()
        needed = [image, caption, *([] if split is None else [split_column])]
        for line, row in _rows(path, needed):
            if split is not None:
                splits.add(str(row.get(split_column)))
                if str(row.get(split_column)) != split:
                    continue
            name, texts = row.get(image), _captions_of(row.get(caption))
            if not isinstance(name, str) or not name.strip():
                no_image.append(line)
            elif not texts:
                no_caption.append(line)
            else:
                self._names.append(name)
                self._captions.append(texts)
                self._lines.append(line)
        if split is not None and split not in splits:
            raise InputError(f"no split {split!r} in {path}; {suggest(split, sorted(splits))}")
        self._problems = [
            f"{path}: {count_of(lines, 'row')} no {what}: {listed(lines)}"
            for lines, what in ((no_image, image), (no_caption, caption))
            if lines
        ]
        if not self._names:
            raise InputError("; ".join(self._problems) or f"{path} has no rows")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self._root, self._names[index])
        captions = self._captions[index]
        return {"image": read_file(path), "label": 0, "id": path, "captions": captions}

    def all_captions(self) -> list[Captions]:
        return self._captions

    def problems(self) -> list[str]:
        """Rows without an image or a caption, and images that are not there."""
        gone = [
            line
            for line, name in zip(self._lines, self._names, strict=True)
            if not os.path.isfile(os.path.join(self._root, name))
        ]
        if not gone:
            return self._problems
        first = os.path.join(self._root, self._names[self._lines.index(gone[0])])
        said = f"{self._path}: {count_of(gone, 'row')} an image that is not there: {listed(gone)}"
        return [*self._problems, f"{said}; the first is {first}"]


class Captioned:
    """A classification source with captions made of its class names.

    Args:
      source: the block of the source, with one label an example.
      templates: texts with one {} for the name.
      class_names: instead of the source's, in the order of its labels.

    Raises:
      InputError: there are no names, or another number of them than classes; or a template has no
        place for one.
    """

    has_captions = True

    def __init__(
        self,
        source: dict[str, Any],
        templates: Sequence[str] = PHOTO,
        class_names: Sequence[str] | None = None,
    ):
        self._source = config_lib.build(source)
        self.class_names = choose_names(self._source, class_names)
        self.num_classes = self._source.num_classes
        check_templates(templates)
        self._by_class = [
            tuple(template.format(name) for template in templates) for name in self.class_names
        ]
        self.may_lack_classes = getattr(self._source, "may_lack_classes", False)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        return record | {"captions": self._of(record["label"])}

    def _of(self, label: Any) -> Captions:
        if isinstance(label, list):
            raise InputError("captions of class names need one label an example, not a list")
        return self._by_class[label]

    def all_captions(self) -> list[Captions] | None:
        """None if the source does not tell its labels."""
        labels = self.all_labels()
        return None if labels is None else [self._of(label) for label in labels]

    def all_labels(self) -> AllLabels | None:
        return ask(self._source, "all_labels")

    def all_groups(self) -> list[str] | None:
        return ask(self._source, "all_groups")

    def problems(self) -> list[str]:
        return ask(self._source, "problems") or []


def choose_names(source: Any, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The names to speak of a source's classes by.

    Raises:
      InputError: there are none, or too few or many.
    """
    names = source.class_names if class_names is None else tuple(class_names)
    if names is None:
        raise InputError(
            f"{type(source).__name__} does not name its classes: give class_names, one for each of "
            f"{source.num_classes}"
        )
    if len(names) != source.num_classes:
        raise InputError(f"{len(names)} class_names for {source.num_classes} classes")
    return tuple(names)


def check_templates(templates: Sequence[str]) -> None:
    """Raises InputError for what is no template, or if there is none."""
    if isinstance(templates, str) or not templates:
        raise InputError(f"templates must be a list of texts, got {templates!r}")
    for template in templates:
        try:
            is_good = template.format("\0").count("\0") == 1
        except (IndexError, KeyError, ValueError):
            is_good = False
        if not is_good:
            raise InputError(f"template {template!r} must have one {{}} for the class name")


def count_of(lines: Sequence[int], what: str) -> str:
    """Such as "3 rows have"."""
    return f"{len(lines)} {what}{'s have' if len(lines) > 1 else ' has'}"


def listed(lines: Sequence[int]) -> str:
    """Their numbers, the first few."""
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"line {', '.join(map(str, lines[:SHOWN]))}{more}"


def _captions_of(value: Any) -> Captions:
    """The captions of a cell that are not blank."""
    values = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


def _rows(path: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of its line, from 1, and the cells of each row.

    Raises:
      InputError: the file is not there, or no such text, or lacks a column.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise InputError(f"{path or '(the path is empty)'} must end in {', '.join(ENDINGS)}")
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if ending == ".jsonl":
                is_first = True
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = _object(text, path, line)
                        if is_first:
                            _check_columns(row, needed, f"{path}, line {line},")
                        is_first = False
                        yield line, row
                return
            reader = csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",")
            _check_columns(reader.fieldnames or (), needed, path)
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"cannot read {path} as a table in UTF-8: {error}") from error


def _check_columns(found: Any, needed: Sequence[str], where: str) -> None:
    for column in needed:
        if column not in found:
            raise InputError(f"{where} has no column {column!r}; {suggest(column, list(found))}")


def _object(text: str, path: str, line: int) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}, line {line}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {line}: expected an object of keys, got {row!r}")
    return row
