"""NumPy's npz archives, without pickles."""

import ast
import math
import re
import struct
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.interop.ahead import ahead
from vitjax.interop.weight_file import (
    DTYPES,
    Entry,
    Malformed,
    StoredArray,
    check_entries,
    num_bytes_of,
    open_atomically,
    produce,
    stream_into,
)

MAX_NPY_HEADER = 10_000  # characters, NumPy's own bound: a longer literal can crash Python's parser
# Weights are noise and hardly deflate; deflate's own limit is 1032:1. A compressed npz may claim
# 100 times its size, or 256 MiB where that is more (small files of zeros are legitimate).
MAX_RATIO, FREE_BYTES = 100, 2**28


def read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, StoredArray]:
    members = archive.infolist()
    _check_directory(archive, members, size)
    arrays = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        with archive.open(member) as stream:
            shape, stored, fortran, skip = _npy_header(name, stream)
        claimed = skip + math.prod(shape) * stored.itemsize
        if claimed != member.file_size:
            problem = f"its header tells of {claimed} bytes, the archive of {member.file_size}"
            raise Malformed(f"array {name!r}: {problem}")

        opener = partial(_open_member, archive, member, skip)
        fill = partial(stream_into, opener, stored, fortran)  # zipfile compares the CRC-32
        arrays[name] = StoredArray(shape, DTYPES[stored.name], fill)
    return arrays


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, skip: int) -> Any:
    stream = archive.open(member)
    stream.read(skip)
    return stream


def _check_directory(archive: Any, members: list[zipfile.ZipInfo], size: int) -> None:
    """A directory that lost or moved a member, or that claims impossible sizes, is refused."""
    names = [m.filename for m in members]
    if len(set(names)) != len(names):
        raise Malformed(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    claimed = sum(m.file_size for m in members)
    if claimed > max(MAX_RATIO * size, FREE_BYTES):
        raise Malformed(f"claims {claimed} bytes in a file of {size}: a decompression bomb?")
    position = slack = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored and member.compress_type != zipfile.ZIP_DEFLATED:
            raise Malformed(f"{member.filename!r}: unsupported compression; stored or deflated")
        if member.orig_filename != member.filename:
            raise Malformed(f"{member.orig_filename!r} is an impossible name")
        if stored and member.compress_size != member.file_size:
            raise Malformed(f"{member.filename!r} is not compressed, and has two sizes")
        if not 0 <= member.header_offset - position <= slack:
            raise Malformed(f"a hole or an overlap before {member.filename!r}")
        archive.fp.seek(member.header_offset + 26)
        position = member.header_offset + 30 + sum(struct.unpack("<2H", archive.fp.read(4)))
        position += member.compress_size
        slack = 24 if member.flag_bits & 8 else 0  # where the sizes follow the data
    if not 0 <= archive.start_dir - position <= slack:
        raise Malformed("a hole or an overlap before the archive's directory")


def _npy_header(name: str, stream: Any) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """The shape, the dtype as stored, whether in Fortran order, and the header's own size."""
    magic = stream.read(8)
    if magic not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0", b"\x93NUMPY\3\0"):
        raise Malformed(f"array {name!r} is not in the .npy format, versions 1 to 3")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > MAX_NPY_HEADER:
        raise Malformed(f"array {name!r} has a header of {length} bytes; {MAX_NPY_HEADER} may be")
    header = ast.literal_eval(stream.read(length).decode("latin1").strip())
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise Malformed(f"array {name!r} has an unknown header")
    descr = header["descr"]
    if descr in ("|V2", "<V2"):  # what NumPy makes of bfloat16
        dtype = DTYPES["bfloat16"]
    elif isinstance(descr, str) and re.fullmatch(r"[<>|=]?[bfiu][1248]", descr):
        dtype = np.dtype(descr)
    else:
        pickled = " (a pickle: never loaded)" if "O" in str(descr) else ""
        raise Malformed(f"array {name!r}: dtype {descr!r}{pickled}; allowed: {', '.join(DTYPES)}")
    num_bytes_of(name, header["shape"], dtype)
    return tuple(header["shape"]), dtype, bool(header["fortran_order"]), 8 + width + length


def write_npz(path: Path, entries: Iterable[Entry]) -> None:
    """Writes what numpy.load can read, not compressed, one array in memory at a time.

    bfloat16 is stored as NumPy stores it, as two bytes without a type. `path` appears when all
    is written.
    """
    entries = check_entries(entries)
    with open_atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
        arrays = ahead(partial(produce, entry) for entry in entries)
        for entry, array in zip(entries, arrays, strict=True):
            member = zipfile.ZipInfo(f"{entry[0]}.npy")
            member.external_attr = 0o600 << 16
            with archive.open(member, "w", force_zip64=True) as stream:
                about = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(stream, about)
                stream.write(array.reshape(-1).view(np.uint8).data)
