"""One shard of a prepared data set, written by a process of its own; JAX is not imported here.

A shard comes with a sidecar, an npz of a row for each example, from which the merge finds
duplicates and the card its numbers without reading an image again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax.data.preparing import pool
from vitjax.data.preparing.encoding import Encoding, encode, reason
from vitjax.data.preparing.pool import DONE, UNREADABLE
from vitjax.data.preparing.whole_files import to_npz, write_bytes, write_records
from vitjax.data.sources import array_record
from vitjax.data.sources.names import Names
from vitjax.errors import InputError, UnreadableImage


class Stopped(Exception):
    """The whole work was stopped; the shard begun is left out."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to write.

    Attributes:
      source: the block of the source.
      prefix: taken off the front of ids.
      renumber: the label that each label of the source gets; None for the same.
      start, stop: the examples, in the source's order.
      num_examples: of the whole source.
      path: without its ending; `.array_record` and `.npz` are written.
    """

    source: dict[str, Any]
    prefix: str
    renumber: tuple[int, ...] | None
    start: int
    stop: int
    num_examples: int
    encoding: Encoding
    keep_duplicates: bool
    path: str


@functools.lru_cache(maxsize=1)
def _open_source(block: str) -> Any:
    return config_lib.build(json.loads(block))


def open_source(block: dict[str, Any]) -> Any:
    """The source of a block, opened once in a process."""
    return _open_source(json.dumps(block, sort_keys=True))


class Rows:
    """The sidecar of a shard while it grows."""

    def __init__(self):
        self.columns: dict[str, list] = {
            name: []
            for name in ("index", "pixel_hash", "content", "source_size", "size", "sums", "bytes",
                         "kind", "is_written", "label", "group")
        }  # fmt: skip
        self.ids, self.bad_ids, self.bad_reasons = Names(), Names(), Names()
        self.bad_index: list[int] = []

    def add(self, example_id: str, **values: Any) -> None:
        self.ids.append(example_id)
        for name, column in self.columns.items():
            column.append(values[name])

    def add_unreadable(self, index: int, example_id: str, why: str) -> None:
        self.bad_index.append(index)
        self.bad_ids.append(example_id)
        self.bad_reasons.append(why)

    def packed(self, channels: int) -> dict[str, Any]:
        """Arrays to save; see `merge.Sidecar`."""
        columns = dict(self.columns)
        labels, groups = columns.pop("label"), columns.pop("group")
        count = len(labels)
        lists = [label if isinstance(label, list) else [label] for label in labels]
        arrays: dict[str, Any] = {
            "is_multi": np.array(any(isinstance(label, list) for label in labels)),
            "label_values": np.array([value for each in lists for value in each], np.int32),
            "label_ends": np.cumsum([len(each) for each in lists], dtype=np.int64),
        }
        for name in ("pixel_hash", "content"):
            column = np.frombuffer(b"".join(columns.pop(name)), np.uint8)
            arrays[name] = column.reshape(count, 32)
        shapes = {"source_size": (count, 2), "size": (count, 2), "sums": (count, 2, channels)}
        for name, column in columns.items():
            kind = {"kind": np.str_, "is_written": bool}.get(name, np.int64)
            arrays[name] = np.array(column, kind).reshape(shapes.get(name, (count,)))
        names = {"ids": self.ids, "bad_ids": self.bad_ids, "bad_reasons": self.bad_reasons}
        if any(group is not None for group in groups):
            names["groups"] = Names("" if group is None else group for group in groups)
        for name, value in names.items():
            arrays[f"{name}_letters"], arrays[f"{name}_ends"] = value.packed()
        return arrays | {"bad_index": np.array(self.bad_index, np.int64)}


def _label(label: Any, task: Task, num_classes: int, example_id: str) -> int | list[int]:
    values = [int(v) for v in label] if isinstance(label, list | tuple | np.ndarray) else [label]
    for value in values:
        if not 0 <= int(value) < num_classes:
            raise InputError(f"{example_id}: label {value} is not in 0 to {num_classes - 1}")
    values = [task.renumber[int(v)] if task.renumber else int(v) for v in values]
    return values if isinstance(label, list | tuple | np.ndarray) else values[0]


def content_hash(example_id: str, data: bytes, label: int | list[int]) -> bytes:
    """sha256 of the line "id, tab, sha256 of the image in hex, tab, label or labels"."""
    words = label if isinstance(label, list) else [label]
    line = f"{example_id}\t{hashlib.sha256(data).hexdigest()}\t{' '.join(map(str, words))}"
    return hashlib.sha256(os.fsencode(line)).digest()


def write_shard(task: Task) -> list[tuple[str, str]]:
    """Writes the shard and its sidecar, unless the work is stopped.

    Returns:
      The examples that cannot be read: (id, reason).

    Raises:
      InputError: the source changed, or an example has a label that its classes do not hold.
      SaveError: the disk is full, or the folder cannot be written.
    """
    source = open_source(task.source)
    if len(source) != task.num_examples:
        raise InputError(
            f"the source now has {len(source)} examples, not {task.num_examples}; prepare it "
            "when it no longer changes"
        )
    rows = Rows()

    def records() -> Iterator[bytes]:
        seen: set[bytes] = set()
        for index in range(task.start, task.stop):
            if pool.is_stopped():
                raise Stopped()
            example_id = f"example {index}"
            try:
                record = source[index]
                example_id = str(record["id"]).removeprefix(task.prefix)
                written = encode(record["image"], task.encoding)
            except UnreadableImage as error:
                rows.add_unreadable(index, example_id, reason(error))
                pool.count(UNREADABLE)
                continue
            label = _label(record["label"], task, source.num_classes, example_id)
            group = record.get("group")
            is_new = task.keep_duplicates or written.pixel_hash not in seen
            seen.add(written.pixel_hash)
            rows.add(
                example_id,
                index=index,
                label=label,
                group=group,
                is_written=is_new,
                content=content_hash(example_id, written.data, label),
                bytes=len(written.data),
                pixel_hash=written.pixel_hash,
                kind=written.kind,
                source_size=written.source_size,
                size=written.size,
                sums=written.sums,
            )
            pool.count(DONE)
            if is_new:
                features: dict[str, list] = {
                    "image": [written.data],
                    "id": [os.fsencode(example_id)],
                }
                if label != []:
                    features["label"] = label if isinstance(label, list) else [label]
                if group is not None:
                    features["group"] = [os.fsencode(str(group))]
                yield array_record.make_example(features)

    with contextlib.suppress(Stopped):
        write_records(Path(f"{task.path}.array_record"), records())
        write_bytes(Path(f"{task.path}.npz"), to_npz(rows.packed(task.encoding.channels)))
    return list(zip(rows.bad_ids, rows.bad_reasons, strict=True))
