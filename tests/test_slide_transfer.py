"""From slides to a report: the whole chain, detections, and their FROC."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_slides import ANNOTATION, outline, picture, tiny_model, write_csv, write_slide

from vitjax import inference
from vitjax.errors import InputError
from vitjax.medical import verb
from vitjax.medical.metrics.camelyon import SlideDetections, froc, froc_interval
from vitjax.medical.settings import transfer_config
from vitjax.medical.slides import bags, detections, trained
from vitjax.medical.slides.annotations import Lesions
from vitjax.medical.slides.camelyon import camelyon16
from vitjax.medical.slides.table import SlideTable

TILING = bags.Tiling(tile_size=16, microns_per_pixel=8.0)  # 64 pixels of level 0
MICRONS, RADIUS = 2.0, 80


def circle(x, y, radius):
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


@pytest.fixture(scope="module")
def spots():
    generator = np.random.default_rng(5)
    return {i: (int(generator.integers(280, 520)), int(generator.integers(220, 380)))
            for i in range(1, 18, 2)}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory, spots):
    """CAMELYON16's layout: 18 slides, each second one with a lesion, that of test_017 not drawn."""
    root = tmp_path_factory.mktemp("slides") / "c16"
    for i in range(18):
        kind = "tumor" if i % 2 else "normal"
        split = "testing/images" if i >= 12 else f"training/{kind}"
        name = f"test_{i:03}" if i >= 12 else f"{kind}_{i:03}"
        (root / split).mkdir(parents=True, exist_ok=True)
        pixels = picture(800, 600, (*spots[i], RADIUS) if i % 2 else None, seed=i)
        write_slide(root / split / f"{name}.tif", pixels, MICRONS, downsamples=(1, 4))
        if i % 2 and i < 17:
            text = outline(circle(*spots[i], RADIUS).tolist(), "_0")
            (root / f"{name}.xml").write_text(ANNOTATION.format(text))
    (root / "testing" / "images" / "test_014.tif").write_bytes(b"II*\0broken")
    rows = [[f"test_{i:03}", "Tumor" if i % 2 else "Normal", "x", "y"] for i in range(12, 18)]
    write_csv(root / "testing" / "reference.csv", rows)
    return root


def test_the_verb_makes_the_report_of_images_from_slides(root, spots, tmp_path, monkeypatch):
    """Two poolings; a broken slide; run again, nothing is extracted or trained again."""
    model, run = tiny_model(), tmp_path / "run"
    settings = transfer_config()
    settings.slides = {
        "target": "vitjax.medical.slides.camelyon:camelyon16", "root": str(root),
        "val_fraction": 0.3,
    }  # fmt: skip
    settings.update(presets=("gated", "mean"), floors=("majority",), seeds=(0,))
    settings.tiling.update(dataclasses.asdict(TILING))
    settings.mil.update(epochs=30, peak_lr=3e-3)
    settings.report.num_bootstraps = 50
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    found = verb.transfer(settings, "tiny", run)
    by_name = {m["method"]: m for m in found["methods"]}
    assert by_name["gated"]["test_auroc"]["value"] > 0.9
    assert set(found["official"]) == {"slide_auc"}
    assert found["data"]["unit_kind"] == "slide" and "macro images" in found["data"]["notes"][-1]
    for name in ("predictions.csv", "report.html", "attention/test_013.png", "figures/froc.png"):
        assert (run / name).is_file(), name
    assert Image.open(run / "attention" / "test_013.png").size == (800, 600)
    table = camelyon16(root, val_fraction=0.3)
    assert not (run / "bags" / "test_014.h5").exists()  # the broken one

    kept = trained.TrainedMil.load(run / "mil.npz")
    assert kept.weights == bags.model_hash(model) and kept.classes == ("normal", "tumor")
    bag = bags.read_bag(run / "bags" / "test_013.h5")
    assert json.loads(bag.attributes["settings"]) == dataclasses.asdict(TILING)
    attention, span = kept(bag.features)[1], bag.attributes["span"]
    away = np.abs(bag.coords[attention.argmax()] + span / 2 - np.array(spots[13])).max()
    assert away < RADIUS + span / 2
    inside = Lesions((circle(*spots[13], RADIUS),)).share(bag.coords, span) > 0.5
    assert attention[inside].mean() > 2 * attention[~inside].mean()

    part = found["froc"]
    assert part["left_out"] == ["test_017"] and part["slides"] == 4 and part["lesions"] == 2
    assert part["score"]["low"] <= part["score"]["value"] <= part["score"]["high"]
    assert part["score"]["value"] == 1.0  # every lesion has the highest tiles
    read = {p.stem: detections.read(p) for p in (run / "detections").iterdir()}
    assert set(read) == {f"test_{i:03}" for i in (12, 13, 15, 16, 17)}
    best = read["test_013"]
    assert np.hypot(*(best.points[0] - spots[13])) < RADIUS
    scales = dict.fromkeys(table.slide_ids, MICRONS)
    again = detections.score(table, read, scales, num_bootstraps=50)
    assert again["sensitivities"] == part["sensitivities"]
    assert "lesions that are found at six rates" in (run / "report.md").read_text()

    monkeypatch.setattr("vitjax.medical.slides.transfer.fit", lambda *_, **__: pytest.fail("again"))
    for name in ("write_checkpoint", "froc"):
        monkeypatch.setattr(f"vitjax.medical.slides.transfer.SlideTransfer.{name}",
                            lambda *_: None)  # fmt: skip
    again = verb.transfer(settings, "tiny", run)
    assert again["methods"] == found["methods"]
    settings.presets = ("gatd",)
    with pytest.raises(InputError, match=r"presets of slides.*did you mean 'gated'"):
        verb.transfer(settings, "tiny", tmp_path / "other")


class Fixed(trained.TrainedMil):
    """A model of bags whose features are the probabilities."""

    def __init__(self):
        pass

    def of_each(self, features):
        return np.stack([1 - features[:, 0], features[:, 0]], 1)


def bag_of(values, coords, **attributes):
    facts = {
        "span": 100.0,
        "tile_size": 50,
        "microns_per_pixel": 1.0,
    } | attributes  # 0.5 at level 0
    return bags.Bag(np.array(values)[:, None], np.array(coords), facts)


def test_detections_are_the_highest_of_their_neighbours():
    coords = [[0, 0], [100, 0], [200, 0], [900, 0], [900, 300], [5000, 5000]]
    found = detections.detect(Fixed(), bag_of([0.5, 0.9, 0.7, 0.2, 0.8, 0.1], coords), radius=150)
    assert found.probabilities.tolist() == pytest.approx([0.9, 0.8, 0.2, 0.1])
    assert found.points.tolist() == [[150, 50], [950, 350], [950, 50], [5050, 5050]]
    nearer = detections.detect(Fixed(), bag_of([0.5, 0.9], coords[:2]), radius=50)
    assert len(nearer.probabilities) == 2  # 50 micrometres apart is far enough
    with pytest.raises(InputError, match="does not state its microns per pixel"):
        detections.detect(Fixed(), bag_of([0.5], coords[:1], microns_per_pixel=float("nan")))


def test_tiles_alone_are_bags_of_one():
    options = {"num_features": 3, "num_classes": 3, "hidden_dim": 4, "attention_dim": 2}
    model = trained.TrainedMil(options, None, np.zeros(3), np.ones(3), "abc")
    model.params = model.model.init(jax.random.key(0))
    features = np.random.default_rng(0).normal(size=(trained.EACH + 3, 3)).astype(np.float32)
    found = model.of_each(features)
    assert found.shape == (trained.EACH + 3, 3)
    for row in (0, 1, trained.EACH + 2):
        np.testing.assert_allclose(found[row], model(features[row : row + 1])[0], rtol=1e-5)


def test_detections_are_written_as_the_challenge_reads_them(tmp_path):
    path = tmp_path / "s.csv"
    detections.write(
        path, detections.Detections(np.array([0.75, 0.5]), np.array([[1, 2.0], [3, 4]]))
    )
    assert path.read_text() == "0.75,1.0,2.0\n0.5,3.0,4.0\n"
    found = detections.read(path)
    assert found.probabilities.tolist() == [0.75, 0.5] and found.points.tolist() == [[1, 2], [3, 4]]
    path.write_text("")
    assert detections.read(path).points.shape == (0, 2)
    for text in ("0.5,1\n", "p,x,y\n", "0.5,nan,1\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"line 1: .* is not probability,x,y"):
            detections.read(path)
    with pytest.raises(InputError, match=r"cannot read .*none.csv"):
        detections.read(tmp_path / "none.csv")


def test_near_lesions_are_one_and_small_ones_are_isolated_cells():
    big = circle(2000, 2000, 800)
    outlines = Lesions((
        big,
        circle(2000 + 1600 + 100, 2000, 800),  # 100 pixels away: 50 micrometres
        circle(6000, 2000, 350),  # 350 micrometres long
        circle(6000, 6000, 180),  # 180, grown to 255
        circle(2000, 6000, 210),  # 210, grown to 285
    ), (circle(2000, 2000, 300),))  # fmt: skip
    mask, itc = detections.evaluation_mask(outlines, (8000, 8000), 0.5)
    assert mask.shape == (250, 250) and mask.max() == 4

    def at(x, y):
        return int(mask[y // 32, x // 32])

    assert at(1000 + 300, 2000) == at(3700, 2000) == at(2850, 2000) != 0
    assert at(2000, 2000) != 0  # a hole of the grown lesion is filled
    assert at(100, 100) == 0 and at(6000, 2000) not in itc and at(2000, 6000) not in itc
    assert itc == [at(6000, 6000)]
    mask, itc = detections.evaluation_mask(Lesions((), ()), (100, 50), 0.5)
    assert mask.shape == (2, 4) and not mask.any() and not itc


def table_of(labels, annotations):
    count = len(labels)
    return SlideTable(
        "t", tuple(f"s{i}" for i in range(count)), ("",) * count, ("normal", "tumor"),
        np.array(labels), np.array(["test"] * count), np.array([f"s{i}" for i in range(count)]),
        columns={"annotation": np.array(annotations)},
    )  # fmt: skip


def test_without_an_annotation_there_is_no_froc():
    nothing = detections.Detections(np.zeros(0), np.zeros((0, 2)))
    found = {"s0": nothing, "s1": nothing}
    assert detections.score(table_of([0, 1], ["", ""]), found, {}) == {}


def test_the_interval_of_a_froc_is_over_slides_of_both_kinds():
    rng = np.random.default_rng(0)

    def slide(is_tumor):
        mask = np.zeros((4, 4), int)
        mask[:2, :2] = 1
        x, y = rng.integers(0, 4, (2, 6)) + 0.5
        return SlideDetections(rng.uniform(size=6), x, y, lesions=mask if is_tumor else None)

    slides = [slide(i % 3 == 0) for i in range(30)]
    found = froc_interval(iter(slides), num=300)
    assert found.value == froc(slides).score and found.low < found.value < found.high
    again = froc_interval(slides, num=300)
    assert (found.low, found.high) == (again.low, again.high)
    scores = [froc([slides[i] for part in (range(0, 30, 3), [i for i in range(30) if i % 3])
                    for i in rng.choice(part, len(part))]).score for _ in range(300)]  # fmt: skip
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(scores, [0.025, 0.975]), atol=0.05
    )
