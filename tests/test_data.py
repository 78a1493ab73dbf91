import io
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from vitjax.data import augment, transforms
from vitjax.data.images import UnreadableImage, decode, read_file
from vitjax.data.loader import Loader
from vitjax.data.order import shuffled
from vitjax.data.preprocess import Preprocess, to_unit
from vitjax.data.sources import array_record
from vitjax.data.sources.arrays import Arrays, Digits, Npz
from vitjax.data.sources.folders import ImageFolder, ZipFolder, open_folder
from vitjax.errors import InputError


def picture(seed, size=(12, 10), mode="RGB"):
    rng = np.random.default_rng(seed)
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog} of PNG files, losslessly."""
    for i in range(6):
        place = tmp_path / "images" / "train" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1797])
def test_every_epoch_holds_every_example_once_in_an_order_of_its_own(size):
    order = shuffled(np.arange(3 * size), size, seed=5)
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    if size > 50:
        assert not np.array_equal(order[:size], order[size : 2 * size])
        assert not np.array_equal(order[:size], shuffled(np.arange(size), size, seed=6))


def test_the_order_looks_random():
    first = np.array([shuffled(np.arange(10), 1000, seed=s) for s in range(400)])
    assert abs(first.mean() - 499.5) < 15
    steps = np.diff(shuffled(np.arange(5000), 5000, seed=1).astype(float))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05  # as for independent draws


def test_any_position_is_there_at_once_for_a_hundred_million_records():
    far = shuffled(np.array([10**15, 3 * 10**15 + 1]), 10**8, seed=0)
    assert ((far >= 0) & (far < 10**8)).all()


def test_digits_hold_out_a_fixed_fifth_of_real_images():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert not set(train.rows) & set(test.rows)
    assert train[0]["image"].shape == (8, 8)
    assert train.images.max() == 255


def test_digits_are_those_that_scikit_learn_reads():
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split in (Digits("train"), Digits("test")):
        pixels = (split.images * (16 / 255)).round()
        np.testing.assert_array_equal(pixels, digits.images[split.rows])
        np.testing.assert_array_equal(split.all_labels(), digits.target[split.rows])


def test_folder_and_zip_give_the_same_examples(folder, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
    a, b = open_folder(str(folder), "train"), open_folder(str(archive), "train")
    assert isinstance(a, ImageFolder) and isinstance(b, ZipFolder)
    assert a.class_names == b.class_names == ("cat", "dog")
    assert [(r["image"], r["label"]) for r in a] == [(r["image"], r["label"]) for r in b]


def test_array_record_reads_what_was_written(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "train-0.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(5):
        image = io.BytesIO()
        picture(i).save(image, "png")
        record = {"image": [image.getvalue()], "label": list(range(i + 1))}
        writer.write(array_record.make_example(record))
    writer.close()
    source = array_record.ArrayRecord(str(tmp_path / "*.array_record"), 9, multi_label=True)
    assert [source[i]["label"] for i in range(5)] == [list(range(i + 1)) for i in range(5)]
    np.testing.assert_array_equal(decode(source[3]["image"], 3), np.asarray(picture(3)))
    loader = Loader(source, Preprocess(8), max_labels=3)
    np.testing.assert_array_equal(next(loader.eval_batches(2))["labels"], [[0, -1, -1], [0, 1, -1]])


def test_example_records_are_the_official_wire_format():
    # Written by hand after the protocol buffer specification: {"label": int64_list [7]}.
    entry = b"\x0a\x05label\x12\x05\x1a\x03\x0a\x01\x07"
    message = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    assert array_record.parse_example(message) == {"label": [7]}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_kind_of_file_becomes_uint8(mode, channels):
    values = np.linspace(0, 60_000, 120).reshape(12, 10).astype(np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else picture(0).convert(mode)
    file = io.BytesIO()
    image.save(file, "tiff" if mode in ("CMYK", "LA") else "png")
    decoded = decode(file.getvalue(), channels)
    assert (decoded.shape, decoded.dtype) == ((12, 10, channels), np.uint8)
    if mode == "I;16":
        assert (decoded.min(), decoded.max()) == (0, 255)


def test_transparent_pixels_become_white():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "png")
    assert (decode(file.getvalue(), 3) == 255).all()


def test_dicom_is_shown_as_the_file_asks(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
    from pydicom.data import get_testdata_file

    path = get_testdata_file("CT_small.dcm")
    image = read_file(type(tmp_path)(path), 1)
    assert (image.shape, image.min(), image.max()) == ((128, 128, 1), 0, 255)
    data = pydicom.dcmread(path)
    data.PhotometricInterpretation = "MONOCHROME1"
    data.save_as(tmp_path / "inverted.dcm")
    np.testing.assert_allclose(
        255 - read_file(tmp_path / "inverted.dcm", 1).astype(int), image, atol=1
    )


def test_evaluation_sees_every_example_exactly_once():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1).repeat(4, 1).repeat(4, 2)
    source = Arrays(images, np.arange(10), name="ten")
    batches = list(Loader(source, Preprocess(4, 1), num_threads=3).eval_batches(4))
    seen = np.concatenate([b["labels"][b["mask"]] for b in batches])
    assert seen.tolist() == list(range(10))
    assert all(len(b["images"]) == 4 for b in batches)
    assert [b["mask"].sum() for b in batches] == [4, 4, 2]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    made = {}
    for threads in (1, 3):
        crop = transforms.RandomResizedCrop(8, min_area=0.3)
        loader = Loader(Digits("train"), Preprocess(8, 1), transforms=[crop], num_threads=threads)
        made[threads] = loader.train_batch(7, 16, seed=3)
        stream = loader.train_batches(5, 16, seed=3)
        for key, value in [next(stream) for _ in range(3)][2].items():  # as after a resume
            np.testing.assert_array_equal(value, made[threads][key])
        assert not np.array_equal(made[threads]["labels"], loader.train_batch(7, 16, 4)["labels"])
    for key in ("images", "labels"):
        np.testing.assert_array_equal(made[1][key], made[3][key])


def test_processes_share_a_batch_without_overlap():
    loader = Loader(Digits("train"), Preprocess(8, 1))
    whole = loader.train_batch(2, 16, seed=0)["images"]
    halves = np.arange(16).reshape(4, 2, 2).swapaxes(0, 1).reshape(2, 8)  # not contiguous
    parts = [loader.train_batch(2, 16, seed=0, rows=rows)["images"] for rows in halves]
    np.testing.assert_array_equal(np.concatenate(parts)[np.argsort(halves.ravel())], whole)


class Faulty(Arrays):
    """Every n-th image is unreadable."""

    def __init__(self, count, every):
        images = np.zeros((count, 4, 4), np.uint8)
        super().__init__(images, np.arange(count), name="faulty")
        self.every = every

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record | ({"image": b"no image"} if index % self.every == 0 else {})


def test_few_unreadable_images_are_replaced_named_and_counted(caplog):
    loader = Loader(Faulty(400, 200), Preprocess(4, 1))
    with caplog.at_level("WARNING", "vitjax"):
        batch = loader.train_batch(0, 400, seed=0)
    assert set(loader.faults.reasons) == {"faulty[0]", "faulty[200]"}
    labels = np.sort(batch["labels"])
    assert (labels == np.sort([*range(1, 200), *range(201, 400), 1, 201])).all()  # neighbours
    assert "faulty[200]" in caplog.text


def test_many_unreadable_images_stop_the_run():
    loader = Loader(Faulty(400, 20), Preprocess(4, 1))
    with pytest.raises(InputError, match=r"more than 1.0%[\s\S]*faulty\[0\]"):
        list(loader.eval_batches(100))


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 cut off"])
def test_unreadable_bytes_have_one_error(content):
    with pytest.raises(UnreadableImage):
        decode(content, 3)


def test_the_contract_keeps_aspect_and_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    kept = Preprocess(10).fit(wide)
    assert kept.shape == (10, 10, 3) and (kept == 255).all()
    squashed = Preprocess(10, resize="squash").fit(wide)
    assert squashed[5, 0, 0] == 0 and squashed[5, 5, 0] == 255
    assert (Preprocess(4, crop_fraction=0.4).fit(wide)[:, :, 0] == 255).all()
    for image in (wide, wide.swapaxes(0, 1)):
        padded = Preprocess(30, resize="pad").fit(image)
        assert padded.shape == (30, 30, 3) and not padded[:9].any() and not padded[:, :9].any()
        assert (padded[10:20, 10:20] == 255).all() and padded.sum() == 255 * 300


def test_normalising_follows_the_contract():
    images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)
    p = Preprocess(1, 1, mean=(0.5,), std=(0.25,))
    np.testing.assert_allclose(
        p.normalise(to_unit(jax.numpy.asarray(images))).ravel(), [-2, -1.2, 2], rtol=1e-6
    )
    p = Preprocess(1, 1, mean=(0.0,), std=(1.0,), value_range=(-1.0, 1.0))
    np.testing.assert_allclose(
        p.normalise(to_unit(jax.numpy.asarray(images))).ravel(), [-1, -0.6, 1], rtol=1e-6
    )


def test_random_resized_crop_lies_inside_and_varies():
    y, x = np.mgrid[:40, :60]
    image = np.stack([y * 6, x * 4, y * 0], -1).astype(np.uint8)
    crop = transforms.RandomResizedCrop(16, min_area=0.1)
    made = [crop(image, np.random.default_rng(seed)) for seed in range(50)]
    spans = [np.ptp(m[..., 1].astype(int)) / 4 * np.ptp(m[..., 0].astype(int)) / 6 for m in made]
    assert all(m.shape == (16, 16, 3) for m in made)
    assert min(spans) < 0.3 * 40 * 60 < max(spans) <= 40 * 60
    np.testing.assert_array_equal(made[3], crop(image, np.random.default_rng(3)))


def batch(size=8):
    key = jax.random.key(0)
    return {"images": jax.random.uniform(key, (size, 6, 6, 1)), "labels": jax.numpy.arange(size)}


def test_flip_mirrors_some_images_and_leaves_the_others():
    before = batch(32)
    after = augment.RandomFlip()(jax.random.key(1), before)["images"]
    same = np.all(np.asarray(after == before["images"]), axis=(1, 2, 3))
    mirrored = np.all(np.asarray(after == before["images"][:, :, ::-1]), axis=(1, 2, 3))
    assert (same | mirrored).all() and 5 < same.sum() < 27


def test_shift_moves_by_at_most_its_pixels():
    image = np.zeros((64, 7, 7, 1), np.float32)
    image[:, 3, 3] = 1
    moved = augment.RandomShift(2)(jax.random.key(0), {"images": jax.numpy.asarray(image)})
    _, y, x, _ = np.nonzero(np.asarray(moved["images"]))
    assert len(y) == 64
    assert {y.min(), y.max(), x.min(), x.max()} == {1, 5}


@pytest.mark.parametrize(
    "operation",
    [augment.Mixup(0.4), augment.Cutmix(), augment.MixupOrCutmix(0.4)],
    ids=lambda o: type(o).__name__,
)
def test_mixed_labels_carry_the_share_of_their_pixels(operation):
    ones = {"images": jax.numpy.zeros((4, 16, 16, 1)).at[0].set(1.0), "labels": jax.numpy.arange(4)}
    for seed in range(6):
        mixed = jax.jit(operation)(jax.random.key(seed), ones)
        share = float(mixed["mix_weight"][0])
        assert np.asarray(mixed["mix_labels"]).tolist() == [3, 0, 1, 2]
        assert float(mixed["images"][0].mean()) == pytest.approx(share, abs=1e-5)
        assert float(mixed["images"][1].mean()) == pytest.approx(1 - share, abs=1e-5)


def test_mixed_loss_equals_the_loss_of_blended_targets():
    from vitjax.models.vit import vit
    from vitjax.objectives.supervised import Supervised

    model = vit(
        image_size=6,
        channels=1,
        num_classes=8,
        width=8,
        depth=1,
        mlp_dim=8,
        num_heads=1,
        patch_size=3,
    )
    objective = Supervised(model, label_smoothing=0.1)
    mixed = augment.Mixup(0.4)(jax.random.key(0), batch())
    logits = jax.random.normal(jax.random.key(1), (8, 8))
    w = np.asarray(mixed["mix_weight"])[:, None]
    targets = w * np.eye(8) + (1 - w) * np.roll(np.eye(8), 1, axis=0)
    targets = targets * 0.9 + 0.1 / 8
    wanted = -(targets * jax.nn.log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(objective.example_losses(logits, mixed), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ImageFolder(str(p / "none")), "no such folder"),
        (lambda p: ImageFolder(str(p)), "no images in class folders"),
        (lambda p: ZipFolder(str(p / "none.zip")), "no such file"),
        (lambda p: open_folder(""), "data.root"),
        (lambda p: Npz(str(p / "none.npz")), "no such file"),
        (lambda p: Digits("val"), "train, test"),
        (lambda p: array_record.ArrayRecord(str(p / "*.array_record"), 3), "no files match"),
    ],
)
def test_missing_data_is_named(make, words, tmp_path):
    with pytest.raises(InputError, match=words):
        make(tmp_path)


def test_an_unknown_split_lists_those_there_are(folder):
    with pytest.raises(InputError, match="did you mean 'train'"):
        ImageFolder(str(folder), "trian")


def test_classes_that_differ_only_in_case_are_refused(folder):
    (folder / "train" / "Dog").mkdir()
    picture(9).save(folder / "train" / "Dog" / "9.png")
    with pytest.raises(InputError, match="differ only in case"):
        ImageFolder(str(folder), "train")


def test_a_damaged_archive_is_refused(tmp_path):
    for name, make in (("bad.zip", ZipFolder), ("bad.npz", Npz)):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            make(str(tmp_path / name))


def test_medmnist_files_load(test_data):
    source = Npz(str(test_data / "medical" / "breastmnist.npz"), "train")
    assert (len(source), source.num_classes, source[0]["image"].shape) == (546, 2, (28, 28))
    with pytest.raises(InputError, match="no array"):
        Npz(str(test_data / "medical" / "breastmnist.npz"), "training")
