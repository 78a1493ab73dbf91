"""What lies where in tar shards: read once, and kept in a file beside them."""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.data.sources.names import Names
from vitjax.errors import InputError

VERSION = 1  # of the index file
BLOCK = 512
FILES, LONG_NAME, PAX = b"0\x007", b"L", b"x"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_LABEL_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a sample consists of.

    Attributes:
      images: extensions of the image, the preferred first.
      label: extension of the label's file.
      label_key: where the label is in it, if it is JSON.
    """

    images: tuple[str, ...]
    label: str
    label_key: str


@dataclasses.dataclass
class Shard:
    """The whole samples of one tar file, and what is wrong with the others.

    Attributes:
      keys: their names without extensions.
      labels: what their labels' files say.
      starts, sizes: of the image's bytes, int64 `[N]`.
    """

    keys: Names
    labels: Names
    starts: np.ndarray
    sizes: np.ndarray
    problems: list[str]


def _number(field: bytes) -> int:
    """Octal digits, or big-endian binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    """An extended header: records "length key=value" and a newline."""
    values = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        record = data[: int(length)]
        if not int(length):
            raise ValueError("an extended header is damaged")
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        values[key.decode()] = os.fsdecode(value)
        data = data[int(length) :]
    return values


def read_members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of each file in a tar file.

    Raises:
      ValueError: it is damaged or cut off there.

    Source: POSIX.1-2017's pax, and GNU's long names and large sizes.
    """
    total = os.fstat(descriptor).st_size
    place, name, size = 0, None, None
    while place < total:
        header = os.pread(descriptor, BLOCK, place)
        if len(header) < BLOCK:
            raise ValueError(f"it is cut off at byte {total}, within a header")
        if not any(header):
            return
        try:
            wanted, length = _number(header[148:156]), _number(header[124:136])
        except ValueError:
            wanted, length = -1, 0
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != wanted:
            raise ValueError(f"there is no header of a tar file at byte {place}")
        kind, start = header[156:157], place + BLOCK
        if kind in (LONG_NAME, PAX):
            data = os.pread(descriptor, length, start)
            if kind == LONG_NAME:
                name = os.fsdecode(data.rstrip(b"\0"))
            else:
                values = _pax(data)
                name = values.get("path", name)
                size = int(values["size"]) if "size" in values else size
        else:
            if name is None:
                name = os.fsdecode(header[:100].split(b"\0")[0])
                prefix = os.fsdecode(header[345:500].split(b"\0")[0])
                if header[257:263] == b"ustar\0" and prefix:
                    name = f"{prefix}/{name}"
            length = length if size is None else size
            if start + length > total:
                raise ValueError(f"it is cut off at byte {total}, within {name}")
            if kind in FILES:
                yield name, start, length
            name = size = None
        place = start + -(-length // BLOCK) * BLOCK


def _label_text(data: bytes, layout: Layout) -> str:
    """The label as text; a list as JSON.

    Raises:
      ValueError: the file does not hold one.
    """
    text = data.decode("utf-8")
    if layout.label != "json":
        return text.strip()
    content = json.loads(text)
    if not isinstance(content, dict) or layout.label_key not in content:
        keys = ", ".join(sorted(content)) if isinstance(content, dict) else "no keys"
        raise ValueError(f"its JSON has no key {layout.label_key!r}; it has {keys}")
    label = content[layout.label_key]
    if label is None:
        raise ValueError(f"its JSON has null for {layout.label_key!r}")
    return label if isinstance(label, str) else json.dumps(label)


def scan(path: str, layout: Layout) -> Shard:
    """Reads the headers, and the labels, of one tar file.

    Raises:
      InputError: it is compressed, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    problems: list[str] = []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        begin = os.pread(descriptor, 8, 0)
        for magic, kind in COMPRESSED.items():
            if begin.startswith(magic):
                raise InputError(
                    f"{path} is compressed ({kind}), which allows no random access: unpack it first"
                )
        try:
            for name, start, size in read_members(descriptor):
                folder, slash, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                if stem and extension:
                    sample = samples.setdefault(f"{folder}{slash}{stem}", {})
                    if extension.lower() in sample:
                        problems.append(f"{path}: {name} is there more than once")
                    sample[extension.lower()] = (start, size)
        except ValueError as error:
            problems.append(f"{path}: {error}")
        keys, labels, starts, sizes = Names(), Names(), array.array("q"), array.array("q")
        for key, sample in samples.items():
            image = next((e for e in layout.images if e in sample), None)
            if image is None or layout.label not in sample:
                lacks = "image" if image is None else f".{layout.label}"
                has = ", ".join(f".{e}" for e in sample)
                problems.append(f"{path}: sample {key} has no {lacks}, only {has}")
                continue
            place, size = sample[layout.label]
            try:
                if size > MAX_LABEL_BYTES:
                    raise ValueError(f"it has {size} bytes")
                text = _label_text(os.pread(descriptor, size, place), layout)
            except ValueError as error:
                problems.append(f"{path}: the label of sample {key} cannot be read: {error}")
                continue
            keys.append(key)
            labels.append(text)
            starts.append(sample[image][0])
            sizes.append(sample[image][1])
    finally:
        os.close(descriptor)
    return Shard(keys, labels, np.asarray(starts, np.int64), np.asarray(sizes, np.int64), problems)


def _columns(shard: Shard) -> dict[str, np.ndarray]:
    keys, key_ends = shard.keys.packed()
    labels, label_ends = shard.labels.packed()
    return {"keys": keys, "key_ends": key_ends, "labels": labels, "label_ends": label_ends,
            "starts": shard.starts, "sizes": shard.sizes}  # fmt: skip


def _load(path: Path) -> dict[str, tuple[list[int], Shard]]:
    """The shards of an index file by their names, each with its stamp; {} if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            columns = {name: file[name] for name in header["columns"]}
        shards, places = {}, dict.fromkeys(columns, 0)
        for entry in header["shards"]:
            parts = {}
            for name, length in entry["lengths"].items():
                parts[name] = columns[name][places[name] : places[name] + length]
                places[name] += length
            keys = Names.from_packed(parts["keys"], parts["key_ends"])
            labels = Names.from_packed(parts["labels"], parts["label_ends"])
            shard = Shard(keys, labels, parts["starts"], parts["sizes"], entry["problems"])
            shards[entry["name"]] = (entry["stamp"], shard)
        return shards
    except Exception:  # whatever is wrong with it: it is made again
        return {}


def _save(path: Path, shards: dict[str, tuple[list[int], Shard]]) -> None:
    """Writes an index file, whole or not at all.

    Raises:
      OSError: there is no place for it.
    """
    parts = [_columns(shard) for _, shard in shards.values()]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    header: dict[str, Any] = {"columns": list(columns), "shards": []}
    for (name, (stamp, shard)), part in zip(shards.items(), parts, strict=True):
        lengths = {column: len(values) for column, values in part.items()}
        header["shards"].append(
            {"name": name, "stamp": stamp, "lengths": lengths, "problems": shard.problems}
        )
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - it is renamed, not deleted
        dir=path.parent, prefix=f"{path.name}.", delete=False
    )
    try:
        with file:
            np.savez(file, header=text, **columns)  # pyright: ignore[reportArgumentType]
        os.chmod(file.name, 0o644)  # others read the same shards
        os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise


def read_shards(paths: Sequence[str], patterns: Sequence[str], layout: Layout) -> list[Shard]:
    """The samples of all shards; those that are as they were when indexed are not read.

    The index lies beside the first shard, or, where nothing can be written there, in the user's
    cache folder.
    """
    folder = Path(os.path.abspath(paths[0])).parent
    names = [os.path.relpath(os.path.abspath(path), folder) for path in paths]
    wanted = [VERSION, dataclasses.astuple(layout), [Path(p).name for p in patterns]]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    away = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vitjax", "tar")
    places = (folder / f".vitjax-tar-{digest}.npz", cache / f"{away}-{digest}.npz")
    known = next((shards for shards in map(_load, places) if shards), {})
    found: dict[str, tuple[list[int], Shard]] = {}
    is_new = False
    for name, path in zip(names, paths, strict=True):
        state = os.stat(path)
        stamp = [state.st_size, state.st_mtime_ns]
        if name in known and known[name][0] == stamp:
            found[name] = known[name]
        else:
            found[name], is_new = (stamp, scan(path, layout)), True
    for place in places if is_new else ():
        with contextlib.suppress(OSError):
            _save(place, found)
            break
    return [shard for _, shard in found.values()]
