"""What the shards of a prepared split say together: duplicates, labels, numbers for the card."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from vitjax.data.preparing.statistics import count_labels, mean_and_std, size_summary
from vitjax.data.sources.names import Names

LISTED = 100  # of each kind of fault, in the card


class Sidecar:
    """The rows of one shard, read from its npz.

    Attributes:
      columns: by name, a row for each example that could be read.
      ids: of these; bad_ids and bad_reasons of the others.
    """

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self.columns = {name: file[name] for name in file.files}
        self.ids, self.bad_ids, self.bad_reasons = (
            self._names(name) for name in ("ids", "bad_ids", "bad_reasons")
        )
        self.groups = self._names("groups") if "groups_ends" in self.columns else None

    def _names(self, name: str) -> Names:
        return Names.from_packed(self.columns.pop(f"{name}_letters"), self.columns[f"{name}_ends"])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(id, reason) of each."""
        return list(zip(self.bad_ids, self.bad_reasons, strict=True))

    def labels(self, row: int) -> list[int]:
        ends = self.columns["label_ends"]
        return self.columns["label_values"][ends[row - 1] if row else 0 : ends[row]].tolist()


def first_of_each(hashes: UInt8[np.ndarray, "N 32"]) -> Int[np.ndarray, "N"]:
    """For each row the first row that is the same."""
    columns = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort(columns.T)  # stable: equal rows stay in their order
    changes = np.ones(len(order), bool)
    changes[1:] = (columns[order[1:]] != columns[order[:-1]]).any(axis=1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[changes][np.cumsum(changes) - 1]
    return firsts


@dataclasses.dataclass
class Merged:
    """All shards of a split together.

    Attributes:
      is_kept: of every example that could be read, in order, whether it stays.
      starts: where each shard's rows begin among them, and their number.
      unreadable: (id, reason).
      duplicates: (id, the id that it repeats).
      conflicts: duplicates whose labels differ: (id, the id, its labels, their labels).
    """

    shards: list[Sidecar]
    is_kept: Bool[np.ndarray, "N"]
    starts: list[int]
    unreadable: list[tuple[str, str]]
    duplicates: list[tuple[str, str]]
    conflicts: list[tuple[str, str, list[int], list[int]]]

    def kept(self, shard: int) -> np.ndarray:
        return self.is_kept[self.starts[shard] : self.starts[shard + 1]]

    def dropped_records(self, shard: int) -> frozenset[int]:
        """Positions of the records to leave out of a shard as it was first written."""
        is_written = self.shards[shard].columns["is_written"]
        return frozenset(np.flatnonzero(~self.kept(shard)[is_written]).tolist())

    def column(self, name: str) -> np.ndarray:
        """Of the examples that stay."""
        return np.concatenate([shard.columns[name] for shard in self.shards])[self.is_kept]


def merge(paths: list[Path], keep_duplicates: bool) -> Merged:
    """Reads the sidecars and finds exact duplicates, of which the first in order stays."""
    shards = [Sidecar(path) for path in paths]
    starts = np.cumsum([0, *map(len, shards)]).tolist()
    firsts = first_of_each(np.concatenate([shard.columns["pixel_hash"] for shard in shards]))
    is_first = firsts == np.arange(len(firsts))

    def place(row: int) -> tuple[Sidecar, int]:
        number = int(np.searchsorted(starts, row, "right")) - 1
        return shards[number], row - starts[number]

    duplicates, conflicts = [], []
    for row in np.flatnonzero(~is_first).tolist():
        (shard, at), (other, first) = place(row), place(int(firsts[row]))
        pair = shard.ids[at], other.ids[first]
        duplicates.append(pair)
        labels = shard.labels(at), other.labels(first)
        if sorted(labels[0]) != sorted(labels[1]):
            conflicts.append((*pair, *labels))
    unreadable = [pair for shard in shards for pair in shard.unreadable]
    is_kept = np.ones(len(firsts), bool) if keep_duplicates else is_first
    return Merged(shards, is_kept, starts, unreadable, duplicates, conflicts)


def index_arrays(merged: Merged, shard_bytes: list[int]) -> dict[str, Any]:
    """What `SPLIT.index.npz` holds: labels, groups, and the size of each shard.

    `labels` int32 holds the labels of all examples one after the other, and for multi-label data
    `label_ends` where those of each end; `group_numbers` the group of each example as its place
    among the names that `group_letters` and `group_ends` hold.
    """
    labels: list[np.ndarray] = []
    for number, shard in enumerate(merged.shards):
        lengths = np.diff(shard.columns["label_ends"], prepend=0)
        labels.append(shard.columns["label_values"][np.repeat(merged.kept(number), lengths)])
    arrays: dict[str, Any] = {
        "labels": np.concatenate(labels),
        "shard_examples": np.array([merged.kept(k).sum() for k in range(len(merged.shards))]),
        "shard_bytes": np.array(shard_bytes, np.int64),
    }
    if is_multi_label(merged):
        lengths = np.concatenate(
            [np.diff(shard.columns["label_ends"], prepend=0) for shard in merged.shards]
        )
        arrays["label_ends"] = np.cumsum(lengths[merged.is_kept])
    if any(shard.groups is not None for shard in merged.shards):
        numbers: dict[str, int] = {}
        of_each = np.array(
            [
                numbers.setdefault(shard.groups[row] if shard.groups else "", len(numbers))
                for number, shard in enumerate(merged.shards)
                for row in np.flatnonzero(merged.kept(number)).tolist()
            ],
            np.int32,
        )
        arrays["group_numbers"] = of_each
        arrays["group_letters"], arrays["group_ends"] = Names(numbers).packed()
    return arrays


def is_multi_label(merged: Merged) -> bool:
    return any(bool(shard.columns["is_multi"]) for shard in merged.shards)


def left_out(merged: Merged, class_name: Any, keep_duplicates: bool) -> list[tuple[str, ...]]:
    """The lines of `SPLIT.left_out.csv`; a conflict also stands there as the duplicate it is."""
    rows: list[tuple[str, ...]] = [("problem", "id", "detail")]
    rows += [("unreadable", *pair) for pair in merged.unreadable]
    if not keep_duplicates:
        rows += [("duplicate", *pair) for pair in merged.duplicates]
    for example_id, first, labels, others in merged.conflicts:
        mine, theirs = (" ".join(map(class_name, values)) for values in (labels, others))
        rows.append(("conflict", example_id, f"is {mine}, but {first} with its pixels is {theirs}"))
    return rows


def summary(merged: Merged, index: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """What the card says of a split.

    Args:
      index: see `index_arrays`.
    """
    digest = hashlib.sha256()
    content = merged.column("content")
    for row in content[np.lexsort(np.ascontiguousarray(content).view(">u8").T[::-1])]:
        digest.update(row.tobytes())
    labels: Any = index["labels"]
    if "label_ends" in index:
        ends = index["label_ends"].tolist()
        labels = [labels[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    sizes = merged.column("size")
    mean, std = mean_and_std(
        merged.column("sums").sum(axis=0), int(sizes.prod(axis=1, dtype=np.int64).sum())
    )
    kinds = Counter(merged.column("kind").tolist())
    return {
        "num_examples": int(merged.is_kept.sum()),
        "num_shards": len(merged.shards),
        "bytes": int(index["shard_bytes"].sum()),
        "image_bytes": int(merged.column("bytes").sum()),
        "content_hash": digest.hexdigest(),
        "class_counts": count_labels(labels, num_classes),
        "multi_label": is_multi_label(merged),
        "groups": len(index["group_ends"]) if "group_ends" in index else 0,
        "size": size_summary(sizes),
        "size_in_source": size_summary(merged.column("source_size")),
        "kinds_in_source": dict(sorted(kinds.items())),
        "mean": mean,
        "std": std,
        "unreadable": _listed(merged.unreadable),
        "duplicates": _listed(merged.duplicates),
        "conflicts": _listed(merged.conflicts),
    }


def _listed(rows: list) -> dict[str, Any]:
    return {"count": len(rows), "first": [list(row) for row in rows[:LISTED]]}
