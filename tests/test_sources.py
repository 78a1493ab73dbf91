"""Sources: the same examples from every layout, damaged input, labels, mixtures."""

import bz2
import concurrent.futures
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitjax import config as config_lib
from vitjax.data.check import check_source
from vitjax.data.images import UnreadableImage
from vitjax.data.loader import Loader
from vitjax.data.order import make_order
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources import array_record, labels, mixture, shards, tar_index
from vitjax.data.sources.array_record import ArrayRecord
from vitjax.data.sources.arrays import Arrays, Npy, Npz
from vitjax.data.sources.folders import ImageFolder, ZipFolder
from vitjax.data.sources.manifest import Manifest
from vitjax.data.sources.mixture import Mixture
from vitjax.data.sources.names import Names
from vitjax.data.sources.parquet import Parquet
from vitjax.data.sources.subset import Subset
from vitjax.data.sources.tar import TarShards
from vitjax.data.sources.tfds import TFDS
from vitjax.errors import InputError

CLASSES = ("airplane", "cat", "dog")
ARRAYS = "vitjax.data.sources.arrays:Npz"


def png(value: int, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), value).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(test_data) -> list[tuple[str, bytes, int]]:
    """Name, JPEG and label of five real images of three classes, sorted by name."""
    with zipfile.ZipFile(test_data / "images" / "cifar10_jpeg.zip") as archive:
        return [
            (f"{name}/{i:04d}.jpg", archive.read(f"train/{name}/{i:04d}.jpg"), label)
            for label, name in enumerate(CLASSES)
            for i in range(5)
        ]


def labels_of(source) -> list[int]:
    """All labels of single-label data at once."""
    return np.asarray(source.all_labels()).tolist()


def write_folder(images, place: Path) -> Path:
    for name, data, _ in images:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def write_zip(images, path: Path, method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data, _ in images:
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            file.addfile(info, io.BytesIO(data))
    return path


def samples(images) -> dict[str, bytes]:
    members = {}
    for i, (_, data, label) in enumerate(images):
        members |= {f"{i:06d}.jpg": data, f"{i:06d}.cls": str(label).encode()}
    return members


def write_parquet(path: Path, columns: dict, row_group_size=4, features=None) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if features is not None:
        content = json.dumps({"info": {"features": features}}).encode()
        table = table.replace_schema_metadata({b"huggingface": content})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_array_record(images, path: Path) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _, data, label in images:
        writer.write(array_record.make_example({"image": [data], "label": [label]}))
    writer.close()
    return path


def write_tfds(images, place: Path, multi_label=False) -> Path:
    """A data set in TFDS's layout, its one shard written by the project's own ArrayRecord code."""
    import tensorflow_datasets as tfds

    folder = place / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    names = tfds.features.ClassLabel(names=CLASSES)
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.Sequence(names) if multi_label else names,
    })  # fmt: skip
    features.save_config(str(folder))
    write_array_record(images, folder / "pets-train.array_record-00000-of-00001")
    split = {"name": "train", "numBytes": "1", "shardLengths": [str(len(images))]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"fileFormat": "array_record", "name": "pets", "splits": [split], "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return place


def write_manifest(path: Path, rows: list[str], header="path,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def every_layout(images, place: Path) -> dict:
    """Each source, holding the same images."""
    folder = str(write_folder(images, place / "folder"))
    rows = [f"{name},{CLASSES[label]}" for name, _, label in images]
    encoded = [{"bytes": data, "path": name} for name, data, _ in images]
    columns = {"image": encoded, "label": [label for *_, label in images]}
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    write_tar(place / "a-000.tar", samples(images[:7]))
    write_tar(place / "a-001.tar", {f"x/{k}": v for k, v in samples(images[7:]).items()})
    return {
        "ImageFolder": ImageFolder(folder),
        "ZipFolder": ZipFolder(str(write_zip(images, place / "stored.zip"))),
        "deflated": ZipFolder(str(write_zip(images, place / "deflated.zip", zipfile.ZIP_DEFLATED))),
        "TarShards": TarShards(str(place / "a-{000..001}.tar"), class_names=CLASSES),
        "Parquet": Parquet(str(write_parquet(place / "a.parquet", columns, 4, features))),
        "TFDS": TFDS("pets", "train", str(write_tfds(images, place / "tfds"))),
        "Manifest": Manifest(str(write_manifest(place / "all.csv", rows)), root=folder),
        "ArrayRecord": ArrayRecord(str(write_array_record(images, place / "a.array_record")), 3),
    }


def test_every_layout_gives_the_same_bytes_and_labels(images, tmp_path):
    wanted = [(data, label) for _, data, label in images]
    for name, source in every_layout(images, tmp_path).items():
        assert len(source) == len(images), name
        assert [(r["image"], r["label"]) for r in source] == wanted, name
        assert source.num_classes == 3, name
        assert source.class_names == (None if name == "ArrayRecord" else CLASSES), name
        assert len({source[i]["id"] for i in range(len(source))}) == len(images), name
        if hasattr(source, "all_labels"):
            assert labels_of(source) == [label for *_, label in images], name
        check_source(source, name, 3)
    assert "tensorflow" not in sys.modules


def test_eight_threads_read_what_one_reads(images, tmp_path):
    for name, source in every_layout(images, tmp_path).items():
        order = np.random.default_rng(0).integers(len(source), size=400).tolist()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for i, record in zip(order, pool.map(source.__getitem__, order), strict=True):
                assert (record["image"], record["label"]) == images[i][1:], name


def test_two_hundred_thousand_names_have_no_object_each():
    count = 200_000
    tracemalloc.start()
    try:
        names = Names(f"class{i % 1000:04d}/image_{i:08d}.jpg" for i in range(count))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / count < 50  # 28 letters and 8 bytes; a list of str takes 85
    assert names[123_456] == "class0456/image_00123456.jpg" and len(names) == count
    assert Names.from_packed(*names.packed())[count - 1] == names[count - 1]
    for outside in (count, -1):
        with pytest.raises(IndexError):
            names[outside]


def test_names_that_are_no_text_survive():
    odd = os.fsdecode(b"\xff\xfe.jpg")
    assert list(Names(["ü.jpg", odd, ""])) == ["ü.jpg", odd, ""]


# Folders and zips


def test_a_vanished_file_is_unreadable_not_fatal(images, tmp_path):
    source = ImageFolder(str(write_folder(images, tmp_path / "a")))
    os.unlink(source[3]["id"])
    with pytest.raises(UnreadableImage, match="No such file"):
        source[3]
    batch = next(Loader(source, Preprocess(8), max_unreadable_fraction=0.1).eval_batches(15))
    assert batch["labels"].tolist() == [label for *_, label in images]  # its neighbour's


def test_empty_class_folders_are_named_and_hidden_files_are_no_images(images, tmp_path):
    folder = write_folder(images, tmp_path / "a")
    (folder / "zebra").mkdir()
    (folder / "cat" / "._0000.jpg").write_bytes(b"left by macOS")
    (folder / ".cache").mkdir()
    source = ImageFolder(str(folder))
    assert (len(source), source.class_names) == (15, CLASSES)
    assert len(source.problems()) == 1 and "zebra holds no images" in source.problems()[0]
    with zipfile.ZipFile(write_zip(images, tmp_path / "a.zip"), "a") as archive:
        archive.writestr("zebra/", b"")
        archive.writestr("__MACOSX/cat/._0000.jpg", b"left by macOS")
    packed = ZipFolder(str(tmp_path / "a.zip"))
    assert (len(packed), packed.class_names) == (15, CLASSES)
    assert len(packed.problems()) == 1 and "zebra/" in packed.problems()[0]


def test_subfolders_of_a_class_belong_to_it(tmp_path):
    for name in ("a/z.png", "a/sub/b.png", "a/c.png", "b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    source = ImageFolder(str(tmp_path))
    read = [os.path.relpath(r["id"], tmp_path) for r in source]
    assert read == ["a/c.png", "a/z.png", "a/sub/b.png", "b/x.png"]
    assert labels_of(source) == [0, 0, 0, 1]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_entry_of_a_zip_is_one_unreadable_image(images, tmp_path, method):
    path = write_zip(images, tmp_path / "a.zip", method)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(images[4][0]).header_offset
    content = bytearray(path.read_bytes())
    content[start + 400] ^= 0x10
    path.write_bytes(content)
    source = ZipFolder(str(path))
    with pytest.raises(UnreadableImage, match=r"checksum|unpack"):
        source[4]
    others = [i for i in range(15) if i != 4]
    assert [source[i]["image"] for i in others] == [images[i][1] for i in others]


def test_a_zip_with_long_extra_fields_is_read_where_its_images_begin(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(3):
            entry = zipfile.ZipInfo(f"a/{i}.png")
            entry.extra = b"\x99\x99" + (300).to_bytes(2, "little") + bytes(300)
            archive.writestr(entry, png(i))
    source = ZipFolder(str(tmp_path / "a.zip"))
    assert [r["image"] for r in source] == [png(i) for i in range(3)]


def test_a_zip_packed_by_other_methods_says_so(images, tmp_path):
    source = ZipFolder(str(write_zip(images[:2], tmp_path / "a.zip", zipfile.ZIP_LZMA)))
    assert len(source.problems()) == 2 and "method 14" in source.problems()[0]
    with pytest.raises(UnreadableImage, match="method 14"):
        source[0]


# Tar shards


def test_opening_tar_shards_again_reads_the_index_alone(images, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(images))
    first = TarShards(str(path))
    monkeypatch.setattr(tar_index, "scan", lambda *_: pytest.fail("scanned"))
    again = TarShards(str(path))
    assert [r["image"] for r in again] == [r["image"] for r in first]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".tar"] == [
        next(tmp_path.glob(".vitjax-tar-*.npz")).name
    ]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_index_is_made_again(images, tmp_path, damage):
    path = write_tar(tmp_path / "a.tar", samples(images))
    TarShards(str(path))
    index = next(tmp_path.glob(".vitjax-tar-*.npz"))
    content = bytearray(index.read_bytes())
    content[content.index(b'"stamp"') + 12] ^= 1
    changed = {"cut": content[:100], "flip": content, "empty": b""}[damage]
    index.write_bytes(changed)
    assert [r["label"] for r in TarShards(str(path))] == [label for *_, label in images]
    assert index.read_bytes() != changed


def test_a_changed_shard_is_read_again_and_the_others_are_not(images, tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", samples(images[:5]))
    write_tar(tmp_path / "b.tar", samples(images[5:]))
    TarShards(str(tmp_path / "*.tar"))
    write_tar(tmp_path / "b.tar", samples(images[6:]))
    os.utime(tmp_path / "b.tar", (1, 1))
    scanned, scan = [], tar_index.scan

    def record(path, layout):
        scanned.append(os.path.basename(path))
        return scan(path, layout)

    monkeypatch.setattr(tar_index, "scan", record)
    source = TarShards(str(tmp_path / "*.tar"))
    assert scanned == ["b.tar"] and len(source) == 14
    assert source[5]["image"] == images[6][1]


def test_where_nothing_can_be_written_the_index_lies_in_the_cache(images, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(images))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save = tar_index._save

    def refuse(place, shards):
        if place.parent == tmp_path:
            raise PermissionError("read-only")
        save(place, shards)

    monkeypatch.setattr(tar_index, "_save", refuse)
    TarShards(str(path))
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    monkeypatch.setattr(tar_index, "scan", lambda *_: pytest.fail("scanned"))
    assert len(TarShards(str(path))) == 15


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_kind_of_tar_are_read(tmp_path, layout):
    folder = "d" * 90 + "/" + "e" * 60
    members = {f"{folder}/1.png": png(1), f"{folder}/1.cls": b"4", "short/1.png": png(2),
               "short/1.cls": b"0"}  # fmt: skip
    source = TarShards(str(write_tar(tmp_path / "a.tar", members, format=layout)))
    assert source[0]["id"].endswith(f"{folder}/1") and source[0]["label"] == 4
    assert (source[1]["image"], source.num_classes) == (png(2), 5)


def test_samples_without_an_image_or_a_label_are_named(tmp_path):
    members = {"1.png": png(1), "1.cls": b"1", "2.png": png(2), "3.cls": b"0", "4.png": png(4),
               "4.cls": b"cat", "5.seg.png": png(5), "5.cls": b"0"}  # fmt: skip
    source = TarShards(str(write_tar(tmp_path / "a.tar", members)))
    assert len(source) == 1
    text = "\n".join(source.problems())
    for words in ("sample 2 has no .cls", "sample 3 has no image", "'cat' is no integer",
                  "sample 5 has no image", "a.tar"):  # fmt: skip
        assert words in text, words
    with pytest.raises(InputError, match="4 problems"):
        check_source(source, "data", every_class=False)


def test_a_truncated_tar_keeps_its_whole_samples_and_says_so(images, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(images), format=tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    path.write_bytes(content[:6000])  # within an image
    source = TarShards(str(path))
    assert 0 < len(source) < 15
    assert source[len(source) - 1]["image"] == images[len(source) - 1][1]
    assert "cut off at byte 6000" in source.problems()[0]
    path.write_bytes(content[:300])
    with pytest.raises(InputError, match=r"no whole samples[\s\S]*within a header"):
        TarShards(str(path))
    path.write_bytes(b"something else" * 100)
    with pytest.raises(InputError, match="no header of a tar file at byte 0"):
        TarShards(str(path))


def test_a_shard_cut_while_it_is_read_is_unreadable(images, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(images))
    source = TarShards(str(path))
    with open(path, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(UnreadableImage, match=r"a\.tar ends before byte"):
        source[14]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_refused(images, tmp_path, compress):
    path = write_tar(tmp_path / "a.tar", samples(images))
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(InputError, match=r"compressed .* unpack it first"):
        TarShards(str(path))


def test_tar_labels_may_be_json_or_several(tmp_path):
    members = {"1.png": png(1), "1.json": b'{"label": 2, "kinds": [0, 3]}',
               "1.cls": b"1, 2\n4", "2.png": png(2), "2.json": b'{"label": 0, "kinds": []}',
               "2.cls": b"", "3.png": png(3), "3.json": b'{"label": null}',
               "3.cls": b"[1, 0]"}  # fmt: skip
    path = str(write_tar(tmp_path / "a.tar", members))
    single = TarShards(path, label="json")
    assert labels_of(single) == [2, 0]
    assert "label of sample 3 cannot be read: its JSON has null" in single.problems()[0]
    several = TarShards(path, label="json", label_key="kinds", multi_label=True)
    assert [several[i]["label"] for i in range(2)] == several.all_labels() == [[0, 3], []]
    assert TarShards(path, multi_label=True).all_labels() == [[1, 2, 4], [], [1, 0]]


def test_braces_stand_for_names_that_must_be_there(tmp_path):
    assert shards.expand_braces("a{08..10}.{x,y}") == [
        "a08.x", "a08.y", "a09.x", "a09.y", "a10.x", "a10.y"]  # fmt: skip
    for name in ("a-0.tar", "a-1.tar", "a-3.tar"):
        (tmp_path / name).touch()
    assert len(shards.find_files(str(tmp_path / "a-{0..1}.tar"))) == 2
    assert len(shards.find_files((str(tmp_path / "a-?.tar"), str(tmp_path / "a-1.tar")))) == 3
    with pytest.raises(InputError, match=r"no files match .*a-2\.tar"):
        shards.find_files(str(tmp_path / "a-{0..3}.tar"))
    with pytest.raises(InputError, match="backwards"):
        shards.expand_braces("a{3..1}")


def test_more_shards_than_descriptors_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", {"a.png": png(i), "a.cls": str(i).encode()})

    def count_open():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(p).startswith(str(tmp_path)) for p in links if os.path.islink(p))

    source = TarShards(str(tmp_path / "*.tar"))
    assert [r["image"] for _ in range(2) for r in source] == [png(i) for i in range(5)] * 2
    assert count_open() == 2
    del source
    assert count_open() == 0


# Parquet


def test_a_row_group_is_read_once_and_few_are_kept(tmp_path, monkeypatch):
    from vitjax.data.sources import parquet

    columns = {"image": [png(i) for i in range(40)], "label": [i % 4 for i in range(40)]}
    source = Parquet(str(write_parquet(tmp_path / "a.parquet", columns, row_group_size=10)))
    reads = []
    opened = source._pyarrow.parquet.ParquetFile

    class Counted(opened):
        def read_row_group(self, i, **options):
            reads.append((i, options["columns"]))
            return super().read_row_group(i, **options)

    monkeypatch.setattr(source._pyarrow.parquet, "ParquetFile", Counted)
    assert [source[i]["image"] for i in range(10, 30)] == [png(i) for i in range(10, 30)]
    assert reads == [(1, ["image"]), (2, ["image"])]
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1)
    assert source[39]["image"] == png(39)
    assert len(source._local.tables) == 1


def test_parquet_labels_of_every_kind(tmp_path):
    import pyarrow

    pictures = [png(i) for i in range(4)]
    names = ["dog", "cat", None, "dog"]
    cases = {
        "names": (names, {}, [1, 0, 1], ("cat", "dog")),
        "coded": (pyarrow.array(names).dictionary_encode(), {}, [1, 0, 1], ("cat", "dog")),
        "given": (names, {"class_names": ("dog", "cat")}, [0, 1, 0], ("dog", "cat")),
        "large": ([0, 5, None, 2], {"num_classes": 9}, [0, 5, 2], None),
        "bool": ([True, False, None, True], {}, [1, 0, 1], None),
        "lists": ([[0, 2], [], None, [1]], {"multi_label": True}, [[0, 2], [], [1]], None),
        "words": (
            [["b", "a"], [], None, ["c"]], {"multi_label": True}, [[1, 0], [], [2]],
            ("a", "b", "c"),
        ),
    }  # fmt: skip
    for case, (column, options, wanted, class_names) in cases.items():
        write_parquet(tmp_path / f"{case}.parquet", {"image": pictures, "label": column})
        source = Parquet(str(tmp_path / f"{case}.parquet"), **options)
        assert np.asarray(source.all_labels(), object).tolist() == wanted, case
        assert [source[i]["label"] for i in range(3)] == wanted, case
        assert [source[i]["image"] for i in range(3)] == [png(0), png(1), png(3)], case
        assert source.class_names == class_names, case
        assert "first is row 2" in source.problems()[0], case
    with pytest.raises(InputError, match="multi_label must be True"):
        Parquet(str(tmp_path / "lists.parquet"))
    with pytest.raises(InputError, match="multi_label must be False"):
        Parquet(str(tmp_path / "large.parquet"), multi_label=True)
    with pytest.raises(InputError, match="double; allowed: integers"):
        write_parquet(tmp_path / "f.parquet", {"image": pictures, "label": [0.5, 1, 2, 3]})
        Parquet(str(tmp_path / "f.parquet"))
    with pytest.raises(InputError, match="names in some files"):
        Parquet((str(tmp_path / "names.parquet"), str(tmp_path / "large.parquet")))


def test_rows_of_several_files_follow_each_other_without_those_that_have_no_label(tmp_path):
    for name, values in (("a", ["x", "z", "y"]), ("b", [None, "y", "x"])):
        columns = {"image": [f"{name}{i}".encode() for i in range(3)], "label": values}
        write_parquet(tmp_path / f"{name}.parquet", columns, row_group_size=2)
    source = Parquet(str(tmp_path / "*.parquet"), class_names=("x", "y"))
    assert [r["image"] for r in source] == [b"a0", b"a2", b"b1", b"b2"]
    assert [r["label"] for r in source] == [0, 1, 1, 0]
    assert "unknown label 'z'; allowed: x, y" in source.problems()[0]
    assert (
        "a.parquet: 1 rows have no label that is allowed, the first is row 1"
        in (source.problems()[1])
    )
    lists = {"image": [b"0", b"1"], "label": [[0, None], [2, 1]]}
    write_parquet(tmp_path / "c.parquet", lists)
    assert Parquet(str(tmp_path / "c.parquet"), multi_label=True).all_labels() == [[2, 1]]


def test_class_names_of_lists_are_in_the_metadata_too():
    from vitjax.data.sources.parquet import names_in_metadata

    for feature in (
        {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "Sequence"},
        [{"names": ["a", "b"], "_type": "ClassLabel"}],
    ):
        content = json.dumps({"info": {"features": {"label": feature}}}).encode()
        assert names_in_metadata({b"huggingface": content}, "label") == ("a", "b")
    for content in (b"no json", b"{}", b'{"info": {"features": {"label": {"dtype": "int64"}}}}'):
        assert names_in_metadata({b"huggingface": content}, "label") is None
    assert names_in_metadata(None, "label") is None


def test_parquet_groups_go_with_their_rows(tmp_path):
    columns = {"image": [png(i) for i in range(3)], "label": [0, None, 1], "patient": [7, 8, 9]}
    source = Parquet(str(write_parquet(tmp_path / "a.parquet", columns)), group="patient")
    assert source.all_groups() == [r["group"] for r in source] == ["7", "9"]


def test_damaged_parquet_is_refused_or_unreadable(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [png(0), b""], "label": [0, 1]})
    with pytest.raises(InputError, match=r"no column 'labels'; did you mean 'label'"):
        Parquet(str(path), label="labels")
    with pytest.raises(InputError, match="no column 'pixels'"):
        Parquet(str(path), image="pixels")
    with pytest.raises(InputError, match="allowed: binary"):
        Parquet(str(path), image="label", label="label")
    source = Parquet(str(path))
    with pytest.raises(UnreadableImage, match="no bytes"):
        source[1]
    source._local.tables.clear()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableImage, match="row group 0"):
        source[0]
    with pytest.raises(InputError, match=r"cannot read .* as Parquet"):
        Parquet(str(path))


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("pyarrow", lambda: Parquet("a.parquet"), "parquet"),
        ("tensorflow_datasets", lambda: TFDS("mnist", "train"), "tfds"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'vitjax\[{extra}\]'"):
        make()


# TFDS


def test_a_tfds_split_may_be_a_part_and_the_name_may_be_left_out(images, tmp_path):
    write_tfds(images, tmp_path)
    source = TFDS(split="train[10:]", data_dir=str(tmp_path / "pets" / "1.0.0"))
    assert [r["image"] for r in source] == [data for _, data, _ in images[10:]]
    assert source.class_names == CLASSES
    assert "pets/1.0.0/train[10:][0]" in source[0]["id"]


def test_tfds_mistakes_are_named(images, tmp_path):
    place = str(write_tfds(images, tmp_path))
    with pytest.raises(InputError, match=r"'dogs' is not prepared.*tfds build dogs --file_format"):
        TFDS("dogs", "train", place)
    with pytest.raises(InputError, match="unknown split 'tain' of pets; did you mean 'train'"):
        TFDS("pets", "tain", place)
    with pytest.raises(InputError, match="no feature 'picture'"):
        TFDS("pets", "train", place, image="picture")
    with pytest.raises(InputError, match="multi_label must be False"):
        TFDS("pets", "train", place, multi_label=True)
    with pytest.raises(InputError, match=r"no dataset_info\.json"):
        TFDS(data_dir=place)
    info = tmp_path / "pets" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="stored as tfrecord, which has no random access"):
        TFDS("pets", "train", place)


def test_tfds_sequences_are_several_labels(images, tmp_path):
    place = str(write_tfds(images, tmp_path, multi_label=True))
    source = TFDS("pets", "train", place, multi_label=True)
    assert [r["label"] for r in source] == [[label] for *_, label in images]
    assert source.class_names == CLASSES


# Array records


def test_a_damaged_record_is_one_unreadable_image(tmp_path):
    rng = np.random.default_rng(0)
    records = [("", rng.bytes(2000), i) for i in range(50)]
    path = write_array_record(records, tmp_path / "a.array_record")
    content = bytearray(path.read_bytes())
    content[30_000:30_100] = bytes(100)
    path.write_bytes(content)
    source = ArrayRecord(str(path), 50)
    bad = 0
    for i in range(50):
        try:
            assert source[i]["image"] == records[i][1]
        except UnreadableImage:
            bad += 1
    assert bad == 1
    path.write_bytes(content[:40_000])
    with pytest.raises(InputError, match=r"cannot read .* as ArrayRecord"):
        ArrayRecord(str(path), 50)


# Manifests


def test_a_manifest_splits_groups_and_numbers_over_the_whole_file(tmp_path):
    rows = ["a.png,dog,train,p1", 'b.png,"cat",val,p2', "c.png,ant,train,p1", "d.png,dog,val,p3"]
    path = write_manifest(tmp_path / "all.csv", rows, "path,label,split,group")
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    train, val = (Manifest(str(path), split=split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("ant", "cat", "dog")
    assert labels_of(train) == [2, 0] and labels_of(val) == [1, 2]
    assert train.all_groups() == ["p1", "p1"] and val[1]["group"] == "p3"
    assert val[0]["image"] == png(ord("b")) and val[0]["id"] == str(tmp_path / "b.png")
    assert len(Manifest(str(path))) == 4 and train.problems() == []
    with pytest.raises(InputError, match=r"no split 'trian' .* did you mean 'train'"):
        Manifest(str(path), split="trian")
    assert make_order(train, "groups", 1, 0).epoch == 2
    assert Manifest(str(write_manifest(tmp_path / "b.csv", ["a.png,0"]))).all_groups() is None


def test_everything_wrong_with_a_manifest_is_listed_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    rows = ["a.png,1", "gone.png,0", "a.png,0", "b.png,7", "c.png,", "d.png", ",1", "e.png,ant",
            "./a.png,1"]  # fmt: skip
    path = write_manifest(tmp_path / "all.csv", rows)
    source = Manifest(str(path), class_names=("ape", "bee", "cow"))
    text = "\n".join(source.problems())
    for words in ("line 3: no such file", "line 4: ", "stands in line 2 too", "label 7 (once",
                  "line 6: it has no label", "line 7: 1 columns", "line 8: it has no path",
                  "line 9: unknown label 'ant'", "class 'cow' has no row",
                  "line 10: "):  # fmt: skip
        assert words in text, words
    assert len(source) == 5
    with pytest.raises(InputError, match=r"data.source has \d+ problems:"):
        check_source(source, "data.source", 3)
    with pytest.raises(UnreadableImage, match="No such file"):
        source[1]


def test_manifest_labels_may_be_several(tmp_path):
    joined = write_manifest(
        tmp_path / "a.tsv", ["1.png\tb|a", "2.png\t", "3.png\tc"], "path\tlabel"
    )
    source = Manifest(str(joined), multi_label=True)
    assert source.all_labels() == [[1, 0], [], [2]] and source.class_names == ("a", "b", "c")
    rows = ["1.png,1,0", "2.png,,1.0", "3.png,0,", "4.png,1,-1"]
    columns = write_manifest(tmp_path / "b.csv", rows, "path,flat,round")
    source = Manifest(str(columns), label_columns=("flat", "round"))
    assert source.all_labels() == [[0], [1], []] and source.class_names == ("flat", "round")
    assert "column 'round' says '-1'; allowed: 0, 1 or blank" in source.problems()[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"image,label\na.png,1\n", "no column 'path'; allowed: image, label"),
        (b"path,label\n", "no row of"),
        (b"path,label\n\xff\xfe,1\n", "UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        Manifest(str(tmp_path / "a.csv"))


def test_integers_written_by_spreadsheets_are_integers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\na.png,10.0\r\nb.png,2\r\n")
    source = Manifest(str(path))
    assert labels_of(source) == [10, 2]
    assert (source.num_classes, source.class_names) == (11, None)


def test_a_name_among_integers_is_a_mistake_not_a_class(tmp_path):
    source = Manifest(str(write_manifest(tmp_path / "a.csv", ["a.png,1", "b.png,one"])))
    assert labels_of(source) == [1] and source.class_names is None
    assert "line 3: label 'one' is no integer, as the first label is" in source.problems()[0]


# Arrays


def test_arrays_may_have_several_labels_and_sixteen_bits(tmp_path):
    pictures = np.arange(3 * 16, dtype=np.uint16).reshape(3, 4, 4) * 1000
    many = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    np.savez(tmp_path / "a.npz", images=pictures, labels=many)
    source = Npz(str(tmp_path / "a.npz"))
    assert source.all_labels() == [source[i]["label"] for i in range(3)] == [[0, 2], [], [1]]
    assert source.num_classes == 3 and source[0]["image"].dtype == np.uint16
    batch = next(Loader(source, Preprocess(4, 1), max_labels=2).eval_batches(3))
    assert (batch["images"].min(), batch["images"].max()) == (0, 255)
    assert batch["labels"].tolist() == [[0, 2], [-1, -1], [1, -1]]
    np.savez(tmp_path / "b.npz", images=pictures, labels=np.array([[5], [0], [1]]))
    assert labels_of(Npz(str(tmp_path / "b.npz"))) == [5, 0, 1]


def test_npy_files_stay_on_disk(tmp_path):
    pictures = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    np.save(tmp_path / "x.npy", pictures)
    np.save(tmp_path / "y.npy", np.array([[1], [0], [2], [1], [0]]))
    paths = (str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    source = Npy(*paths, class_names=["a", "b", "c"])
    assert isinstance(source.images, np.memmap)
    assert not isinstance(Npy(*paths, mmap=False).images, np.memmap)
    np.testing.assert_array_equal([r["image"] for r in source], pictures)
    assert labels_of(source) == [1, 0, 2, 1, 0] and source.problems() == []
    assert "label 2 (once, first in example 2)" in Npy(*paths, class_names=("a", "b")).problems()[0]


def test_arrays_that_cannot_be_used_are_refused(tmp_path):
    one, two = np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)
    cases = (
        (one.astype(np.float32), two, "uint8 or uint16"),
        (one, two.astype(float), "must be integers"),
        (one, np.array([[0, 2], [1, 0]]), "must be 0 or 1, got 0 to 2"),
        (one, two - 1, "label -1 is negative"),
        (one, np.zeros(3, int), "2 images and 3 labels"),
    )
    for pictures, numbers, words in cases:
        with pytest.raises(InputError, match=words):
            Arrays(pictures, numbers, name="x")
    with pytest.raises(InputError, match="3 class_names, but labels have 2 columns"):
        Arrays(one, np.eye(2, dtype=int), name="x", class_names=("a", "b", "c"))
    np.save(tmp_path / "x.npy", one)
    (tmp_path / "y.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(InputError, match=r"cannot read .*y\.npy as npy"):
        Npy(str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    with pytest.raises(InputError, match="no such file"):
        Npy(str(tmp_path / "x.npy"), str(tmp_path / "z.npy"))


# Mixtures, subsets, noise


@pytest.fixture
def blocks(tmp_path):
    """Makes the block of n images of one value, whose labels count up modulo 3."""

    def make(name, count, class_names=("a", "b", "c")):
        np.save(tmp_path / f"{name}.npy", np.full((count, 2, 2), ord(name[0]), np.uint8))
        np.save(tmp_path / f"{name}_labels.npy", np.arange(count) % len(class_names))
        return {
            "target": "vitjax.data.sources.arrays:Npy", "class_names": class_names,
            "images": str(tmp_path / f"{name}.npy"), "labels": str(tmp_path / f"{name}_labels.npy"),
        }  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("lengths", "weights", "slots"),
    [
        ([10, 30], None, [10, 30]),
        ([10, 30], [1, 1], [30, 30]),
        ([300, 7], [0.3, 0.7], [300, 700]),
        ([100, 10, 10], [0.2, 0.7, 0.1], [100, 350, 50]),
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([5, 2], [1, 3], [5, 15]),
        ([3, 3, 4], [0.35, 0.35, 0.3], [5, 5, 4]),
        ([1, 3], [0.1, 0.3], [1, 3]),  # as written, not as binary fractions
    ],
)
def test_a_mixture_shares_an_epoch_by_its_weights(lengths, weights, slots):
    shared = mixture.share_slots(lengths, weights)
    assert shared == slots
    assert all(n >= length for n, length in zip(shared, lengths, strict=True))


def test_a_mixture_holds_every_example_and_repeats_the_small_ones(blocks):
    mixed = config_lib.build({
        "target": "vitjax.data.sources.mixture:Mixture", "weights": (0.5, 0.5),
        "sources": (blocks("xx", 4), blocks("yy", 10)),
    })  # fmt: skip
    assert len(mixed) == 20 and mixed.class_names == ("a", "b", "c")
    records = list(mixed)
    assert [int(r["image"][0, 0]) for r in records] == [ord("x")] * 10 + [ord("y")] * 10
    assert [r["label"] for r in records[:10]] == [0, 1, 2, 0] * 2 + [0, 1]
    assert labels_of(mixed) == [r["label"] for r in records]
    assert len({r["id"] for r in records}) == 14
    assert records[0]["id"].startswith("0:") and records[-1]["id"].startswith("1:")


def test_a_union_numbers_the_classes_anew(blocks):
    sources = (blocks("xx", 3, ("cat", "ant")), blocks("yy", 3, ("dog", "cat", "bee")))
    mixed = Mixture(sources, classes="union")
    assert mixed.class_names == ("ant", "bee", "cat", "dog") and mixed.num_classes == 4
    assert [r["label"] for r in mixed] == labels_of(mixed) == [2, 0, 2, 3, 2, 1]
    with pytest.raises(InputError, match=r"class 0 is 'cat' in source 0 .* 'dog' in source 1"):
        Mixture(sources)


def test_mixtures_of_lists_groups_and_problems(tmp_path, blocks):
    for name, rows in (("a", ["1.png,x|y,p", "2.png,,q"]), ("b", ["3.png,y|x,p"])):
        write_manifest(tmp_path / f"{name}.csv", rows, "path,label,group")
    (tmp_path / "1.png").write_bytes(png(1))
    parts = [{"target": "vitjax.data.sources.manifest:Manifest", "multi_label": True,
              "path": str(tmp_path / f"{name}.csv"), "class_names": names}
             for name, names in (("a", ("x", "y")), ("b", ("y", "x")))]  # fmt: skip
    mixed = Mixture(parts, classes="union")
    assert mixed.all_labels() == [[0, 1], [], [1, 0]] and mixed.all_groups() == ["p", "q", "p"]
    assert mixed[0]["label"] == [0, 1]
    problems = mixed.problems()
    assert len(problems) == 2
    assert problems[0].startswith("source 0: ") and "3.png" in problems[1]
    assert Mixture((blocks("zz", 3),)).all_groups() is None


def test_ids_are_numbered_only_where_sources_could_share_them(blocks, images, tmp_path):
    folder = {"target": "vitjax.data.sources.folders:ImageFolder",
              "root": str(write_folder(images, tmp_path / "f"))}  # fmt: skip
    npy = blocks("xx", 3, CLASSES)
    inner = {"target": "vitjax.data.sources.subset:Subset", "source": npy, "num_examples": 2}
    assert not Mixture((folder, npy))[0]["id"].startswith("0:")
    assert Mixture((inner, npy))[0]["id"].startswith("0:")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": ()}, "at least one source"),
        ({"weights": (1.0,)}, "1 weights for 2 sources"),
        ({"weights": (1.0, 0.0)}, "must be positive"),
        ({"classes": "all"}, "unknown classes 'all'"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(blocks, changes, words):
    with pytest.raises(InputError, match=words):
        Mixture(**({"sources": (blocks("xx", 3), blocks("yy", 3))} | changes))


def test_subsets_and_noise_tell_the_labels_they_give(blocks):
    whole = blocks("xx", 60)
    subset = {"target": "vitjax.data.sources.subset:Subset", "source": whole, "num_examples": 40}
    noisy = {"target": "vitjax.data.sources.noise:NoisyLabels", "source": subset, "fraction": 0.5}
    for block in (subset, noisy):
        source = config_lib.build(block)
        assert labels_of(source) == [r["label"] for r in source]
        assert source.problems() == [] and source.all_groups() is None
    assert labels_of(config_lib.build(subset)) != labels_of(config_lib.build(noisy))


# Checks


def test_a_check_lists_twenty_problems_and_counts_the_rest():
    numbers = np.arange(30)
    source = Arrays(np.zeros((30, 2, 2), np.uint8), numbers, name="x")
    check_source(source, "data.source", 30)
    with pytest.raises(InputError) as caught:
        check_source(source, "data.source", 3)
    message = str(caught.value)
    assert message.startswith("data.source has 27 problems:\n  label 3 (once, first in example 3)")
    assert message.count("\n") == 21 and message.endswith("... and 7 more")
    assert "is not in 0 to 2" in message


def test_a_check_finds_classes_without_examples_and_both_bounds():
    assert labels.label_problems(np.array([0, -1, 2, 2]), 2) == [
        "label -1 (once, first in example 1) is not in 0 to 1",
        "label 2 (2 times, first in example 2) is not in 0 to 1",
    ]
    assert labels.label_problems([[0, 1], [], [3]], 3, ("a", "b", "c"), every_class=True) == [
        "label 3 (once, first in example 2) is not in 0 to 2",
        "class 2 ('c') has no example",
    ]
    source = Arrays(np.zeros((2, 2, 2), np.uint8), np.array([0, 2]), name="x")
    with pytest.raises(InputError, match="has 1 problem:\n  class 1 has no example"):
        check_source(source, "data.source")
    check_source(source, "evals.val", every_class=False)
    far = labels.label_problems(np.array([0, 2**31 - 2]), 2**31 - 1, None, every_class=True)
    assert far == [f"{2**31 - 3} of {2**31 - 1} classes have no example"]


def test_a_source_that_tells_nothing_passes_a_check(images, tmp_path):
    source = ArrayRecord(str(write_array_record(images, tmp_path / "a.array_record")), 3)
    assert not hasattr(source, "all_labels")
    check_source(source, "data.source", 3)


def test_labels_take_four_bytes_each():
    count = 100_000
    made = labels.Labels.pack((i % 7 for i in range(count)), False)
    assert isinstance(made._values, np.ndarray) and made._values.nbytes == 4 * count
    assert made[99_999] == 99_999 % 7 and np.asarray(made.of_all()).dtype == np.int64
    lists = labels.Labels.pack(([i] * (i % 3) for i in range(9)), True)
    assert lists.of_all() == [[i] * (i % 3) for i in range(9)]


def test_a_small_subset_may_lack_classes():
    digits = {"target": "vitjax.data.sources.arrays:Digits", "split": "train"}
    few = Subset(digits, 5)
    assert len(set(few.all_labels())) < 10
    check_source(few, "data.source")
    with pytest.raises(InputError, match="class"):
        check_source(Arrays(np.zeros((2, 4, 4), np.uint8), np.array([0, 2]), name="gap"), "it")
