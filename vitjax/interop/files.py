"""Files of weights, opened without trust: safetensors, npz, torch pickles, and sets of shards.

Opening reads headers only, reading copies one array, nothing in a file is ever executed, and
malformed bytes are an `InputError` with the path in it before memory is taken for what they claim.
Files go by their first bytes, not by their extension.
"""

import re
import zipfile
from pathlib import Path

from vitjax.errors import InputError
from vitjax.interop.npz_file import read_npz, write_npz
from vitjax.interop.safetensors_file import read_safetensors, write_safetensors
from vitjax.interop.torch_file import read_torch
from vitjax.interop.weight_file import MAX_HEADER, Malformed, WeightFile, explain_errors, parse_json

__all__ = ["WeightFile", "open_weights", "write_npz", "write_safetensors"]

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".index.json")
ALLOWED = (
    "allowed: .safetensors, .npz, a torch file (.pth .pt .bin .ckpt), an .index.json with its "
    "shards, or a folder that holds one of these"
)
OTHER_CONTENTS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull`"),
    (rb"\s*(<!doctype html|<html|<\?xml)", "a web page saved under this name: download it again"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5 (Keras)"),
    (rb"\x93NUMPY", "a single .npy array: numpy.savez gives it a name"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar", "an archive: unpack it first"),
    (rb"GGUF", "GGUF"),
    (rb"\s*[\[{]", "JSON (a config?), not weights"),
    (rb"\x08.[\x12\x1a]", "ONNX"),
    (rb"[\x81-\x8f\xde\xdf]", "msgpack (Flax)"),
)
OTHER_NAMES = (
    (r"\.(h5|hdf5|keras)$", "Keras"),
    (r"\.onnx$", "ONNX"),
    (r"\.msgpack$", "msgpack (Flax)"),
    (r"\.(index|meta|pb|tflite)$|\.data-\d+-of-\d+$|^checkpoint$", "a TensorFlow checkpoint"),
)


def open_weights(path: Path, key: str | None = None) -> WeightFile:
    """Opens a file, an index with its shards, or the folder that holds just one of these.

    Args:
      key: which of several state dicts in a torch file, such as "teacher" or "model/ema".

    Raises:
      InputError: not weights, malformed, unsafe or ambiguous.
      DamagedCheckpointError: a checksum of the file disagrees with the file.
    """
    if path.is_dir():
        path = _only_candidate(path)
    if not path.name.endswith(".index.json"):
        return _open_file(path, key)
    if key is not None:
        raise InputError(
            f"{path}: --key={key} chooses within one torch file, not in a set of shards"
        )
    return _open_index(path)


def _only_candidate(folder: Path) -> Path:
    with explain_errors(folder):
        found = sorted(
            p
            for p in folder.iterdir()
            if p.name.endswith(SUFFIXES) and not p.name.startswith(".") and p.is_file()
        )
        shards = {
            shard
            for p in found
            if p.name.endswith(".index.json")
            for shard in _weight_map(p).values()
        }
        found = [p for p in found if p.name not in shards]
        if not found:
            raise Malformed(
                f"no weights lie in this folder, and no finished step of a run; {ALLOWED}"
            )
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise Malformed(f"several files may be meant: {names}; give the path of the file")
    return found[0]


def _weight_map(path: Path) -> dict[str, str]:
    with explain_errors(path):
        if path.stat().st_size > MAX_HEADER:
            raise Malformed(f"an index of more than {MAX_HEADER} bytes")
        index = parse_json(path.read_bytes(), "the index")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Malformed('no "weight_map" of names to shards')
        for shard in weight_map.values():
            if not isinstance(shard, str) or not re.fullmatch(r"(?!\.{1,2}$)[^/\\:\0]+", shard):
                raise Malformed(f"shard {shard!r} is not the name of a file in the same folder")
    return weight_map


def _open_index(path: Path) -> WeightFile:
    weight_map = _weight_map(path)
    arrays, metadata = {}, {}
    with explain_errors(path):
        files = {name: _open_file(path.with_name(name)) for name in sorted({*weight_map.values()})}
        for name, shard in weight_map.items():
            if name not in files[shard]:
                raise Malformed(f"array {name!r} is not in its shard {shard}")
        for shard, file in files.items():
            extra = [name for name in file if weight_map.get(name) != shard]
            if extra:
                raise Malformed(f"shard {shard} holds {extra[0]!r}, which the index does not")
            arrays |= file.arrays
            metadata = file.metadata | metadata
        kind, *others = sorted({file.kind for file in files.values()})
        if others:
            raise Malformed(f"shards of several formats: {kind}, {', '.join(others)}")
    return WeightFile(path, kind, sum(f.size for f in files.values()), arrays, metadata)


def _open_file(path: Path, key: str | None = None) -> WeightFile:
    with explain_errors(path):
        if path.exists() and not path.is_file():
            raise Malformed("neither a file nor a folder")
        size = path.stat().st_size
        kind = _kind(path)
        if key is not None and kind != "torch":
            raise Malformed(f"--key={key} chooses a state dict of a torch file; this is {kind}")
        arrays, metadata = {}, {}
        if kind == "safetensors":
            arrays, metadata = read_safetensors(path, size)
        elif kind == "npz":
            arrays = read_npz(zipfile.ZipFile(path), size)
        else:
            arrays = read_torch(path, size, key)
        if not arrays:
            raise Malformed("holds no arrays")
        for name in arrays:
            name.encode()
    return WeightFile(path, kind, size, arrays, metadata)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise Malformed("an empty file")
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(re.search(r"(^|/)data\.pkl$", m.filename) for m in members):
            largest = max(m.file_size for m in members)
            if any(m.compress_type for m in members) or largest > path.stat().st_size:
                raise Malformed("a torch file with compressed or overlong members")
            return "torch"
        other = [m.filename for m in members if not m.filename.endswith(".npy")]
        if other:
            raise Malformed(f"seems to be a zip archive with {other[0]!r} inside; {ALLOWED}")
        return "npz"
    if head[8:9] == b"{" and (path.suffix == ".safetensors" or head[5:8] == b"\0\0\0"):
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "torch"
    matches = [what for form, what in OTHER_CONTENTS if re.match(form, head, re.I | re.S)]
    matches += [what for form, what in OTHER_NAMES if re.search(form, path.name)]
    seems = f"seems to be {matches[0]}" if matches else "its first bytes are of no known format"
    raise Malformed(f"{seems}; {ALLOWED}")
