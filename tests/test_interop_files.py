"""Files of weights: what others write is read, what is malformed is refused by name."""

import io
import json
import os
import pickle
import random
import re
import struct
import sys
import traceback
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from vitjax.errors import DamagedCheckpointError, InputError
from vitjax.interop import safetensors_file, weight_file
from vitjax.interop.files import open_weights, write_npz, write_safetensors

NAMES = list(weight_file.DTYPES)


def example(seed=0):
    """One array of every dtype, among them an empty one, a scalar, and one of one dimension."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 3), (5,), (), (0, 4), (2, 1, 2), (4, 4)]
    arrays = {}
    for i, name in enumerate(NAMES):
        values = rng.integers(0, 2 if name == "bool" else 100, shapes[i % len(shapes)])
        arrays[f"block.{i}.{name}"] = np.asarray(values).astype(weight_file.DTYPES[name])
    return arrays


def entries(arrays):
    return [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


def read_all(path, **options):
    file = open_weights(path, **options)
    arrays = {name: file.read(name) for name in file}
    assert file.shapes == {name: a.shape for name, a in arrays.items()}
    assert file.dtypes == {name: a.dtype.name for name, a in arrays.items()}
    return arrays


def assert_equal(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name


def refuses(path, *words, error=InputError, **options):
    with pytest.raises(error) as caught:
        read_all(path, **options)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="reads torch's own files")


def sharded(folder, suffix="safetensors", **changes):
    """Two shards and their index."""
    arrays = example()
    halves = {f"model-0000{i}-of-00002.{suffix}": {} for i in (1, 2)}
    for i, (name, array) in enumerate(arrays.items()):
        halves[list(halves)[i % 2]][name] = array
    for shard, half in halves.items():
        write_safetensors(folder / shard, entries(half))
    weight_map = {name: shard for shard, half in halves.items() for name in half} | changes
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, arrays


def raw_safetensors(path, header, data=b"", pad=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def npy(array, version=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def raw_npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# What others write, and what we write


def test_safetensors_of_the_library_are_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="writes the files to read")
    path = tmp_path / "model.safetensors"
    library.save_file(example(), path, metadata={"format": "np"})
    file = open_weights(path)
    assert (file.kind, file.metadata, file.size) == (
        "safetensors", {"format": "np"}, path.stat().st_size,
    )  # fmt: skip
    assert_equal(read_all(path), example())


def test_the_library_reads_our_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="reads the files written")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, entries(example()), {"format": "pt"})
    assert_equal(library.load_file(path), example())
    assert_equal(read_all(path), example())
    assert open_weights(path).metadata["format"] == "pt"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, array in example().items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_torch_reads_our_safetensors(tmp_path, torch):
    library = pytest.importorskip("safetensors.torch", reason="reads the files written")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, entries(example()))
    for name, tensor in library.load_file(path).items():
        np.testing.assert_array_equal(tensor.double().numpy(), example()[name].astype(np.float64))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy_are_read(tmp_path, save):
    path = tmp_path / "model.npz"
    save(path, **example())
    assert (open_weights(path).kind, open_weights(path).metadata) == ("npz", {})
    assert_equal(read_all(path), example())


def test_numpy_reads_our_npz(tmp_path):
    path = tmp_path / "model.npz"
    write_npz(path, entries(example()))
    with np.load(path) as loaded:
        got = {n: a.view(ml_dtypes.bfloat16) if a.dtype == "V2" else a for n, a in loaded.items()}
    assert_equal(got, example())
    assert_equal(read_all(path), example())
    assert os.listdir(tmp_path) == ["model.npz"]


def test_npy_headers_of_every_version_order_and_endianness_are_read(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    members = {f"v{v}.npy": npy(array, (v, 0)) for v in (1, 2, 3)}
    members["fortran.npy"] = npy(np.asfortranarray(array))
    members["big.npy"] = npy(array.astype(">f4"))
    path = raw_npz(tmp_path / "a.npz", members)
    assert_equal(read_all(path), {name[:-4]: array for name in members})
    with pytest.raises(InputError, match="cannot be read"):
        open_weights(path).read("big", np.zeros((3, 4), np.float16))


def test_arrays_longer_than_a_chunk_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_file, "CHUNK", 64)
    arrays = {"a": np.arange(1000.0).reshape(10, 100), "f": np.asfortranarray(np.eye(20))}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    write_safetensors(tmp_path / "a.safetensors", entries(arrays))
    for suffix in ("npz", "safetensors"):
        file = open_weights(tmp_path / f"a.{suffix}")
        for name, array in arrays.items():
            for order in "CF":
                out = file.read(name, np.zeros(array.shape, array.dtype, order))
                np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_files_are_read(tmp_path, torch, is_zip):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "c": torch.tensor(7),
    }
    want = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.ones(3, ml_dtypes.bfloat16),
        "c": np.array(7),
    }
    path = tmp_path / "model.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    assert open_weights(path).kind == "torch"
    assert_equal(read_all(path), want)


def test_arrays_are_read_into_wider_ones_and_never_into_narrower_ones(tmp_path, torch):
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "a.safetensors", entries({"a": values}))
    write_npz(tmp_path / "a.npz", entries({"a": values}))
    torch.save({"a": torch.arange(6.0).reshape(2, 3).bfloat16()}, tmp_path / "a.pth")
    for suffix in ("safetensors", "npz", "pth"):
        file = open_weights(tmp_path / f"a.{suffix}")
        for out in (np.zeros((2, 3), np.float32), np.zeros((2, 6))[:, ::2], np.zeros((3, 2)).T):
            assert file.read("a", out) is out
            np.testing.assert_array_equal(out, values.astype(out.dtype))
        for out in (np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32)):
            with pytest.raises(InputError, match="cannot be read into"):
                file.read("a", out)
        with pytest.raises(InputError, match="allowed: a"):
            file.read("A")


def test_a_bool_is_true_or_false_whatever_byte_stands_for_it(tmp_path):
    header = {"b": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    path = raw_safetensors(tmp_path / "b.safetensors", header, b"\0\1\7")
    assert open_weights(path).read("b").tobytes() == b"\0\1\1"


def test_reading_takes_one_array_and_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_file, "CHUNK", 2**16)
    arrays = {f"w{i}": np.full(2**20, i, np.float32) for i in range(2)}
    write_safetensors(tmp_path / "a.safetensors", entries(arrays))
    write_npz(tmp_path / "a.npz", entries(arrays))
    for suffix in ("safetensors", "npz"):
        for dtype in (np.float32, np.float64):
            out = np.empty(2**20, dtype)
            tracemalloc.start()
            file = open_weights(tmp_path / f"a.{suffix}")
            for name in file:
                file.read(name, out)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**19, (suffix, dtype)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def broken():
        raise OSError("disk full")

    for write, name in ((write_safetensors, "a.safetensors"), (write_npz, "a.npz")):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(OSError, match="disk full"):
            write(tmp_path / name, [*entries(example()), ("z", (1,), "float32", broken)])
        assert (tmp_path / name).read_bytes() == b"old"
        with pytest.raises(InputError, match="unique"):
            write(tmp_path / name, entries(example()) * 2)
        with pytest.raises(InputError, match="complex64"):
            write(tmp_path / name, entries({"c": np.ones(1, np.complex64)}))
        with pytest.raises(AssertionError, match="announced"):
            write(tmp_path / name, [("a", (3,), "float32", lambda: np.ones(2, np.float32))])
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.safetensors"]


def test_safetensors_are_read_where_the_library_is_not_installed(root):
    for path in (root / "vitjax" / "interop").glob("*file*.py"):
        imported = re.search(r"^\s*(import|from) safetensors\b", path.read_text(), re.M)
        assert not imported, path


# Shards and folders


def test_shards_are_one_file(tmp_path):
    index, arrays = sharded(tmp_path)
    assert_equal(read_all(index), arrays)
    assert_equal(read_all(tmp_path), arrays)
    sizes = [p.stat().st_size for p in tmp_path.glob("*.safetensors")]
    assert open_weights(index).size == sum(sizes)
    assert "vitjax.crc32" in open_weights(index).metadata
    shard = min(tmp_path.glob("*.safetensors"))
    write_npz(shard, [(name, a.shape, a.dtype, a.copy) for name, a in read_all(shard).items()])
    refuses(index, "several formats: npz, safetensors")


def test_torch_shards_are_one_file(tmp_path, torch):
    for i in (1, 2):
        torch.save({f"w{i}": torch.ones(i)}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {f"w{i}": f"pytorch_model-{i}.bin" for i in (1, 2)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(read_all(tmp_path), {f"w{i}": np.ones(i, np.float32) for i in (1, 2)})
    refuses(index, "not in a set of shards", key="model")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/tmp/x.safetensors", "..", ".", "", "a/b", "a\\b", "c:x", 3]
)
def test_shards_lie_beside_their_index(tmp_path, shard):
    index, _ = sharded(tmp_path, extra=shard)
    refuses(index, "not the name of a file in the same folder", repr(shard))


def test_an_index_and_its_shards_must_agree(tmp_path):
    index, arrays = sharded(tmp_path, extra="model-00001-of-00002.safetensors")
    refuses(index, "'extra' is not in its shard")
    index, _ = sharded(tmp_path, extra="model-00003-of-00002.safetensors")
    with pytest.raises(InputError, match=r"model-00003-of-00002\.safetensors: no such file"):
        open_weights(index)
    full = json.loads(index.read_text())["weight_map"]
    full.pop("extra"), full.pop(next(iter(arrays)))
    index.write_text(json.dumps({"weight_map": full}))
    refuses(index, next(iter(arrays)), "which the index does not")
    for text, word in (("{", "JSON"), ("[]", "JSON object"), ("{}", "weight_map")):
        index.write_text(text)
        refuses(index, word)


def test_a_folder_with_one_file_is_that_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, "no weights lie", ".safetensors")
    write_npz(tmp_path / "anything.npz", entries(example()))
    (tmp_path / "._anything.npz").write_bytes(b"macOS leaves these")
    assert_equal(read_all(tmp_path), example())
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"x")
    refuses(tmp_path, "anything.npz", "model.safetensors", "pytorch_model.bin", "of the file")
    refuses(tmp_path / "absent.npz", "no such file")
    os.mkfifo(tmp_path / "pipe.npz")
    refuses(tmp_path / "pipe.npz", "neither a file nor a folder")


# What is refused


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"a": GOOD}, 5, ["truncated", "3 bytes are missing"]),
        ({"a": GOOD}, 11, ["3 bytes too many"]),
        ({"a": GOOD | {"dtype": "F8_E4M3"}}, 8, ["unsupported dtype 'F8_E4M3'", "BF16"]),
        ({"a": GOOD | {"dtype": ["F32"]}}, 8, ["dtype"]),
        ({"a": GOOD | {"shape": [3]}}, 8, ["'a' of 12 bytes has offsets [0, 8]"]),
        ({"a": GOOD | {"shape": [-2]}}, 8, ["impossible shape"]),
        ({"a": GOOD | {"shape": [2.0]}}, 8, ["impossible shape"]),
        ({"a": GOOD | {"shape": [True, 2]}}, 8, ["impossible shape"]),
        ({"a": GOOD | {"shape": [0, 2**62], "data_offsets": [0, 0]}}, 0, ["impossible shape"]),
        ({"a": GOOD | {"shape": [1] * 60 + [2]}}, 8, ["impossible shape"]),
        ({"a": GOOD | {"data_offsets": [-8, 0]}}, 8, ["offsets"]),
        ({"a": GOOD | {"data_offsets": [0, 8, 16]}}, 8, ["offsets"]),
        ({"a": GOOD | {"data_offsets": "08"}}, 8, ["offsets"]),
        ({"a": GOOD, "b": GOOD}, 8, ["'b' begins at 0", "ends at 8"]),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, 20, ["'b' begins at 12"]),
        ({"a": {"dtype": "F32"}}, 8, ["lacks"]),
        ({"a": 3}, 8, ["lacks"]),
        ({"__metadata__": {"a": 3}, "a": GOOD}, 8, ["__metadata__"]),
        ({"__metadata__": [], "a": GOOD}, 8, ["__metadata__"]),
        ({}, 0, ["no arrays"]),
        ({"\ud800": GOOD}, 8, ["surrogates"]),
        (b'{"a": ' + json.dumps(GOOD).encode() + b', "a": {}}', 8, ["'a' occurs twice"]),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 8, ["'dtype' occurs twice"]),
        (b'{"a": ', 8, ["not valid JSON"]),
        (b'{"a\xff": 1}', 8, ["not valid JSON"]),
        (b'{"a":' * 50_000, 8, ["not valid JSON"]),
        (b'{"a": ' + b"9" * 5000 + b"}", 8, ["not valid JSON"]),
    ],
    ids=str,
)
def test_malformed_safetensors_are_refused(tmp_path, header, size, words):
    refuses(raw_safetensors(tmp_path / "a.safetensors", header, bytes(size)), *words)


def test_a_safetensors_header_stays_in_its_bounds(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{" * 100)
    refuses(path, str(2**62), "100000000")
    path.write_bytes(struct.pack("<Q", 1000) + b"{" * 100)
    refuses(path, "truncated", "900 bytes of its header are missing")


def test_our_checksums_are_checked(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, entries(example()), {"note": "kept"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    file = open_weights(path)
    *others, last = file
    assert all(file.read(name) is not None for name in others)
    with pytest.raises(DamagedCheckpointError, match=f"a.safetensors: damaged: '{last}' has CRC"):
        file.read(last)
    for old, new in (
        (b'"I64"', b'"U64"'), (b"[2,3]", b"[3,2]"), (b"block.0", b"block.O"), (b"kept", b"kepT"),
        (b"vitjax.crc32", b"vitjay.crc32"), (b"vitjax.table_crc32", b"vitjax.tablE_crc32"),
    ):  # fmt: skip
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        refuses(path, "damaged", error=DamagedCheckpointError)
    path.write_bytes(whole.replace(b"block.0", b"block.O", 1))  # among the checksums
    with pytest.raises(DamagedCheckpointError):
        open_weights(path)
    for old, new in ((b"block.0", b"block.O"), (b'"F64"', b'"I64"')):  # in one of two places
        path.write_bytes(new.join(whole.rsplit(old, 1)))
        refuses(path, "damaged", error=DamagedCheckpointError)


def with_header(text):
    text = text.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy(np.ones(3))[:-1], ["tells of 152 bytes", "of 151"]),
        (npy(np.ones(3)) + b"x", ["tells of 152 bytes", "of 153"]),
        (npy(np.ones(3, np.complex64)), ["<c8", "float32"]),
        (npy(np.array(["abc"])), ["<U3"]),
        (npy(np.ones(3, [("a", "f4"), ("b", "f4")])), ["dtype"]),
        (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"), ["|O", "pickle"]),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2**40,)}"), ["malformed"]),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), ["impossible"]),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': 3}"), ["impossible"]),
        (with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**62})}}"),
         ["impossible shape"]),
        (with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40},)}}"),
         ["tells of 4398046511"]),
        (with_header("{'descr': '<f4', 'shape': (3,)}"), ["unknown header"]),
        (with_header("__import__('os').system('false')"), ["malformed"]),
        (with_header("[" * 9000), ["malformed"]),
        (with_header(" " * 20_000), ["20000", "10000"]),
        (b"\x93NUMPY\4\0" + bytes(99), ["versions 1 to 3"]),
        (b"", ["versions 1 to 3"]),
    ],
    ids=str,
)  # fmt: skip
def test_malformed_npz_are_refused(tmp_path, member, words):
    refuses(raw_npz(tmp_path / "a.npz", {"a.npy": member}), *words)


def test_archives_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    good = npy(np.ones(3))
    refuses(raw_npz(path, {"a.npy": good, "readme.txt": b""}), "zip archive", "readme.txt")
    refuses(raw_npz(path, {}), "no arrays")
    refuses(raw_npz(path, {"a.npy": good}, zipfile.ZIP_BZIP2), "unsupported compression")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", good), archive.writestr("a.npy", good)
    refuses(path, "'a.npy' occurs twice")


def test_members_with_two_sizes_or_two_names_are_refused(tmp_path):
    path = raw_npz(tmp_path / "a.npz", {"a.npy_b.npy": npy(np.ones(3))})
    whole = path.read_bytes()
    size = struct.pack("<L", 152)
    assert whole.count(size * 2) == 2
    path.write_bytes(struct.pack("<2L", 152, 153).join(whole.rsplit(size * 2, 1)))
    refuses(path, "two sizes")
    path.write_bytes(whole.replace(b"a.npy_b", b"a.npy\0b"))
    refuses(path, "impossible name")


def test_an_npz_written_to_a_pipe_is_read(tmp_path):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise OSError

        tell = seek

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # the sizes follow the data
        for name in "ab":
            archive.writestr(f"{name}.npy", npy(np.ones(3)))
    (tmp_path / "a.npz").write_bytes(pipe.getvalue())
    assert_equal(read_all(tmp_path / "a.npz"), {"a": np.ones(3), "b": np.ones(3)})


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = raw_npz(tmp_path / "a.npz", {"a.npy": npy(np.zeros(2**20))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size * 100 < 2**23
    assert not read_all(path)["a"].any()  # small enough, whatever its ratio
    whole = path.read_bytes()
    assert whole.count(struct.pack("<L", 2**23 + 128)) == 2
    path.write_bytes(whole.replace(struct.pack("<L", 2**23 + 128), struct.pack("<L", 2**31)))
    tracemalloc.start()
    refuses(path, "claims 2147483648 bytes", "bomb")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_array_that_the_directory_lost_is_missed(tmp_path):
    """Names of 18 characters: each directory entry has 64 bytes, so one bit can drop one."""
    path = raw_npz(tmp_path / "a.npz", {f"{i}{'x' * 13}.npy": npy(np.ones(i)) for i in range(4)})
    whole = path.read_bytes()
    end = len(whole) - 22
    fields = list(struct.unpack("<4s4H2LH", whole[end:]))
    assert fields[5] == 256
    fields[5] -= 64
    path.write_bytes(whole[:end] + struct.pack("<4s4H2LH", *fields))
    refuses(path, "hole")
    fields[6] += 64
    path.write_bytes(whole[:end] + struct.pack("<4s4H2LH", *fields))
    refuses(path, "hole")
    fields[5:7] = 256, fields[6] - 64
    comment = fields[6] + 32  # of the first entry: swallows the second
    path.write_bytes(whole[:comment] + b"\x40" + whole[comment + 1 :])
    refuses(path, "hole")


def test_a_flipped_bit_in_an_npz_is_damage(tmp_path):
    for save in (np.savez, np.savez_compressed, lambda p, **a: write_npz(p, entries(a))):
        path = tmp_path / "a.npz"
        save(path, a=np.random.default_rng(0).random(5000))
        whole = bytearray(path.read_bytes())
        whole[20_000] ^= 1
        path.write_bytes(whole)
        refuses(path, "a.npz", error=(DamagedCheckpointError, InputError))
    refuses(path, "damaged", error=DamagedCheckpointError)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.safetensors", b"", "an empty file"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.npz", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.npz", b"<html>", "a web page"),
        ("a.bin", b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
        ("a.bin", npy(np.ones(3)), "a single .npy array"),
        ("a.ckpt", b"\x1f\x8b\x08", "an archive"),
        ("a.bin", b"GGUF\3\0\0\0", "GGUF"),
        ("config.json", b'{"a": 1}', "JSON"),
        ("config.json", b'{"abcdef{": 1}', "JSON"),
        ("a.bin", b"\x08\x07\x12\x07pytorch", "ONNX"),
        ("a.bin", b"\x82\xa6params", "msgpack (Flax)"),
        ("flax_model.msgpack", b"\xff\xff", "msgpack (Flax)"),
        ("model.ckpt-1.data-00000-of-00001", b"\xff\xff", "a TensorFlow checkpoint"),
        ("model.ckpt.index", b"\0\0\5", "a TensorFlow checkpoint"),
        ("a.safetensors", b"\xff" * 30, "no known format"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, word)


def test_a_file_goes_by_its_content(tmp_path):
    write_npz(tmp_path / "a.bin", entries(example()))
    write_safetensors(tmp_path / "b.npz", entries(example()))
    assert_equal(read_all(tmp_path / "a.bin"), example())
    assert_equal(read_all(tmp_path / "b.npz"), example())
    refuses(tmp_path / "a.bin", "--key=model", "npz", key="model")


# Torch


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, torch, how):
    path, proof = tmp_path / "model.bin", tmp_path / "proof"
    content = {"w": torch.ones(2), "x": Payload(proof)}
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(Payload(proof), protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refuses(path, "asks to run code", "open")
    assert not proof.exists()
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes()).close()
        assert proof.exists(), "the payload works, where it is let"


def test_a_torch_file_without_torch_says_what_to_do(tmp_path, torch, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    refuses(tmp_path / "a.pth", "pip install torch", "safetensors")


def test_the_one_state_dict_is_found(tmp_path, torch):
    path = tmp_path / "a.pth"
    state = {"w": torch.ones(2)}
    moments = {"exp_avg": torch.ones(2)}
    optimizer = {"state": {0: moments, "w": moments}, "param_groups": [{"lr": 0.1}]}
    for tree in (
        state, {**state, "epoch": 3}, {"model": state, "epoch": 3, "optimizer": optimizer},
        {"model": state, "rng": {0: torch.ones(2)}},
        {"state_dict": {"model": state}, "names": ["x"], "args": {"lr": 0.1}},
    ):  # fmt: skip
        torch.save(tree, path)
        assert_equal(read_all(path), {"w": np.ones(2, np.float32)})


def test_several_state_dicts_must_be_chosen_from(tmp_path, torch):
    path = tmp_path / "a.pth"
    names = {"student": 1, "teacher": 2}
    torch.save({n: {"w": torch.ones(i)} for n, i in names.items()} | {"c": torch.ones(3)}, path)
    refuses(path, "'student' (1 tensors)", "'teacher'", "--key=NAME")
    assert_equal(read_all(path, key="teacher"), {"w": np.ones(2, np.float32)})
    assert_equal(read_all(path, key=""), {"c": np.ones(3, np.float32)})
    refuses(path, "no state dict 'teachr'", "'teacher'", key="teachr")
    torch.save({"a": {"b": {"w": torch.ones(1)}, "c": {"w": torch.ones(2)}}}, path)
    assert_equal(read_all(path, key="a/c"), {"w": np.ones(2, np.float32)})


def test_torch_files_without_plain_tensors_are_refused(tmp_path, torch):
    path = tmp_path / "a.pth"
    for content, word in (
        ([torch.ones(2)], "no state dict"),
        ({"epoch": 3}, "no state dict"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.ones(2).to_sparse()}, "not dense"),
        ({"a": torch.ones(2, device="meta")}, "not dense"),
        ({"a": torch.ones(1).expand(10**6, 10**6)}, "claims 4000000000000 bytes"),
    ):
        torch.save(content, path)
        refuses(path, word)
    for size in (100, 10**6):
        members = {"a/data.pkl": bytes(size), "a/version": b"3"}
        refuses(raw_npz(path, members, zipfile.ZIP_DEFLATED), "compressed")


# Fuzzing


def corrupt(random, whole, hot):
    """One to three accidents; half of them among the `hot` bytes, where the names and sizes are."""
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        start, stop = hot if random.random() < 0.5 else (0, len(data))
        at = min(random.randrange(start, stop), len(data) - 1)
        length = random.choice((1, 1, 2, 4, 16, 64))
        kind = random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + length] = random.randbytes(len(data[at : at + length]))
        elif kind == 2:
            data[at] = random.choice(b'\x00\xff\x7f\x80 019[]{}",:-eF\\x')
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] if random.random() < 0.5 else bytes(length)
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def edit_header(random, whole):
    """A safetensors file whose header was changed, and is valid JSON."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    a, b = random.sample([name for name in header if name != "__metadata__"], 2)
    field = random.choice(("dtype", "shape", "data_offsets", "name", "drop", "rename"))
    if field == "name":
        header[a], header[b] = header[b], header[a]
    elif field == "drop":
        del header[a]
    elif field == "rename":
        header[f"{a}x"] = header.pop(a)
    elif random.random() < 0.5:
        header[a][field], header[b][field] = header[b][field], header[a][field]
    else:
        other = {"dtype": random.choice(list(safetensors_file.SAFETENSORS_DTYPES)), "shape": [3, 2]}
        header[a][field] = other.get(field, [0, 2**60])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


def outcome(path, data):
    path.write_bytes(data)
    try:
        return read_all(path)
    except (InputError, DamagedCheckpointError) as error:
        assert str(path) in str(error)
        str(error).encode()
        assert "TypeCheck" not in str(error)
        cause = error.__cause__
        if isinstance(cause, (AttributeError, NameError, AssertionError, TypeError)):
            raised_by = traceback.extract_tb(cause.__traceback__)[-1].filename
            assert "/vitjax/interop/" not in raised_by, "a fault of ours"
        return None


def test_corrupted_safetensors_of_others_are_refused_or_make_sense(tmp_path):
    library = pytest.importorskip("safetensors", reason="the files to corrupt")
    save = pytest.importorskip("safetensors.numpy", reason="the files to corrupt").save
    whole, kept = save(example()), 0
    hot = (0, 8 + struct.unpack("<Q", whole[:8])[0])
    for seed in range(500):
        source = random.Random(seed)
        data = edit_header(source, whole) if seed % 5 == 0 else corrupt(source, whole, hot)
        got = outcome(tmp_path / "a.safetensors", data)
        if got is not None:
            kept += 1
            size = 8 + struct.unpack("<Q", data[:8])[0] + sum(a.nbytes for a in got.values())
            assert size == len(data), seed
            theirs = dict(library.deserialize(data))  # it agrees that this is valid, and on all
            assert {n: list(a.shape) for n, a in got.items()} == {
                n: entry["shape"] for n, entry in theirs.items()
            }
            for name, array in got.items():
                assert array.dtype == bool or array.tobytes() == theirs[name]["data"]
    assert 20 < kept < 400


def test_corrupted_safetensors_of_ours_are_refused_or_right(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", entries(example()), {"format": "pt"})
    whole, kept = (tmp_path / "a.safetensors").read_bytes(), 0
    hot = (0, 8 + struct.unpack("<Q", whole[:8])[0])
    for seed in range(500):
        source = random.Random(seed)
        data = edit_header(source, whole) if seed % 5 == 0 else corrupt(source, whole, hot)
        got = outcome(tmp_path / "a.safetensors", data)
        if got is not None:
            kept += 1
            assert_equal(got, example())
    assert kept < 50


@pytest.mark.parametrize("save", ["savez", "savez_compressed", "write_npz"])
def test_corrupted_npz_are_refused_or_right(tmp_path, save):
    path = tmp_path / "a.npz"
    arrays = example()
    arrays["noise"] = np.random.default_rng(0).random(300)
    if save == "write_npz":
        write_npz(path, entries(arrays))
    else:
        getattr(np, save)(path, **arrays)
    whole, kept = path.read_bytes(), 0
    hot = (whole.index(b"PK\1\2"), len(whole))
    for seed in range(340):
        got = outcome(path, corrupt(random.Random(seed), whole, hot))
        if got is not None:
            kept += 1
            assert_equal(got, arrays)
    assert 0 < kept < 200  # dates and permissions are of no consequence


@pytest.mark.parametrize("is_zip", [True, False])
def test_corrupted_torch_files_are_refused_or_give_tensors(tmp_path, torch, is_zip):
    path = tmp_path / "a.pth"
    tensors = {"model": {f"w{i}": torch.ones(i, 3) for i in range(6)}, "epoch": 3}
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    start = whole.index(b"\x80\x02")
    kept = 0
    for seed in range(60):
        kept += outcome(path, corrupt(random.Random(seed), whole, (start, start + 400))) is not None
    assert 0 < kept < 60


def test_the_crc_of_a_table_is_of_its_content_not_of_its_spelling(tmp_path):
    """A tool that copies our arrays and metadata, and lays them out anew, does no damage."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, entries(example()))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = dict(sorted(header.items(), reverse=True))
    raw_safetensors(path, header, data[8 + length :], pad=3)
    assert_equal(read_all(path), example())
    crcs = json.loads(header["__metadata__"]["vitjax.crc32"])
    assert crcs == {name: f"{zlib.crc32(a.tobytes()):08x}" for name, a in example().items()}
