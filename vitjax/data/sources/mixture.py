"""Several sources as one."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax.data.sources import ask
from vitjax.data.sources.labels import AllLabels
from vitjax.errors import InputError, suggest

CLASSES = ("same", "union")


def share_slots(lengths: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many places of an epoch each source gets.

    The epoch is the shortest that holds every example at least once. Shares are rounded so that
    their sum is exact: the largest remainders go up.

    Args:
      lengths: of the sources.
      weights: positive, of any sum; None for as many places as examples.
    """
    shares = [Fraction(str(weight)) for weight in weights or lengths]
    total = sum(shares)
    shares = [share / total for share in shares]
    epoch = max(math.ceil(n / share) for n, share in zip(lengths, shares, strict=True))
    slots = [math.floor(share * epoch) for share in shares]
    remainders = [share * epoch - n for share, n in zip(shares, slots, strict=True)]
    largest = sorted(range(len(slots)), key=lambda i: (-remainders[i], i))
    for i in largest[: epoch - sum(slots)]:
        slots[i] += 1
    return slots


class Mixture:
    """Sources side by side, each with a share of an epoch; small ones repeat their examples.

    Args:
      sources: their blocks.
      weights: the share of each, of any sum; by default as many as it has examples.
      classes: "same" if all have the same classes; "union" to number the sorted names of all
        sources' classes anew.
    """

    def __init__(
        self,
        sources: Sequence[dict[str, Any]],
        weights: Sequence[float] | None = None,
        classes: str = "same",
    ):
        if not sources:
            raise InputError("a mixture needs at least one source")
        if weights is not None and len(weights) != len(sources):
            raise InputError(f"{len(weights)} weights for {len(sources)} sources")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights or ()):
            raise InputError(f"weights must be positive, got {list(weights or ())}")
        if classes not in CLASSES:
            raise InputError(f"unknown classes {classes!r}; {suggest(classes, CLASSES)}")
        self._sources = config_lib.build_all(sources)
        slots = share_slots([len(source) for source in self._sources], weights)
        self._ends = np.cumsum(slots)
        self._tables: list[np.ndarray] | None = None
        self.class_names, self.num_classes = (
            self._same_classes() if classes == "same" else (self._union())
        )
        targets = [_targets(block) for block in sources]
        seen: set[str] = set()
        self._is_numbered = False
        for found in targets:
            self._is_numbered |= bool(seen & found)
            seen |= found

    def _same_classes(self) -> tuple[tuple[str, ...] | None, int]:
        first = self._sources[0]
        for number, source in enumerate(self._sources[1:], 1):
            ours, theirs = first.class_names, source.class_names
            if (ours is None) != (theirs is None):
                raise InputError(
                    f"of the mixture's sources 0 and {number} only one names its classes"
                )
            for i, (a, b) in enumerate(zip(ours or (), theirs or (), strict=False)):
                if a != b:
                    raise InputError(
                        f"class {i} is {a!r} in source 0 of the mixture, {b!r} in source {number}; "
                        f'classes="union" allows that'
                    )
            if first.num_classes != source.num_classes:
                raise InputError(
                    f"source 0 of the mixture has {first.num_classes} classes, source {number} "
                    f"{source.num_classes}"
                )
        return first.class_names, first.num_classes

    def _union(self) -> tuple[tuple[str, ...], int]:
        for number, source in enumerate(self._sources):
            if source.class_names is None:
                raise InputError(
                    f'source {number} of the mixture does not name its classes, as classes="union" '
                    "needs"
                )
        names = tuple(sorted({name for source in self._sources for name in source.class_names}))
        numbers = {name: i for i, name in enumerate(names)}
        self._tables = [
            np.array([numbers[name] for name in source.class_names]) for source in self._sources
        ]
        return names, len(names)

    def _renumbered(self, label: Any, number: int) -> Any:
        """A label, or a list of them, of a source as the mixture numbers it."""
        if self._tables is None:
            return label
        table = self._tables[number]
        for value in label if isinstance(label, list) else [label]:
            if not 0 <= value < len(table):
                raise InputError(
                    f"label {value} of source {number} of the mixture is not in 0 to "
                    f"{len(table) - 1}"
                )
        if isinstance(label, list):
            return [int(table[value]) for value in label]
        return int(table[label])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        source = self._sources[number]
        record = source[(index - first) % len(source)]
        label = self._renumbered(record["label"], number)
        example_id = f"{number}:{record['id']}" if self._is_numbered else record["id"]
        return record | {"label": label, "id": example_id}

    def _slots(self) -> list[np.ndarray]:
        """Which example of its source stands in each place, source by source."""
        slots = np.diff(self._ends, prepend=0)
        return [np.arange(n) % len(source) for n, source in zip(slots, self._sources, strict=True)]

    def all_labels(self) -> AllLabels | None:
        """None unless every source tells its labels."""
        found = [ask(source, "all_labels") for source in self._sources]
        if any(labels is None for labels in found):
            return None
        if all(isinstance(labels, np.ndarray) for labels in found):
            tables = self._tables or [None] * len(found)
            parts = zip(found, tables, self._slots(), strict=True)
            return np.concatenate(
                [
                    (labels if table is None else table[labels])[rows]
                    for labels, table, rows in parts
                ]
            )
        mixed: list[list[int]] = []
        for number, (labels, rows) in enumerate(zip(found, self._slots(), strict=True)):
            if isinstance(labels, np.ndarray):
                raise InputError("a mixture's sources must all have one label an example, or lists")
            renumbered = [self._renumbered(label, number) for label in labels]
            mixed += [renumbered[row] for row in rows]
        return mixed

    def all_groups(self) -> list[str] | None:
        """None unless every source tells its groups."""
        found = [ask(source, "all_groups") for source in self._sources]
        if any(groups is None for groups in found):
            return None
        return [g[row] for g, rows in zip(found, self._slots(), strict=True) for row in rows]

    def problems(self) -> list[str]:
        return [
            f"source {number}: {problem}"
            for number, source in enumerate(self._sources)
            for problem in ask(source, "problems") or []
        ]


def _targets(block: Any) -> set[str]:
    """What builds the innermost sources of a block: those that make the ids."""
    inner = [*(block.get("sources") or ()), *([block["source"]] if block.get("source") else [])]
    if not inner:
        return {block["target"]}
    return set().union(*(_targets(one) for one in inner))
