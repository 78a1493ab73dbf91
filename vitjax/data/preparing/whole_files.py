"""Files that are on disk whole or not at all, and one message when they cannot be."""

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import SaveError

GROUP_SIZE = "group_size:1"  # each record can be read by itself, as TFDS writes them


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a failure to write into one message.

    Raises:
      SaveError: nothing can be written there any more.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, SaveError):
            raise
        reason = str(error).split(";")[0].removeprefix("write() failed: ")
        raise SaveError(
            f"cannot write {path}: {reason}; what is finished stays: make room, and "
            "start the same command again to go on"
        ) from error


def write_records(path: Path, records: Iterator[bytes]) -> None:
    """Writes an ArrayRecord file so that it is there whole or not at all."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with saving(path):
            writer = ArrayRecordWriter(str(beside), GROUP_SIZE)
        count = 0
        try:
            for record in records:
                count += 1
                with saving(path):
                    writer.write(record)
        finally:
            with saving(path):
                writer.close()
        with saving(path):
            reader = ArrayRecordReader(str(beside), "readahead_buffer_size:0")
            found = reader.num_records()
            reader.close()
            if found != count:
                raise OSError(f"{found} of {count} records arrived")
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file, whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with saving(path):
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def to_npz(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def to_csv(rows: list[tuple[str, ...]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode("utf-8", "surrogateescape")


def copy_shard(origin: Path, path: Path, dropped: frozenset[int]) -> None:
    """Copies a shard without the records at some positions."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(origin), "readahead_buffer_size:0")
    try:
        kept = (i for i in range(reader.num_records()) if i not in dropped)
        write_records(path, (reader.read([i])[0] for i in kept))
    finally:
        reader.close()
    origin.unlink()
