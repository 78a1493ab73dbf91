"""One open file of weights, and what the readers and writers of every format share."""

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from vitjax.errors import DamagedCheckpointError, InputError, suggest

AnyArray = Shaped[np.ndarray, "..."]
# (name, shape, dtype, what gives the array): a writer holds one array at a time.
Entry = tuple[str, tuple[int, ...], Any, Callable[[], AnyArray]]
MAX_HEADER = 100_000_000  # bytes of JSON, the safetensors library's own bound
CHUNK = 2**22
NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool",
)  # fmt: skip
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in NAMES}


class Malformed(Exception):
    """What is wrong with the file being parsed; `explain_errors` adds the path."""


@dataclass(frozen=True)
class StoredArray:
    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[AnyArray], object]  # into an array of the same shape, of this or a wider dtype


@dataclass(frozen=True)
class WeightFile:
    """The arrays of a file or of a set of shards, read one at a time.

    Attributes:
      kind: "safetensors", "npz" or "torch".
      size: bytes on disk, of all shards.
      metadata: of safetensors; else empty.
    """

    path: Path
    kind: str
    size: int
    arrays: dict[str, StoredArray] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """In the order of the file."""
        return {name: array.shape for name, array in self.arrays.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: array.dtype.name for name, array in self.arrays.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> AnyArray:
        return self.read(name)

    def read(self, name: str, out: AnyArray | None = None) -> AnyArray:
        """One array, into `out` where given: of the same shape, and of its dtype or a wider one.

        Raises:
          InputError: there is no such array, `out` does not fit, or the file is malformed; what
            `out` then holds is undefined.
          DamagedCheckpointError: a checksum of the file disagrees with what was read.
        """
        if name not in self.arrays:
            raise InputError(f"{self.path}: no array {name!r}; {suggest(name, self.arrays)}")
        array = self.arrays[name]
        with explain_errors(self.path):
            if out is None:
                out = np.empty(array.shape, array.dtype)
            elif out.shape != array.shape or not np.can_cast(array.dtype, out.dtype, "safe"):
                have, want = f"{array.dtype}{array.shape}", f"{out.dtype}{out.shape}"
                raise Malformed(f"{name!r} is {have} and cannot be read into {want}")
            array.fill(out)
        return out


@contextlib.contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Turns whatever malformed bytes make the parsers raise into errors that name the file."""
    try:
        yield
    except (InputError, DamagedCheckpointError):
        raise
    except Malformed as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # the bytes choose which
        if isinstance(error, zipfile.BadZipFile) and "CRC" in str(error):
            raise DamagedCheckpointError(f"{path}: damaged: {error}") from error
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise InputError(f"{path}: malformed or not readable: {why}") from error


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"{what} is not a JSON object")
    return value


def num_bytes_of(name: str, shape: Any, dtype: np.dtype) -> int:
    good = isinstance(shape, (list, tuple)) and all(type(d) is int and d >= 0 for d in shape)
    # NumPy bounds the product of the dimensions that are not zero.
    if not good or len(shape) > 32 or math.prod(max(d, 1) for d in shape) * dtype.itemsize >= 2**62:
        raise Malformed(f"array {name!r} has the impossible shape {str(shape)[:100]}")
    return math.prod(shape) * dtype.itemsize


def stream_into(opener: Callable[[], Any], stored: np.dtype, fortran: bool, out: AnyArray) -> int:
    """Reads an array's bytes straight into `out`, or by way of one chunk; gives their CRC-32."""
    target = out.T if fortran else out
    contiguous = target.flags.c_contiguous
    direct = contiguous and out.dtype == stored and stored.kind != "b"
    flat: Any = target.reshape(-1) if contiguous else target.flat
    step = CHUNK // stored.itemsize
    chunk = np.empty(0 if direct else min(step, out.size), stored)
    crc = 0
    with opener() as stream:
        for start in range(0, out.size, step):
            stop = min(start + step, out.size)
            piece = flat[start:stop] if direct else chunk[: stop - start]
            raw, got = piece.view(np.uint8), 0
            while got < raw.size:
                num_read = stream.readinto(raw[got:])
                if not num_read:
                    raise Malformed(f"the data ends {raw.size - got} bytes or more too early")
                got += num_read
            crc = zlib.crc32(raw.data, crc)
            if not direct:  # any byte but zero is True
                flat[start:stop] = raw != 0 if stored.kind == "b" else piece
        if isinstance(stream, zipfile.ZipExtFile) and stream.read(1):  # checks its CRC at the end
            raise Malformed("a member is longer than it says")
    return crc


def check_entries(entries: Iterable[Entry]) -> list[tuple[str, tuple[int, ...], np.dtype, Any]]:
    checked = [(n, s, np.dtype(d).newbyteorder("="), produce) for n, s, d, produce in entries]
    names = [name for name, *_ in checked]
    for name, _, dtype, _ in checked:
        if dtype.name not in DTYPES:
            raise InputError(f"array {name!r}: dtype {dtype}; {suggest(dtype.name, DTYPES)}")
        if names.count(name) > 1 or name == "__metadata__":
            raise InputError(f"array {name!r}: names are unique, and not __metadata__")
    return checked


def produce(entry: tuple[str, tuple[int, ...], np.dtype, Any]) -> AnyArray:
    name, shape, dtype, produce = entry
    array = produce()
    assert (array.shape, array.dtype.name) == (shape, dtype.name), f"{name}: not as announced"
    return np.ascontiguousarray(array, dtype).reshape(shape)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
