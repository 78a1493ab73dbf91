"""Decoding a part, and the order of examples."""

import io
import shutil
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from vitjax.data import images, jpeg, transforms
from vitjax.data.images import decode, size_of
from vitjax.data.loader import Loader
from vitjax.data.order import Balanced, Repeated, Shuffled, make_order
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.arrays import Arrays
from vitjax.errors import InputError, UnreadableImage


def smooth(height, width, seed=0):
    """A picture whose JPEG is much like a photograph's."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data, channels=3):
    with Image.open(io.BytesIO(data)) as opened:
        array = np.asarray(opened.convert("RGB" if channels == 3 else "L"))
    return array if array.ndim == 3 else array[..., None]


@pytest.fixture(scope="module")
def photos(test_data):
    with zipfile.ZipFile(test_data / "images" / "photos_jpeg.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        return [archive.read(name) for name in names[::4]]


def random_regions(data, count, seed=0):
    height, width = size_of(data)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        yield (left, top, int(rng.integers(1, width - left + 1)),
               int(rng.integers(1, height - top + 1)))  # fmt: skip


@pytest.fixture(autouse=True)
def needs_the_library():
    """Without it these tests would compare Pillow with itself."""
    if jpeg.library() is None:
        pytest.skip("needs libjpeg-turbo of version 3: pip install turbojpeg")


def test_a_part_of_a_photograph_is_bit_for_bit_what_pillow_decodes(photos):
    for number, data in enumerate(photos):
        whole = by_pillow(data)
        np.testing.assert_array_equal(decode(data, 3), whole)
        assert size_of(data) == whole.shape[:2]
        for left, top, width, height in random_regions(data, 4, number):
            part = decode(data, 3, (left, top, width, height))
            np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("options", [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
    {"restart_marker_blocks": 3}, {"quality": 30}, {"optimize": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_parts_of_every_kind_of_jpeg(options, mode):
    data = encoded(smooth(97, 131).convert(mode), **options)
    for channels in (1, 3):
        whole = by_pillow(data, channels)
        for left, top, width, height in random_regions(data, 6):
            part = decode(data, channels, (left, top, width, height))
            np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_parts_and_sizes_of_other_formats(kind):
    data = encoded(smooth(40, 60), kind)
    assert size_of(data) == (40, 60)
    np.testing.assert_array_equal(decode(data, 3, (7, 5, 20, 30)), decode(data, 3)[5:35, 7:27])


def test_a_large_part_is_decoded_smaller_but_never_too_small():
    data = encoded(smooth(800, 1000), quality=95)
    whole = by_pillow(data).astype(int)
    for region, size, shape in (
        ((0, 0, 1000, 800), 100, (100, 125)),  # an eighth
        ((200, 96, 512, 512), 100, (128, 128)),  # a quarter
        ((200, 96, 448, 448), 224, (224, 224)),  # a half
        ((200, 96, 447, 447), 224, (447, 447)),  # as it is
    ):
        part = decode(data, 3, region, least=(size, size))
        assert part.shape[:2] == shape
        left, top, width, height = region
        image = Image.fromarray(whole[top : top + height, left : left + width].astype(np.uint8))
        means = np.asarray(image.resize(shape[::-1], Image.Resampling.BOX)).astype(int)
        assert np.abs(part - means).mean() < 3.0


def test_a_jpeg_that_is_cut_off_is_unreadable_wherever_the_part_lies():
    data = encoded(smooth(200, 200), quality=95)
    cut = data[: len(data) * 3 // 4]
    for region in (None, (0, 0, 20, 20), (100, 150, 50, 50)):
        with pytest.raises(UnreadableImage, match="truncated"):
            decode(cut, 3, region)


def test_a_damaged_middle_is_unreadable():
    data = bytearray(encoded(smooth(200, 200), quality=95))
    data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd9"  # an end before the end
    with pytest.raises(UnreadableImage, match=r"Corrupt JPEG data|truncated"):
        decode(bytes(data), 3)


def test_a_cmyk_jpeg_is_left_to_pillow():
    data = encoded(smooth(30, 40).convert("CMYK"))
    assert jpeg.decode(data) is None
    np.testing.assert_array_equal(decode(data, 3), by_pillow(data))
    assert size_of(data) == (30, 40)


def test_without_the_library_pillow_gives_the_same(monkeypatch, photos):
    crop = transforms.RandomResizedCrop(32, min_area=0.5)
    source = Photos(photos[:6])
    loader = Loader(source, Preprocess(32), transforms=[crop])
    small = [decode(data, 3, (10, 20, 60, 50)) for data in photos[:3]]
    monkeypatch.setattr(jpeg, "library", lambda: None)
    for data, expected in zip(photos, small, strict=False):
        np.testing.assert_array_equal(decode(data, 3, (10, 20, 60, 50)), expected)
    assert loader.train_batch(0, 6, 0)["images"].shape == (6, 32, 32, 3)


def test_threads_have_decompressors_of_their_own(photos):
    expected = [decode(data, 3, (5, 5, 100, 90)) for data in photos]
    found: list = [None] * 8

    def work(number):
        found[number] = [decode(data, 3, (5, 5, 100, 90)) for data in photos]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for result in found:
        for one, other in zip(result, expected, strict=True):
            np.testing.assert_array_equal(one, other)


class Photos:
    num_classes, class_names = 2, None

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": self.files[index], "label": index % 2, "id": f"photo {index}"}


def test_only_the_part_is_decoded_for_a_crop(photos, monkeypatch):
    asked = []
    plain = jpeg.decode
    monkeypatch.setattr(
        images.jpeg, "decode", lambda data, region=None, least=None: (
            asked.append(region), plain(data, region, least))[1],
    )  # fmt: skip
    crop = transforms.RandomResizedCrop(64, max_area=0.5)
    loader = Loader(Photos(photos[:8]), Preprocess(64), transforms=[crop], num_threads=0)
    loader.train_batch(0, 8, seed=0)
    sizes = [np.prod(size_of(data)) for data in photos[:8]]
    assert len(asked) == 8 and max(w * h for _, _, w, h in asked) <= 0.5 * max(sizes)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_crop_of_the_whole_image_resizes_it(interpolation, antialias):
    crop = transforms.RandomResizedCrop(
        48, 1.0, 1.0, 1.0, 1.0, interpolation=interpolation, antialias=antialias
    )
    for channels in (1, 3):
        image = np.asarray(smooth(96, 96).convert("L" if channels == 1 else "RGB"))
        image = image.reshape(96, 96, channels)
        made = crop(image, np.random.default_rng(0))
        means = image.reshape(48, 2, 48, 2, channels).mean((1, 3))
        assert made.shape == (48, 48, channels) and np.abs(made - means).mean() < 3


def test_batches_are_the_same_for_any_number_of_threads(photos):
    crop = transforms.RandomResizedCrop(40)
    made = []
    for threads in (0, 1, 3):
        loader = Loader(Photos(photos), Preprocess(40), transforms=[crop], num_threads=threads)
        stream = loader.train_batches(3, 10, seed=1)
        made.append([next(stream)["images"] for _ in range(3)])
        loader.close()
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])
    four = [
        Loader(Photos(photos), Preprocess(40), transforms=[crop]).train_batch(4, 10, 1, rows)
        for rows in np.array_split(np.arange(10), 4)
    ]
    np.testing.assert_array_equal(np.concatenate([b["images"] for b in four]), made[0][1])


def test_a_crop_of_an_array_is_its_region_resized():
    crop, image = transforms.RandomResizedCrop(20), np.asarray(smooth(50, 90))
    for seed in range(5):
        left, top, width, height = crop.region(50, 90, np.random.default_rng(seed))
        expected = crop.resize(image[top : top + height, left : left + width])
        np.testing.assert_array_equal(crop(image, np.random.default_rng(seed)), expected)


def counts(values):
    return np.unique(values, return_counts=True)[1].tolist()


def test_classes_come_equally_often_and_their_examples_take_turns():
    labels = np.repeat([3, 7, 9], [1, 5, 100])
    order = Balanced(labels, seed=0)
    assert order.epoch == 106
    chosen = order(np.arange(300))
    assert counts(labels[chosen]) == [100, 100, 100]
    assert all(len(set(labels[chosen[i : i + 3]])) == 3 for i in range(0, 300, 3))
    assert counts(chosen[labels[chosen] == 7]) == [20] * 5
    assert sorted(chosen[labels[chosen] == 9]) == list(range(6, 106))
    assert not np.array_equal(chosen, Balanced(labels, seed=1)(np.arange(300)))
    positions = np.random.default_rng(0).integers(0, 300, 50)  # any position by itself
    np.testing.assert_array_equal(order(positions), chosen[positions])
    orders = [chosen[labels[chosen] == c] for c in (7, 9)]
    assert all(one.tolist() != sorted(one) for one in orders)
    labels = np.repeat([0, 1], 50)  # groups of one size are not in step
    chosen = Balanced(labels, seed=0)(np.arange(100))
    assert (chosen[labels[chosen] == 0] != chosen[labels[chosen] == 1] - 50).sum() > 40


def test_groups_come_equally_often():
    class Patients(Photos):
        def all_groups(self):
            return ["anna", "anna", "anna", "bo"]

    order = make_order(Patients([b""] * 4), "groups", 1, 0)
    assert counts(order(np.arange(60)) == 3) == [30, 30]


def test_repeated_augmentation_shows_an_example_again_with_other_transforms(photos):
    order = Repeated(Shuffled(30, 0), 3)
    assert order.epoch == 90
    assert counts(order(np.arange(90))) == [3] * 30
    loader = Loader(Photos(photos), Preprocess(16), repeats=2,
                    transforms=[transforms.RandomResizedCrop(16)])  # fmt: skip
    batch = loader.train_batch(5, 8, seed=0)
    assert (batch["labels"][::2] == batch["labels"][1::2]).all()
    one, two = batch["images"][::2].astype(int), batch["images"][1::2].astype(int)
    assert (np.abs(one - two).mean((1, 2, 3)) > 1).all()


@pytest.mark.parametrize("sampling, repeats, message", [
    ("class", 1, "did you mean 'classes'"), ("classes", 1, "needs a source that tells"),
    ("groups", 1, "Photos does not"), ("examples", 0, "data.repeats must be at least 1"),
])  # fmt: skip
def test_an_order_that_cannot_be_made_is_refused(sampling, repeats, message):
    with pytest.raises(InputError, match=message):
        make_order(Photos([b""]), sampling, repeats, 0)


def test_labels_beyond_max_labels_are_not_dropped_in_silence():
    class Many(Photos):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 1), np.uint8), "label": [0, 1, 1], "id": "many"}

    with pytest.raises(InputError, match=r"3 labels, more than data\.max_labels=2"):
        Loader(Many([b""]), Preprocess(4, 1), max_labels=2).train_batch(0, 1, 0)


@pytest.mark.parametrize("label, max_labels", [(2, None), (-1, None), ([0, 2], 3)])
def test_a_label_outside_the_classes_ends_the_run_where_no_check_could_see_it(label, max_labels):
    class Wrong(Photos):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 1), np.uint8), "label": label, "id": "wrong"}

    loader = Loader(Wrong([b""]), Preprocess(4, 1), max_labels=max_labels)
    with pytest.raises(InputError, match=r"the label (2|-1), but the source has classes 0 to 1"):
        loader.train_batch(0, 1, 0)


def test_an_evaluation_leaves_unreadable_examples_out():
    class Broken(Arrays):
        def __getitem__(self, index):
            if index == 150:
                raise UnreadableImage("gone")
            return super().__getitem__(index)

    source = Broken(np.ones((200, 4, 4), np.uint8), np.arange(200), name="some")
    loader = Loader(source, Preprocess(4, 1))
    batches = list(loader.eval_batches(64))
    seen = np.concatenate([b["labels"][b["mask"]] for b in batches])
    assert seen.tolist() == [i for i in range(200) if i != 150]
    assert loader.faults.metrics() == {"data/unreadable": 1, "data/unreadable_ids": ["example 150"]}
    assert loader.faults.metrics() == {"data/unreadable": 1}


def test_sixteen_bits_are_stretched_to_eight():
    values = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    expected = np.array([[0, 64], [128, 255]], np.uint8)[..., None]
    np.testing.assert_array_equal(decode(values, 1), expected)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values), "PNG"), 1), expected)
    with pytest.raises(UnreadableImage, match="float32"):
        decode(values.astype(np.float32), 1)


def test_dicom_files_are_images_like_others(tmp_path):
    pytest.importorskip("pydicom", reason="needs pydicom")
    from pydicom.data import get_testdata_file

    from vitjax.data.sources.folders import ImageFolder

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("CT_small.dcm", "MR_small.dcm"):
            shutil.copy(get_testdata_file(file), tmp_path / name)
    source = ImageFolder(str(tmp_path))
    assert len(source) == 4
    batch = Loader(source, Preprocess(16, 1)).train_batch(0, 4, 0)
    assert batch["images"].std() > 10
    assert size_of(source[0]["image"]) == (128, 128)
