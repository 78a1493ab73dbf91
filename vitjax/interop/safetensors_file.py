"""The safetensors format, without its library.

Our own files hold two checksums among their metadata: `vitjax.crc32`, one of each tensor's
bytes, and `vitjax.table_crc32`, one of the names, types, shapes and other metadata: a bit flipped
in a name would otherwise be another model.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import DamagedCheckpointError
from vitjax.interop.ahead import ahead
from vitjax.interop.weight_file import (
    DTYPES,
    MAX_HEADER,
    AnyArray,
    Entry,
    Malformed,
    StoredArray,
    check_entries,
    num_bytes_of,
    open_atomically,
    parse_json,
    produce,
    stream_into,
)

CRC_KEY, TABLE_KEY = "vitjax.crc32", "vitjax.table_crc32"
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _open_at(path: Path, offset: int) -> Any:
    file = path.open("rb", buffering=0)
    file.seek(offset)
    return file


def _table_crc(table: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> str:
    rest = {k: v for k, v in metadata.items() if k not in (CRC_KEY, TABLE_KEY)}
    return f"{zlib.crc32(json.dumps([table, rest], sort_keys=True).encode()):08x}"


def read_safetensors(path: Path, size: int) -> tuple[dict[str, StoredArray], dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise Malformed(f"its header claims {length} bytes; at most {MAX_HEADER} are allowed")
        if 8 + length > size:
            raise Malformed(f"truncated: {8 + length - size} bytes of its header are missing")
        header = parse_json(file.read(length), "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("its __metadata__ does not map strings to strings")
    entries, table = [], {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Malformed(f"array {name!r} lacks one of dtype, shape, data_offsets")
        if str(entry["dtype"]) not in SAFETENSORS_DTYPES:
            allowed = ", ".join(SAFETENSORS_DTYPES)
            raise Malformed(f"array {name!r}: unsupported dtype {entry['dtype']!r}; {allowed}")
        dtype = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]]
        num_bytes = num_bytes_of(name, entry["shape"], dtype)
        match entry["data_offsets"]:
            case [int(begin), int(end)] if 0 <= begin == end - num_bytes:
                entries.append((begin, end, name, tuple(entry["shape"]), dtype))
            case offsets:
                raise Malformed(f"array {name!r} of {num_bytes} bytes has offsets {offsets}")
        table[name] = (entry["dtype"], entry["shape"])
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, name, *_ in entries:
        if begin != position:
            raise Malformed(f"array {name!r} begins at {begin}, the one before ends at {position}")
        position = end
    missing = 8 + length + position - size
    if missing:
        problem = "truncated: {} bytes are missing" if missing > 0 else "{} bytes too many"
        raise Malformed(problem.format(abs(missing)))
    crcs = dict.fromkeys(table)
    if CRC_KEY in metadata or TABLE_KEY in metadata:
        crcs = parse_json(metadata.get(CRC_KEY, "{}").encode(), CRC_KEY)
        if crcs.keys() != table.keys() or metadata.get(TABLE_KEY) != _table_crc(table, metadata):
            raise DamagedCheckpointError(
                f"{path}: damaged: its names, types or shapes disagree with its checksums"
            )

    def fill(name: str, offset: int, dtype: np.dtype, out: AnyArray) -> None:
        crc = stream_into(partial(_open_at, path, offset), dtype, False, out)
        if crcs[name] not in (None, f"{crc:08x}"):
            raise DamagedCheckpointError(
                f"{path}: damaged: {name!r} has CRC-32 {crc:08x}, written was {crcs[name]}"
            )

    arrays = {
        name: StoredArray(shape, dtype, partial(fill, name, 8 + length + begin, dtype))
        for begin, _, name, shape, dtype in entries
    }
    return arrays, metadata


def write_safetensors(
    path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None
) -> None:
    """Writes a file that the safetensors library can read, one array in memory at a time.

    The arrays are laid out by falling item size, which aligns them; `path` appears when all is
    written. transformers wants the metadata {"format": "pt"}.
    """
    entries = sorted(check_entries(entries), key=lambda entry: -entry[2].itemsize)
    codes = {name: code for code, name in SAFETENSORS_DTYPES.items()}
    table, header, position = {}, {}, 0
    for name, shape, dtype, _ in entries:
        end = position + math.prod(shape) * dtype.itemsize
        table[name] = (codes[dtype.name], list(shape))
        header[name] = {
            "dtype": codes[dtype.name],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    metadata = {**(metadata or {}), TABLE_KEY: _table_crc(table, metadata or {})}
    crcs = dict.fromkeys(table, "0" * 8)

    def encoded() -> bytes:
        about = {"__metadata__": {**metadata, CRC_KEY: json.dumps(crcs)}}
        text = json.dumps(about | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with open_atomically(path) as file:
        file.write(encoded())
        arrays = ahead(partial(produce, entry) for entry in entries)
        for entry, array in zip(entries, arrays, strict=True):
            raw = array.reshape(-1).view(np.uint8)
            crcs[entry[0]] = f"{zlib.crc32(raw.data):08x}"
            file.write(raw.data)
        file.seek(0)
        file.write(encoded())  # as long as before
