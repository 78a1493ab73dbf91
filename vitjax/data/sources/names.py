"""Many names in little memory: millions of examples have no Python object each."""

import array
import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np


class Names(Sequence[str]):
    """Strings in one run of bytes: 8 bytes each beyond their letters, where a str takes 50 more.

    Args:
      names: the first ones; `append` adds to them.
    """

    def __init__(self, names: Iterable[str] = ()):
        self._bytes: Any = bytearray()
        self._ends: Any = array.array("q")
        self.extend(names)

    def append(self, name: str) -> None:
        self.extend((name,))

    def extend(self, names: Iterable[str]) -> None:
        letters, ends = self._bytes, self._ends
        for name in names:
            letters += os.fsencode(name)
            ends.append(len(letters))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """The letters, uint8, and where each name ends in them, int64 `[N]`."""
        return np.frombuffer(self._bytes, np.uint8), np.asarray(self._ends, np.int64)

    @classmethod
    def from_packed(cls, letters: np.ndarray, ends: np.ndarray) -> "Names":
        """The other way round."""
        names = cls()
        names._bytes, names._ends = letters, ends
        return names


class Groups:
    """The group of each example; few names, each of many examples."""

    def __init__(self, names: Iterable[str] = ()):
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._of_each = array.array("i")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        number = self._numbers.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        self._of_each.append(number)

    def __getitem__(self, index: int) -> str:
        return self._names[self._of_each[index]]

    def of_all(self) -> list[str]:
        return [self._names[number] for number in self._of_each]
