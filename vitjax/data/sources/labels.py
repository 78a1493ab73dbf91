"""Labels: from texts to numbers, in four bytes each, and what may be wrong with them."""

import array
from collections.abc import Iterable, Sequence

import numpy as np

from vitjax.data.sources import choose_classes
from vitjax.errors import InputError, suggest

LARGEST = 2**31 - 1
LISTED_CLASSES = 1000
AllLabels = np.ndarray | list[list[int]]


class Labels:
    """One label, or a list of labels, for each example.

    Args:
      values: integers, `[N]`, or of all examples one after the other.
      ends: where the labels of each example end in them, `[N]`; None for one label an example.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray | None = None):
        self._values, self._ends = values.astype(np.int32), ends

    @classmethod
    def pack(cls, labels: Iterable[int] | Iterable[list[int]], multi_label: bool) -> "Labels":
        values, ends = array.array("i"), array.array("q")
        for label in labels:
            values.extend([label] if isinstance(label, int) else label)
            if multi_label:
                ends.append(len(values))
        return cls(
            np.asarray(values, np.int32), np.asarray(ends, np.int64) if multi_label else None
        )

    def renumbered(self, table: np.ndarray) -> "Labels":
        """The labels that `table[label]` holds in their place."""
        return Labels(table[self._values] if len(self._values) else self._values, self._ends)

    def __len__(self) -> int:
        return len(self._values) if self._ends is None else len(self._ends)

    def __getitem__(self, index: int) -> int | list[int]:
        if self._ends is None:
            return int(self._values[index])
        start = int(self._ends[index - 1]) if index else 0
        return self._values[start : int(self._ends[index])].tolist()

    def of_all(self) -> AllLabels:
        """int64 `[N]`, or a list for each example."""
        if self._ends is None:
            return self._values.astype(np.int64)
        return [self[index] for index in range(len(self))]  # pyright: ignore[reportReturnType]

    @property
    def largest(self) -> int:
        return int(self._values.max(initial=-1))


def to_integer(text: str) -> int | None:
    """The integer that a text holds, 3 and 3.0 alike; None if it holds none."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


class LabelCodes:
    """Numbers texts as they come; what label each number stands for is told at the end.

    With `class_names` a label is one of them, or an integer. Without, the first label decides:
    integers are the labels themselves, names are classes in their sorted order.
    """

    def __init__(self, class_names: Sequence[str] | None = None):
        self._given = tuple(class_names) if class_names else None
        self._index = {name: i for i, name in enumerate(self._given or ())}
        self._codes: dict[str, int] = {}
        self._are_integers: bool | None = None

    def __call__(self, text: str) -> int:
        """The code of a label.

        Raises:
          ValueError: it is blank, or no label that is allowed.
        """
        text = text.strip()
        if text not in self._codes:
            self._check(text)
            self._codes[text] = len(self._codes)
        return self._codes[text]

    def _check(self, text: str) -> None:
        if not text:
            raise ValueError("it has no label")
        number = to_integer(text)
        if number is not None and abs(number) > LARGEST:
            raise ValueError(f"label {text} is not in 0 to {LARGEST}")
        if self._given is not None:
            if text not in self._index and number is None:
                raise ValueError(f"unknown label {text!r}; {suggest(text, self._given)}")
            return
        if self._are_integers is None:
            self._are_integers = number is not None
        if self._are_integers and number is None:
            raise ValueError(f"label {text!r} is no integer, as the first label is")

    def table(self) -> np.ndarray:
        """The label, int32, of each code."""
        index = self._index
        if self._given is None and not self._are_integers:
            index = {name: i for i, name in enumerate(self.class_names or ())}
        labels = [index.get(text, to_integer(text)) for text in self._codes]
        return np.asarray(labels, np.int32)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        if self._given is None and self._codes and not self._are_integers:
            return choose_classes(set(self._codes), "the labels")
        return self._given

    @property
    def num_classes(self) -> int:
        names = self.class_names
        return len(names) if names else max(1, int(self.table().max(initial=0)) + 1)


def count_classes(
    num_classes: int | None, class_names: Sequence[str] | None, largest: int, where: str
) -> int:
    """How many classes there are: as said, or as named, or one more than the largest label.

    Raises:
      InputError: two that are given contradict each other.
    """
    if num_classes is not None and class_names and num_classes != len(class_names):
        raise InputError(f"{where}: num_classes={num_classes}, but {len(class_names)} class_names")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"{where}: num_classes must be at least 1, got {num_classes}")
    return num_classes or (len(class_names) if class_names else max(largest + 1, 1))


def label_problems(
    labels: AllLabels,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    every_class: bool = False,
) -> list[str]:
    """Labels outside 0 to num_classes - 1; with `every_class`, classes without an example too."""
    if isinstance(labels, np.ndarray):
        values, owners = labels, None
    else:
        lengths = np.fromiter(map(len, labels), np.int64, len(labels))
        flat = (label for example in labels for label in example)
        values = np.fromiter(flat, np.int64, int(lengths.sum()))
        owners = np.repeat(np.arange(len(labels)), lengths)
    outside = np.flatnonzero((values < 0) | (values >= num_classes))
    found, first, counts = np.unique(values[outside], return_index=True, return_counts=True)
    problems = []
    for value, place, count in zip(found, outside[first], counts, strict=True):
        example = place if owners is None else owners[place]
        times = "once" if count == 1 else f"{count} times"
        problems.append(
            f"label {value} ({times}, first in example {example}) is not in 0 to {num_classes - 1}"
        )
    if every_class:
        present = np.unique(values[(values >= 0) & (values < num_classes)])
        count = num_classes - len(present)
        if count > LISTED_CLASSES:
            problems.append(f"{count} of {num_classes} classes have no example")
        elif count:
            for number in np.setdiff1d(np.arange(num_classes), present).tolist():
                names = class_names or ()
                name = f" ({names[number]!r})" if number < len(names) else ""
                problems.append(f"class {number}{name} has no example")
    return problems
