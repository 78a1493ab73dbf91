"""Corruptions get worse with severity and nothing else; robustness counts what they cost."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.medical import corruptions, features, robustness
from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.corruptions import FAMILIES, SEVERITIES, Family, corrupt
from vitjax.medical.transfer import Outcome

SIZES = [(28, 1), (28, 3), (224, 1), (224, 3)]
IDENTITY = Family(lambda image, level, generator: image, (0, 0, 0, 0, 0), "nothing")
BLANK = Family(lambda image, level, generator: image * 0, (0, 0, 0, 0, 0), "nothing is left")


def picture(size, channels, seed=0):
    """A disc, a slope, a line and texture, between 30 and 220."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    a, b, c = generator.uniform(0.2, 0.8, 3)
    found = 90 + 60 * x - 30 * y + 60 * ((x - a) ** 2 + (y - b) ** 2 < 0.05)
    found -= 20 * (np.abs(y - c) < 0.04)
    rate = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) + 1 / size
    texture = np.fft.ifft2(np.fft.fft2(generator.normal(size=(size, size))) / rate).real
    found += 15 * texture / texture.std()  # of every length, as tissue has
    tint = generator.uniform(0.8, 1.2, channels)
    return np.clip(found[..., None] * tint, 30, 220).astype(np.uint8)


def distance(a, b):
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_each_severity_is_worse_than_the_one_before(family, size, channels):
    for key in ("a", "b"):
        image = picture(size, channels, seed=len(key + family))
        before = image.copy()
        found = [corrupt(image, family, s, key) for s in SEVERITIES]
        assert all(f.shape == image.shape and f.dtype == np.uint8 for f in found)
        assert np.array_equal(image, before)  # the image itself is left alone
        distances = [0.0, *(distance(image, f) for f in found)]
        assert (np.diff(distances) > 0).all(), distances
        assert distances[-1] > 1.25 * distances[1] and distances[-1] > 2, distances


@pytest.mark.parametrize("family", FAMILIES)
def test_a_corruption_depends_on_its_key_and_on_nothing_else(family):
    image = picture(28, 1)
    first = [corrupt(image, family, 3, key) for key in range(8)]
    np.random.default_rng(1).random(5)
    assert all(np.array_equal(a, corrupt(image, family, 3, key)) for key, a in enumerate(first))
    has_chance = family not in ("gaussian_blur", "contrast", "jpeg", "pixelate")
    assert (len({f.tobytes() for f in first}) > 1) == has_chance


def test_noise_differs_between_images_and_families():
    flat = np.full((28, 28, 1), 128, np.uint8)
    by_key = [corrupt(flat, "gaussian_noise", 5, k).astype(float) - 128 for k in ("a", "b")]
    other = corrupt(flat, "speckle_noise", 5, "a").astype(float) - 128
    for a, b in ((by_key[0], by_key[1]), (by_key[0], other)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.15


def test_a_higher_severity_is_more_of_the_same_noise():
    flat = np.full((64, 64, 1), 128, np.uint8)
    mild, strong = (corrupt(flat, "gaussian_noise", s, "a").astype(float) for s in (1, 3))
    assert np.corrcoef(mild.ravel(), strong.ravel())[0, 1] > 0.98
    assert np.isclose(strong.std() / mild.std(), 3, rtol=0.05)  # 0.12 over 0.04
    assert np.isclose(mild.std(), 0.04 * 255, rtol=0.05)


@pytest.mark.parametrize("size", [28, 224])
def test_the_square_covers_its_share_and_holds_the_mean(size):
    image = picture(size, 1)
    for severity, share in zip(SEVERITIES, FAMILIES["occlusion"].levels, strict=True):
        found = corrupt(image, "occlusion", severity, "a")
        covered = found == round(float(image.mean()))
        rows, columns = np.flatnonzero(covered.any((1, 2))), np.flatnonzero(covered.any((0, 2)))
        is_hit = (found != image).any(-1)
        assert np.isclose(is_hit.mean(), share, rtol=0.15, atol=0.01)
        assert len(rows) and len(columns)


def test_lengths_grow_with_the_image():
    """An edge is as wide in blurred pixels as the root of the size says."""
    widths = []
    for size in (28, 112):
        edge = np.zeros((size, size, 1), np.uint8)
        edge[:, size // 2 :] = 255
        row = corrupt(edge, "gaussian_blur", 5, "a")[size // 2, :, 0] / 255
        widths.append(float((row * (1 - row)).sum()))
    assert np.isclose(widths[1] / widths[0], 2, rtol=0.1)


def test_a_field_is_smooth_and_a_factor():
    image = np.full((56, 56, 3), 100, np.uint8)
    found = corrupt(image, "bias_field", 5, "a").astype(float)
    assert found.min() < 75 and found.max() > 110
    assert np.abs(np.diff(found, axis=0)).max() < 40
    assert np.isclose(np.log(found / 100).std(), 0.5, atol=0.06)
    assert np.array_equal(found[..., 0], found[..., 2])
    assert not corrupt(image * 0, "bias_field", 5, "a").any()


@pytest.mark.parametrize(("family", "severity"), [("gausian_noise", 1), ("jpeg", 0), ("jpeg", 6)])
def test_what_there_is_not_is_refused(family, severity):
    with pytest.raises(InputError, match=r"gaussian_noise|severity must be"):
        corrupt(picture(28, 1), family, severity, "a")


def cohort_of(num, size=16, channels=1, per_group=1):
    """Images of class 1 are brighter; half of them test."""
    generator = np.random.default_rng(3)
    labels = (np.arange(num) // per_group % 2).astype(np.float32)
    images = [
        np.clip(generator.normal(110 + 14 * y, 40, (size, size, channels)), 0, 255).astype(np.uint8)
        for y in labels
    ]
    return Cohort(
        "bright", images, [f"i{n}" for n in range(num)],
        (LabelSet("class", "single", ("dark", "bright")),), {"class": labels},
        np.where(np.arange(num) < num // 4, "train", "test"),
        np.array([f"g{n // per_group}" for n in range(num)]), channels=channels,
    )  # fmt: skip


def transfer_of(cohort, models):
    """What `measure` needs of a Transfer."""
    report = types.SimpleNamespace(level=0.9)
    settings = types.SimpleNamespace(report=report, train=types.SimpleNamespace(num_threads=0))
    return types.SimpleNamespace(
        cohort=cohort, settings=settings, inputs=None, fitted=lambda o: models.get(o.method),
        rows={s: cohort.rows(s) for s in ("train", "val", "test")},
    )  # fmt: skip


def outcome(method):
    nothing = np.zeros((0, 2), np.float32)
    return [Outcome(method, 4, 1.0, nothing, nothing, {})]


@pytest.fixture
def measured(native):
    """A ViT, and the same again as another method, on 45 images of test."""
    model, cohort = native(size=16, channels=1, num_classes=2), cohort_of(60)
    seen = np.asarray(model.embed(np.stack(cohort.images)))
    wanted = np.linalg.lstsq(seen, cohort.labels["class"] - 0.5, rcond=1e-3)[0]
    model.params["head"] = {"kernel": np.stack([-wanted, wanted], 1), "bias": np.zeros(2)}
    model.params["head"] = {k: v.astype(np.float32) for k, v in model.params["head"].items()}
    transfer = transfer_of(cohort, {"full": model, "cnn": model})
    outcomes = {m: outcome(m) for m in ("full", "cnn", "knn")}
    families = {"same": IDENTITY, "blank": BLANK, "gaussian_noise": FAMILIES["gaussian_noise"]}
    return robustness.measure(
        transfer, outcomes, ("full", "cnn", "knn", "lora"), families, (1, 5), num_bootstraps=40
    )


def test_what_changes_nothing_costs_nothing_and_what_blanks_costs_all(measured):
    method = measured["methods"][0]
    clean = method["clean"]["value"]
    same, blank, noise = method["families"]
    assert same["mean_drop"] == {"value": 0, "low": 0, "high": 0} and same["relative"] == 0
    assert all(s["auroc"] == method["clean"] for s in same["severities"])
    for row in blank["severities"]:
        assert row["auroc"]["value"] == 0.5
        assert np.isclose(row["drop"]["value"], clean - 0.5)
    assert clean > 0.6 and np.isclose(blank["relative"], 1)
    assert [s["severity"] for s in noise["severities"]] == [1, 5]
    assert noise["severities"][1]["auroc"]["value"] != clean
    assert noise["mean_drop"]["low"] < noise["mean_drop"]["high"]
    means = [f["mean_drop"]["value"] for f in method["families"]]
    assert np.isclose(method["mean_drop"]["value"], np.mean(means))
    assert np.isclose(clean - method["corrupted"]["value"], np.mean(means))


def test_a_model_differs_from_itself_by_nothing(measured):
    (difference,) = measured["differences"]
    assert (difference["method"], difference["against"]) == ("full", "cnn")
    assert difference["value"] == difference["low"] == difference["high"] == 0


def test_what_is_not_measured_is_said(measured):
    assert [m["method"] for m in measured["methods"]] == ["full", "cnn"]
    assert measured["methods"][0]["seed"] == 4
    missing = {m["method"]: m["why"] for m in measured["not_measured"]}
    assert set(missing) == {"knn", "lora"} and "not measured" in missing["knn"]
    assert measured["units"] == measured["all_units"] == 45 and not measured["is_sample"]


def test_corrupted_logits_are_those_of_corrupted_images(native):
    """Against the model's own forward pass, also where the contract crops."""
    model = native(size=16, channels=3, num_classes=2)
    model.contract["preprocess"] |= {"crop_fraction": 0.8}
    model = type(model)(model.model, model.params, model.contract)
    cohort = cohort_of(6, size=30, channels=3)
    conditions, rows = [("clean", 0), ("jpeg", 2), ("gaussian_noise", 4)], np.array([5, 1, 4])
    found = robustness.logits(model, cohort, rows, conditions)
    for number, row in enumerate(rows):
        fitted = model.preprocess.fit(cohort.images[row])
        shown = [fitted, *(corrupt(fitted, n, s, f"i{row}") for n, s in conditions[1:])]
        ready = (np.stack(shown).astype(np.float32) / 255 - 0.5) / 0.5
        expected = model.model.apply(model.params, jnp.asarray(ready))["logits"]
        assert np.allclose(found[number], expected, atol=2e-4)


def test_a_large_split_is_sampled_by_whole_groups_of_both_classes():
    cohort = cohort_of(400, size=2, per_group=4)
    rows = cohort.rows("test")
    chosen = robustness.sample(cohort, rows, 60)
    assert 40 <= len(chosen) <= 60 and np.isin(chosen, rows).all()
    assert np.array_equal(chosen, robustness.sample(cohort, rows, 60))
    for group in set(cohort.groups[chosen].tolist()):
        assert (cohort.groups[chosen] == group).sum() == (cohort.groups[rows] == group).sum()
    assert abs(cohort.labels["class"][chosen].mean() - 0.5) < 0.1
    assert np.array_equal(robustness.sample(cohort, rows, 300), rows)


def test_groups_too_large_to_sample_stay_whole():
    cohort = cohort_of(400, size=2, per_group=200)
    rows = cohort.rows("test")
    assert np.array_equal(robustness.sample(cohort, rows, 10), rows)


def test_every_image_keeps_its_own_inputs(native):
    model, cohort = native(size=16, channels=1, input_sizes=(1,)), cohort_of(8)
    inputs = np.linspace(-60, 60, 8, dtype=np.float32)[:, None]
    rows = np.array([6, 2, 3])
    found = robustness.logits(model, cohort, rows, [("clean", 0), ("jpeg", 1)], inputs=inputs)
    expected = features.outputs(model, cohort, rows, inputs=inputs, show=False)["logits"]
    assert np.allclose(found[:, 0], expected, atol=1e-5)
    without = features.outputs(model, cohort, rows, inputs=inputs * 0, show=False)["logits"]
    assert not np.allclose(expected, without, atol=1e-2)


def test_a_sample_is_told(native):
    model = native(size=16, channels=1, num_classes=2)
    transfer = transfer_of(cohort_of(60), {"full": model})
    found = robustness.measure(
        transfer, {"full": outcome("full")}, ("full",), {"same": IDENTITY}, (1,), 10, max_units=20
    )
    assert found["is_sample"] and found["units"] <= 20 < found["all_units"] == 45
    assert found["methods"][0]["mean_drop"]["value"] == 0 and not found["differences"]


def test_the_levels_of_every_family_go_one_way():
    for name, family in FAMILIES.items():
        steps = np.diff(family.levels)
        assert (steps > 0).all() or (steps < 0).all(), name
    assert corruptions.SEVERITIES == (1, 2, 3, 4, 5)
