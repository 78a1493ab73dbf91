"""Fewer examples of a source: the axis of data size."""

from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax.data.sources import ask
from vitjax.data.sources.labels import AllLabels
from vitjax.errors import InputError


class Subset:
    """A fixed random choice of a source's examples, in the source's order.

    A larger subset with the same seed holds the smaller one.

    Args:
      source: the block of the whole source.
      num_examples: how many to keep.
      seed: another seed chooses others.

    Raises:
      InputError: the source has fewer examples, or none are asked for.
    """

    def __init__(self, source: dict[str, Any], num_examples: int, seed: int = 0):
        self._source = config_lib.build(source)
        total = len(self._source)
        if not 1 <= num_examples <= total:
            raise InputError(f"num_examples must be in 1 to {total}, got {num_examples}")
        order = np.random.default_rng(seed).permutation(total)
        self.rows = np.sort(order[:num_examples])
        self.num_classes = self._source.num_classes
        self.may_lack_classes = True
        self.class_names = self._source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self.rows[index])]

    def all_labels(self) -> AllLabels | None:
        """The kept examples' labels; None if the source does not tell its own."""
        labels = ask(self._source, "all_labels")
        if labels is None or isinstance(labels, np.ndarray):
            return None if labels is None else labels[self.rows]
        return [labels[row] for row in self.rows]

    def all_groups(self) -> list[str] | None:
        groups = ask(self._source, "all_groups")
        return None if groups is None else [groups[row] for row in self.rows]

    def problems(self) -> list[str]:
        """Of the whole source."""
        return ask(self._source, "problems") or []
