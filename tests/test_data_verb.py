"""`vitjax data inspect` and `vitjax data bench`."""

import io
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitjax import config as config_lib
from vitjax import devices, experiment
from vitjax.data import contact_sheet, inspecting, measure, verb
from vitjax.data.preparing.statistics import kind_of, mean_and_std, pixel_sums
from vitjax.data.sources.arrays import Arrays, Digits
from vitjax.errors import InputError

QUIET = Console(quiet=True)
DIGITS = "vitjax.data.sources.arrays:Digits"


def encoded(array, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes of 12, 3 and 1 images, of odd shapes, and three files that are no images."""
    rng, root = np.random.default_rng(0), tmp_path / "birds" / "train"
    sizes = [(9, 14, 3)] * 12 + [(30, 10), (10, 400), (8, 8)] + [(3, 2000, 3)]
    for i, size in enumerate(sizes):
        place = root / ("robin" if i < 12 else "a wren with a rather long name" if i < 15 else "鳥")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02}.png").write_bytes(encoded(rng.integers(0, 256, size, dtype=np.uint8)))
    for i in range(3):
        (root / "robin" / f"bad{i}.jpg").write_bytes(b"nothing")
    return tmp_path / "birds"


def test_a_source_is_shown_in_pictures_and_numbers(folder, tmp_path, capsys):
    out = tmp_path / "look"
    words = f"inspect --source={folder} --out={out} --rows=2 --columns=5 --check=all"
    assert verb.main(words.split()) == 0
    report = json.loads((out / "report.json").read_text())
    names = ["a wren with a rather long name", "robin", "鳥"]
    assert report["class_names"] == names and report["class_counts"] == [3, 15, 1]
    assert report["num_examples"] == report["checked"] == 19
    assert [fault["id"][-8:] for fault in report["broken"]] == [f"bad{i}.jpg" for i in range(3)]
    assert report["kinds"] == {"RGB": 13, "grey": 3}
    assert report["size"] == {
        "height": {"min": 3, "median": 9, "max": 30},
        "width": {"min": 8, "median": 14, "max": 2000},
    }
    images = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.rglob("*.png"))]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(report["mean"], pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(report["std"], pixels.std(axis=0), atol=1e-6)
    side = contact_sheet.SIDE + contact_sheet.GAP
    raw = Image.open(out / "raw.png")
    assert raw.size == (contact_sheet.GAP + 5 * side, contact_sheet.GAP + 2 * (side + 32))
    assert Image.open(out / "classes.png").width == 880
    assert not (out / "augmented.png").exists()
    printed = capsys.readouterr().out
    assert "19, of which 3 cannot be read" in printed and "config.data.update(mean=(0." in printed


def test_examples_are_drawn_from_all_classes_whatever_their_share():
    labels = np.array([0] * 500 + [1, 2, 3, 4])
    source = Arrays(np.zeros((504, 2, 2), np.uint8), labels, name="x")
    chosen = list(inspecting.choose(source, 5, seed=0))
    assert sorted(labels[chosen[:5]]) == [0, 1, 2, 3, 4] and len(set(chosen)) == len(chosen)
    assert chosen != list(inspecting.choose(source, 5, seed=1))


def test_a_source_that_does_not_tell_its_labels_is_counted_by_what_was_checked(tmp_path):
    class Silent:
        num_classes, class_names = 10, None

        def __init__(self):
            self._digits = Digits("train")

        def __len__(self):
            return 100

        def __getitem__(self, index):
            return self._digits[index]

    report = inspecting.inspect(
        Silent(), tmp_path, QUIET, title="silent", channels=1, rows=1, columns=2, to_check=40
    )
    assert report["class_counts_of"] == "checked" and sum(report["class_counts"]) == 40


def test_a_mixed_image_is_labelled_by_what_it_is_mixed_of():
    config = config_lib.load_config("quickstart")
    config.augment = ({"target": "vitjax.data.augment:Mixup", "alpha": 1.0},)
    levels = {"dark": 0, "grey": 100, "light": 250}
    records = [
        {"image": np.full((8, 8), v, np.uint8), "pixels": np.full((8, 8, 1), v, np.uint8),
         "label": 0, "id": name}
        for name, v in levels.items()
    ]  # fmt: skip
    rows = inspecting.augmented(config, records, 4, list(levels))
    assert [row[0][1][0] for row in rows] == list(levels)
    mixed = [cell for row in rows for cell in row[1:] if cell[1][1]]
    assert mixed
    for image, (own, other) in mixed:
        parts = [text.rstrip(" /").split(" ") for text in (own, other)]
        weights = [float(weight) for _, weight in parts]
        assert sum(weights) == pytest.approx(1) and weights[0] >= weights[1]
        expected = sum(levels[name] * weight for name, weight in parts_of(parts))
        assert np.abs(image.astype(float) - expected).max() < 2
    assert len({str(cell[1]) for cell in mixed}) > 2  # other draws, other weights


def parts_of(parts):
    return [(name, float(weight)) for name, weight in parts]


def test_a_config_is_shown_as_the_model_sees_it(tmp_path):
    out = tmp_path / "look"
    words = "inspect --config=quickstart --config.augment.0.pixels=2 --rows=3 --columns=4 --check=9"
    assert verb.main([*words.split(), f"--out={out}"]) == 0
    side = contact_sheet.SIDE + contact_sheet.GAP
    assert Image.open(out / "augmented.png").width == contact_sheet.GAP + 4 * side
    report = json.loads((out / "report.json").read_text())
    assert len(report["mean"]) == 1 and report["checked"] == 9


def test_many_classes_are_summed_up_in_the_last_bar():
    names, counts = [f"class {i}" for i in range(80)], [i * i for i in range(80)]
    drawn = contact_sheet.bars(names, counts)
    assert len(drawn) == 50 and drawn[0] == ("class 79", 79**2, True)
    assert drawn[-1] == ("31 other classes", sum(i * i for i in range(31)), False)
    assert sum(count for _, count, _ in drawn) == sum(counts)
    assert len(contact_sheet.bars(names[:50], counts[:50])) == 50


@pytest.mark.parametrize(("counts", "is_log"), [([1, 20], False), ([1, 21], True), ([0, 0], False)])
def test_classes_that_differ_much_are_drawn_on_a_logarithmic_axis(counts, is_log, monkeypatch):
    from matplotlib.axes import Axes

    asked, barh = [], Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda *a, **k: asked.append(k["log"]) or barh(*a, **k))
    picture = contact_sheet.draw_classes(["$a", "鳥 $b$"], counts, "two")
    assert asked == [is_log] and Image.open(io.BytesIO(picture)).format == "PNG"


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (encoded(np.zeros((4, 4), np.uint8)), "grey"),
        (encoded(np.zeros((4, 4), np.uint16)), "16-bit"),
        (encoded(np.zeros((4, 4, 4), np.uint8)), "RGBA"),
        (encoded(np.zeros((4, 4), bool)), "1-bit"),
        (encoded(np.zeros((4, 4, 3), np.uint8), "gif"), "palette"),
        (np.zeros((4, 4, 1), np.uint8), "grey"),
        (np.zeros((4, 4, 3), np.uint16), "16-bit RGB"),
        (b"nothing", "unknown"),
    ],
)
def test_the_kind_of_an_image_is_told_by_its_channels(image, kind):
    assert kind_of(image) == kind


def test_mean_and_deviation_are_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    mean, std = mean_and_std(pixel_sums(pixels), 3000)
    np.testing.assert_allclose(mean, (pixels / 255).mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(std, (pixels / 255).std(axis=(0, 1)), atol=1e-6)


class Burn:
    """A transform that takes two milliseconds of the processor."""

    def __call__(self, image, generator):
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        return image


def test_the_bench_tells_where_the_time_goes(make_config, tmp_path, capsys):
    target = f"{__name__}:Burn"
    config = make_config(batch_size=8)
    config.data.transforms = ({"target": target},)
    report = measure.bench(
        config, QUIET, num_batches=3, threads=[1, 2], json_path=str(tmp_path / "bench.json")
    )
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert [row["threads"] for row in report["loader"]] == [1, 2]
    pieces, rest = report["pieces_ms_per_image"], report["assembling_cpu_ms_per_image"]
    assert pieces["transform"]["cpu"] >= 2
    assert pieces["transform"]["cpu"] > 5 * (pieces["read"]["cpu"] + pieces["decode"]["cpu"])
    first = report["loader"][0]
    assert first["cpu_ms_per_image"] == pytest.approx(1000 / first["images_per_cpu_second"])
    total = sum(piece["cpu"] for piece in pieces.values()) + rest
    assert total == pytest.approx(max(first["cpu_ms_per_image"], total - rest))
    assert first["memory_before"] > 2**20 and first["memory_after"] > 2**20
    flops = 3 * experiment.build(config, devices=jax.devices()[:1]).model.flops_per_image
    needed = report["device"]["images_per_second"]["TPU v5e"]
    assert needed == pytest.approx(0.4 * devices.PEAK_FLOPS["TPU v5e"] / flops)
    printed = capsys.readouterr().out
    assert "resize, transforms" in printed and "images/CPU-s" in printed


def test_the_bench_runs_from_the_command_line(tmp_path):
    words = "bench --config=quickstart --config.batch_size=16 --batches=2 --threads=0,2 --json="
    assert verb.main([*words.split()[:-1], f"--json={tmp_path / 'b.json'}"]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["threads"] for row in report["loader"]] == [0, 2] and report["batch_size"] == 16


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    place = tmp_path / "in" / "train" / "a"
    place.mkdir(parents=True)
    (place / "1.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of 1 examples can be read"):
        verb.main(["inspect", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    words = ["bench", "--config=cifar10", f"--config.data.root={tmp_path / 'in'}", "--batches=1"]
    with pytest.raises(InputError, match=r"no example of the source can be read|unreadable"):
        verb.main(words)
