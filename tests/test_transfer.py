"""From a checkpoint and a folder to a report: the whole chain on images made here, in seconds."""

import csv
import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest
from conftest import use_one_device

import vitjax
from vitjax import cli, experiment
from vitjax import config as config_lib
from vitjax import train as train_lib
from vitjax.data.loader import Loader
from vitjax.data.policies import Policy
from vitjax.errors import InputError
from vitjax.medical import (
    features,
    leakage,
    presets,
    probes,
    report,
    scoring,
    transfer,
    verb,
    views,
)
from vitjax.medical.cohort import Cohort, CohortSource, LabelSet
from vitjax.medical.evaluator import Scores
from vitjax.medical.settings import transfer_config
from vitjax.medical.sources import encode_inputs, joined_groups, open_cohort, part_of
from vitjax.telemetry import read_config

COUNTS = {"train": 60, "val": 30, "test": 40}


def spots(count, seed):
    """Grey noise; of class 1 the upper left is brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 120, (count, 28, 28)).astype(np.uint8)
    images[labels == 1, :12, :12] += 70
    return images, labels[:, None].astype(np.uint8)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    arrays = {}
    for seed, (split, count) in enumerate(COUNTS.items()):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = spots(count, seed)
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        from conftest import tiny_config

        config = tiny_config(total_steps=4, eval_every=0)
        train_lib.train(config, folder / "start")
    return folder


def settings_of(folder, **changes):
    settings = transfer_config()
    settings.cohort = {
        "target": "vitjax.medical.readers.medmnist:medmnist",
        "path": str(folder / "pneumoniamnist.npz"),
    }
    settings.update(seeds=(0, 1), presets=("linear", "full"), floors=("majority", "scratch"))
    settings.robustness = False
    settings.train.update(batch_size=20, min_steps=6, max_steps=6, evaluations=2, num_threads=0)
    settings.train.mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    settings.report.update(num_bootstraps=100, views=1)
    return config_lib.override(
        settings, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()]
    )


@pytest.fixture(scope="module")
def made(place):
    """A report with every preset, and what was written."""
    settings = settings_of(place)
    settings.presets = ("linear", "knn", "lp_ft", "freeze", "lora", "full", "bit_hyper")
    settings.floors = ("majority", "pixels", "scratch", "cnn")
    settings.seeds = (0,)
    settings.low_data.update(labelled=(20.0,), methods=("linear", "scratch"), seeds=(0,))
    settings.report.update(goals={"auc": 1.01}, views=3)
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        found = verb.transfer(settings, str(place / "start"), place / "whole")
    return settings, found, place / "whole"


def test_every_preset_and_floor_is_in_the_report(made):
    settings, found, workdir = made
    assert [m["method"] for m in found["methods"]] == [*settings.floors, *settings.presets]
    by_name = {m["method"]: m for m in found["methods"]}
    assert by_name["majority"]["test_auroc"]["value"] == 0.5
    assert by_name["pixels"]["test_auroc"]["value"] > 0.95
    for row in found["methods"]:
        interval = row["test_auroc"]
        assert interval["low"] <= interval["value"] <= interval["high"]
    best = max(settings.presets, key=lambda m: by_name[m]["val_auroc"])
    assert found["chosen"] == best
    assert found["data"]["splits"]["test"]["images"] == COUNTS["test"]
    assert set(found["official"]) == {"auc", "acc"}
    assert found["official"]["auc"]["value"] == pytest.approx(
        by_name[best]["test_auroc"]["value"], abs=1e-12
    )
    goals = [(1.01, part["official"]["auc"]["value"]) for part in (found, found["views"])]
    goals = [g for g in goals for _ in range(2)]  # of one seed, the ensemble is that seed
    assert [(g["goal"], g["value"]) for g in found["goals"]] == goals
    assert [g["of"] for g in found["goals"]][2:] == [
        "mean over seeds, all views", "ensemble of seeds, all views"
    ]  # fmt: skip
    assert ", missed by " in (workdir / "report.md").read_text()
    written = json.loads((workdir / "report.json").read_text())
    assert (
        written["chosen"] == best and written["low_data"]["curves"][0]["points"][0]["images"] == 20
    )
    for name in ("report.md", "report.html", "predictions.csv"):
        assert (workdir / name).stat().st_size > 500, name


def test_the_checkpoint_says_what_the_predictions_say(made):
    _, found, workdir = made
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    assert len(rows) == COUNTS["val"] + COUNTS["test"]
    assert {r["true_class"] for r in rows} == {"normal", "pneumonia"}
    if found["checkpoint_written"] is None:
        assert found["chosen"] == "knn"
        return
    model = vitjax.load(workdir / "checkpoint")
    assert model.class_names == ("normal", "pneumonia")
    images, _ = spots(COUNTS["test"], 2)
    logits = np.asarray(model.logits(images[..., None]), np.float64)
    p = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    said = [float(r["pneumonia"]) for r in rows if r["split"] == "test"]
    np.testing.assert_allclose(said, p, atol=1e-4)


def test_views_are_the_image_and_draws_of_its_policy(made, place):
    """Against the model's own forward pass, view by view; then their mean is scored."""
    settings, found, _ = made
    work = transfer.Transfer(settings, str(place / "start"), place / "whole")
    assert work.policy == found["views"]["policy"] == "chest_xray"
    outcome = work.outcome("full", 0)
    model, rows = work.fitted(outcome), work.rows["test"]
    policy = Policy("chest_xray")
    seen = work.outputs(model, rows, augment=policy, num_views=3)["logits"]
    fitted = [model.preprocess.fit(work.cohort.images[r][..., None]) for r in rows.tolist()]
    unit = np.zeros((256, *fitted[0].shape), np.float32)  # a batch, padded
    unit[: len(rows)] = np.stack(fitted) / 255.0
    unit = jax.numpy.asarray(unit)
    for view in range(3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), view)
        drawn = policy(key, {"images": unit})["images"] if view else unit
        expected = model.model.apply(model.params, model.preprocess.normalise(drawn))["logits"]
        np.testing.assert_allclose(seen[:, view], expected[: len(rows)], atol=1e-4)
    assert np.abs(seen[:, 1] - seen[:, 0]).max() > 1e-2
    (scored,) = views.scored(work, [outcome], "chest_xray", 3)
    p = np.exp(seen.astype(np.float64))
    p = (p / p.sum(2, keepdims=True)).mean(1)
    np.testing.assert_allclose(scored.probabilities["class"], p, atol=1e-6)


def test_robustness_has_a_row_of_training_with_noise(made, place, monkeypatch):
    settings, _, _ = made
    work = transfer.Transfer(settings, str(place / "start"), place / "whole")
    found = {m: [work.outcome(m, 0)] for m in ("linear", "full", "scratch", "cnn")}
    monkeypatch.setattr(
        verb.robustness,
        "measure",
        lambda _, outcomes, methods: {"of": outcomes, "methods": methods},
    )
    measured = verb._robustness(work, "full", found)
    assert measured["methods"] == ("full", "full+noise", "scratch", "cnn")
    (noisy,) = measured["of"]["full+noise"]
    config = json.loads((noisy.run / "config.json").read_text())["config"]
    assert config["augment"][-1] == {
        "target": "vitjax.data.colour:GaussianNoise", "std": [0.0, settings.train.noise]
    }  # fmt: skip
    plain = json.loads((found["full"][0].run / "config.json").read_text())["config"]
    assert config["augment"][:-1] == plain["augment"]
    assert config | {"augment": None} == plain | {"augment": None}
    assert not np.array_equal(noisy.test, found["full"][0].test)
    assert verb._robustness(work, "linear", found)["methods"] == ("linear", "scratch", "cnn")


def test_what_is_made_is_not_made_again_and_the_test_set_is_counted(made, place, monkeypatch):
    settings, found, workdir = made
    before = {p: p.stat().st_mtime_ns for p in (workdir / "outcomes").iterdir()}
    monkeypatch.setattr(transfer, "train", lambda *_: pytest.fail("trained again"))
    again = verb.transfer(settings, str(place / "start"), workdir)
    assert {p: p.stat().st_mtime_ns for p in (workdir / "outcomes").iterdir()} == before
    assert again["methods"] == found["methods"]
    assert found["guards"]["test_evaluations"] == 1
    assert again["guards"]["test_evaluations"] == 2
    other = settings_of(place, train__peak_lr__full=0.1)
    other.floors = ()
    with pytest.raises(InputError, match="is of other settings, data or weights"):
        verb.transfer(other, str(place / "start"), workdir)


def test_lora_and_freeze_leave_the_rest_as_it_was(made, place):
    """In the runs of the ladder: not a bit of what is frozen has changed."""
    _, _, workdir = made
    start = vitjax.load(place / "start").params
    from vitjax.checkpoints import steps, store

    for name, trained in (("lora", ("lora_", "head")), ("freeze", ("blocks", "norm", "head"))):
        run = workdir / "runs" / f"{name}-seed0" / "checkpoints"
        folder = run / str(steps.whole_steps(run)[-1])
        params = store.read_verified(folder, "params", None, store.read_contract(folder))
        changed = [
            path
            for path, leaf in store.named(params).items()
            if path in store.named(start)
            and np.asarray(leaf).tobytes() != np.asarray(store.named(start)[path]).tobytes()
        ]
        assert changed and all(any(t in path for t in trained) for path in changed), changed
        if name == "freeze":
            kernel = "blocks/mlp/up/kernel"
            assert (store.named(params)[kernel][0] == store.named(start)[kernel][0]).all()
            assert (store.named(params)[kernel][1] != store.named(start)[kernel][1]).any()


def test_the_verb_on_a_folder_of_classes(place, tmp_path, monkeypatch, capsys):
    from PIL import Image

    images, labels = spots(60, 9)
    for index, (image, label) in enumerate(zip(images, labels[:, 0], strict=True)):
        folder = tmp_path / "data" / ("sick" if label else "well")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    words = [
        "transfer", f"--data={tmp_path / 'data'}", f"--checkpoint={place / 'start'}",
        f"--workdir={tmp_path / 'run'}", "--config.presets=('linear','full')",
        "--config.floors=('pixels',)", "--config.seeds=(0,)", "--config.train.max_steps=4",
        "--config.train.min_steps=4", "--config.robustness=False",
        "--config.report.num_bootstraps=50",
        "--config.train.mesh.fsdp=1",
    ]  # fmt: skip
    assert cli.main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["data"]["label_sets"][0]["classes"] == ["sick", "well"]
    assert sum(s["images"] for s in found["data"]["splits"].values()) == 60
    assert "device" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"presets": ("ful",)}, "did you mean 'full'"),
        ({"imbalance": "focl"}, "did you mean 'focal'"),
        ({"seeds": ()}, "at least one of seeds"),
        ({"policy": "chest_xrays"}, "did you mean 'chest_xray'"),
        ({"low_data": {"labelled": (9,), "methods": ("scrach",)}}, "low_data.*'scratch'"),
        ({"report": {"level": 95.0}}, "report.level must be between 0 and 1, got 95"),
        ({"report": {"goals": {"aucc": 0.9}}}, "report.goals: 'aucc' is no metric.*mean 'auc'"),
        ({"image_size": 9}, "not divisible by patch size"),
        ({"presets": ("full+nois",)}, "presets: did you mean 'full'"),
        ({"train": {"noise": 2.0}}, "train.noise must be in 0 to 1, got 2"),
        ({"report": {"views": 0}}, "report.views must be at least 1, got 0"),
        ({"inputs": ("age",)}, "has no column 'age' for inputs"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(place, tmp_path, monkeypatch, changes, words):
    settings = settings_of(place)
    settings.update(changes)
    with pytest.raises(InputError, match=words):
        verb.transfer(settings, str(place / "start"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--workdir=x"], "--checkpoint"),
        (["--checkpoint=x", "--workdir=x"], "give --config=FILE, or --data="),
        (["--config=quickstart", "--checkpoint=x", "--workdir=x"], "no transfer config"),
        (["--data=/none", "--checkpoint=x", "--workdir=x"], "/none"),
    ],
)
def test_wrong_words_are_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["transfer", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# What the parts do


def cohort(total=120, seed=0, **changes):
    """Patients of two images each, one label set of each kind, columns with blanks."""
    rng = np.random.default_rng(seed)
    sick = rng.integers(0, 2, total)
    grade = np.clip(sick * 2 + rng.integers(0, 2, total), 0, 2).astype(np.float32)
    multi = np.stack([sick, rng.integers(0, 2, total)], 1).astype(np.float32)
    grade[3], multi[5, 0] = np.nan, np.nan
    given = {
        "name": "made",
        "images": [np.full((8, 8), 100 * s + i % 50, np.uint8) for i, s in enumerate(sick)],
        "ids": [f"image{i}" for i in range(total)],
        "label_sets": (
            LabelSet("sick", "single", ("no", "yes")),
            LabelSet("grade", "ordinal", ("0", "1", "2")),
            LabelSet("signs", "multi", ("a", "b")),
        ),
        "labels": {"sick": sick.astype(np.float32), "grade": grade, "signs": multi},
        "splits": np.repeat(["train", "val", "test"], [total // 2, total // 4, total // 4]),
        "groups": np.array([f"p{i // 2}" for i in range(total)]),
        "group_kind": "patient",
        "columns": {
            "age": np.where(np.arange(total) % 7 == 0, np.nan, 40.0 + np.arange(total) % 30),
            "sex": np.array(["F", "M", ""] * (total // 3)),
        },
    }  # fmt: skip
    return Cohort(**(given | changes))


def test_probabilities_of_each_kind_of_set():
    sets = cohort().label_sets
    logits = np.array([[0.0, np.log(3), 2.0, 5.0, 0.0, -50.0]])
    p = scoring.probabilities(sets, logits)
    np.testing.assert_allclose(p["sick"], [[0.25, 0.75]])
    above = 1 / (1 + np.exp(-2.0))  # and no more above 1 than above 0
    np.testing.assert_allclose(p["grade"], [[1 - above, 0, above]], atol=1e-12)
    np.testing.assert_allclose(p["signs"], [[0.5, 0]], atol=1e-12)


@pytest.mark.parametrize("how, wanted", [("max", 0.9), ("mean", 0.5)])
def test_units_take_the_maximum_or_the_mean_and_unread_images_are_left_out(how, wanted):
    made = cohort(
        label_sets=(LabelSet("sick", "single", ("no", "yes")),), aggregate=how,
        units=np.array([f"u{i // 2}" for i in range(120)]),
    )  # fmt: skip
    rows = np.array([6, 7, 8, 9])
    p = np.array([[0.9, 0.1], [0.1, 0.9], [np.nan, np.nan], [0.2, 0.8]])
    found = scoring.to_units(made, rows, {"sick": p})
    assert found.units.tolist() == ["u3", "u4"] and found.groups.tolist() == ["p3", "p4"]
    np.testing.assert_allclose(found.probabilities["sick"][:, 1], [wanted, 0.8])


def test_intervals_over_seeds_are_paired():
    made = cohort(label_sets=(LabelSet("sick", "single", ("no", "yes")),), total=240)
    rows = made.rows("test")
    truth = made.labels["sick"][rows]
    rng = np.random.default_rng(0)

    def run(strength):
        z = rng.normal(size=len(rows)) + strength * truth
        p = 1 / (1 + np.exp(-z))
        return scoring.to_units(made, rows, {"sick": np.stack([1 - p, p], 1)})

    strong, weak = [run(3.0) for _ in range(3)], [run(0.5) for _ in range(3)]
    found = scoring.auroc_over_seeds(strong, num=300)
    assert found.value == pytest.approx(np.mean([scoring.mean_auroc(s) for s in strong]))
    assert found.low < found.value < found.high
    minus = scoring.auroc_over_seeds(strong, minus=weak, num=300)
    assert minus.low > 0
    none = scoring.auroc_over_seeds(strong, minus=strong, num=300)
    assert none.value == none.low == none.high == 0


def test_probes_agree_with_scikit_learn_and_ignore_unknown_labels():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    labels = (x[:, 0] + rng.normal(size=200) > 0).astype(np.float32)
    s = LabelSet("a", "multi", ("a",))
    found = probes.fit_linear(x, s, labels[:, None], 0.01)
    peer = LogisticRegression(C=1 / (0.01 * 200), tol=1e-10, max_iter=5000).fit(x, labels)
    np.testing.assert_allclose(found[:-1, 0], peer.coef_[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[-1, 0], peer.intercept_[0], rtol=1e-3, atol=1e-3)
    masked = np.concatenate([labels, np.full(50, np.nan)])[:, None]
    more = probes.fit_linear(np.concatenate([x, rng.normal(size=(50, 5))]), s, masked, 0.01)
    np.testing.assert_allclose(more, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["single", "multi", "ordinal"])
def test_newton_and_lbfgs_find_the_same(kind, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 6))
    latent = x[:, 0] - x[:, 1] + rng.normal(size=150)
    sets = {
        "single": (LabelSet("a", "single", ("no", "yes")), (latent > 0).astype(float)),
        "multi": (LabelSet("a", "multi", ("a", "b")), np.stack([latent > 0, latent > 1], 1) * 1.0),
        "ordinal": (LabelSet("a", "ordinal", ("0", "1", "2")), np.digitize(latent, [0, 1]) * 1.0),
    }
    s, labels = sets[kind]
    labels.flat[7] = np.nan
    start = rng.normal(size=(7, s.num_logits))
    for penalty in (1e-3, 1.0):
        newton = [probes.fit_linear(x, s, labels, penalty, first) for first in (None, start)]
        with monkeypatch.context() as patch:
            patch.setattr(probes, "NEWTON_SIZE", 0)
            slow = probes.fit_linear(x, s, labels, penalty)
        for found in newton:
            if kind == "single":  # the bias of a softmax is free up to a shift
                found, wanted = found[:, 1] - found[:, 0], slow[:, 1] - slow[:, 0]
            else:
                wanted = slow
            np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-3)
    always = probes.fit_linear(x, sets["multi"][0], np.ones((150, 2)), 0.1)
    assert np.isfinite(always).all() and always[-1, 0] > 3


@pytest.mark.parametrize("fit", [probes.linear, probes.knn])
def test_probes_learn_every_kind_of_set_and_leave_unread_images_out(fit):
    made = cohort()
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [np.nan_to_num(made.targets), 0.3 * rng.normal(size=(120, 4))], 1
    ) + 0.05 * rng.normal(size=(120, 8))
    x[100] = np.nan
    found = fit(x, made, made.rows("train"), made.rows("val"))
    assert found.logits.shape == (120, 6) and np.isnan(found.logits[100]).all()
    rows = made.rows("test")
    scored = scoring.to_units(
        made, rows, scoring.probabilities(made.label_sets, found.logits[rows])
    )
    assert len(scored.units) == len(rows) - 1
    assert scoring.mean_auroc(scored) > 0.9
    if found.kernel is not None:
        again = x @ found.kernel + found.bias
        np.testing.assert_allclose(again[:100], found.logits[:100], atol=1e-6)


def test_parts_of_the_labels_are_nested_whole_groups_of_each_class():
    made = cohort(label_sets=(LabelSet("sick", "single", ("no", "yes")),))
    rows = made.rows("train")
    parts = [part_of(made, rows, share, seed=3) for share in (0.1, 0.3, 0.6, 1.0)]
    for small, large in itertools.pairwise(parts):
        assert set(small) < set(large)
    for part in parts:
        outside = set(made.groups[rows]) - set(made.groups[part])
        assert not outside & set(made.groups[part])
        assert set(made.labels["sick"][part]) == {0.0, 1.0}
    assert abs(len(parts[1]) - 18) <= 4
    assert set(part_of(made, rows, 0.3, seed=4)) != set(parts[1])
    assert len(part_of(made, rows, 20, seed=3)) in range(14, 27)
    with pytest.raises(InputError, match="labelled must be"):
        part_of(made, rows, 0, seed=0)


def test_inputs_are_scaled_by_the_training_split_and_blanks_are_nan():
    made = cohort()
    found, sizes = encode_inputs(made, ("age", "sex"))
    assert sizes == (1, 2)
    train = made.splits == "train"
    assert np.nanmean(found[train, 0]) == pytest.approx(0, abs=1e-5)
    assert np.nanstd(found[train, 0]) == pytest.approx(1, abs=1e-5)
    assert np.isnan(found[0, 0]) and np.isnan(found[2, 1:]).all()
    assert found[0, 1:].tolist() == [1, 0] and found[1, 1:].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"no column 'sx'.*did you mean 'sex'"):
        encode_inputs(made, ("sx",))


def test_the_cnn_has_the_flops_it_should():
    for flops, size in ((5e8, 28), (9e9, 224)):
        block = presets.cnn_of(int(flops), size, 3, 2)
        model = config_lib.build(block, image_size=size, channels=3)
        assert 0.7 < model.flops_per_image / flops < 1.4


def test_the_floors_of_a_hybrid_differ_from_it_in_the_stem_alone(place, tmp_path):
    settings = settings_of(place)
    work = transfer.Transfer(settings, str(place / "start"), tmp_path)
    contract = dict(work.start.contract)
    contract["model"] = dict(contract["model"]) | {"stem": "resnet"}
    start = dataclasses.replace(work.start, contract=contract)
    made = {
        method: presets.run_config(settings, work.cohort, start, method, 0).model.to_dict()
        for method in ("scratch", "vit", "hybrid")
    }
    assert [m.pop("stem") for m in made.values()] == ["resnet", "patch", "conv"]
    assert made["scratch"] == made["vit"] == made["hybrid"]


def test_colour_is_not_dropped_unasked(place, tmp_path):
    settings = settings_of(place)
    settings.cohort = {"target": f"{__name__}:cohort", "channels": 3}
    with pytest.raises(InputError, match=r"takes grey images.*made is in colour; set drop_colour"):
        transfer.Transfer(settings, str(place / "start"), tmp_path)
    settings.drop_colour = True
    assert transfer.Transfer(settings, str(place / "start"), tmp_path).cohort.channels == 3


def test_a_crop_that_cuts_off_the_centre_is_refused(place, tmp_path):
    settings = settings_of(place)
    work = transfer.Transfer(settings, str(place / "start"), tmp_path)
    centred = dataclasses.replace(work.cohort, min_crop_area=0.6)
    crop = {"target": "vitjax.data.transforms:RandomResizedCrop"}
    for block, is_wrong in ((crop, True), (crop | {"min_area": 0.7}, False)):
        settings.transforms = (block,)
        if is_wrong:
            with pytest.raises(InputError, match=r"min_area=0.08 may cut off the centre"):
                presets.run_config(settings, centred, work.start, "full", 0)
        config = presets.run_config(settings, work.cohort, work.start, "full", 0)
        assert config.data.transforms == (block,)


@pytest.mark.parametrize("imbalance", ["class_weights", "logit_adjustment", "focal"])
def test_each_treatment_of_imbalance_makes_a_run(place, imbalance):
    settings = settings_of(place, imbalance=imbalance)
    work = transfer.Transfer(settings, str(place / "start"), place / "unused")
    config = presets.run_config(settings, work.cohort, work.start, "full", 0)
    objective = config_lib.plain(config.objective)
    key = {"class_weights": "weights", "logit_adjustment": "priors", "focal": "focal_gamma"}
    assert objective[key[imbalance]]
    settings = settings_of(place, imbalance="balanced_sampling")
    config = presets.run_config(settings, work.cohort, work.start, "full", 0)
    assert config.data.sampling == "classes"


def test_features_are_found_again_by_weights_and_data(place, tmp_path, monkeypatch):
    settings = settings_of(place)
    work = transfer.Transfer(settings, str(place / "start"), tmp_path)
    first = work.features()
    assert first.shape == (130, 32) and len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(features, "outputs", lambda *_, **__: pytest.fail("computed again"))
    again = features.cached_features(work.model, work.cohort, tmp_path / "cache")
    assert (again == first).all()
    monkeypatch.undo()
    changed = vitjax.load(place / "start")
    changed.params["norm"]["scale"] = changed.params["norm"]["scale"] + 1
    other = features.cached_features(changed, work.cohort, tmp_path / "cache", show=False)
    assert np.abs(other - first).max() > 1e-3 and len(list((tmp_path / "cache").iterdir())) == 2


def test_scores_are_the_same_in_batches_of_any_size(place, tmp_path, monkeypatch):
    settings = settings_of(place)
    work = transfer.Transfer(settings, str(place / "start"), tmp_path)
    exp = experiment.build(presets.run_config(settings, work.cohort, work.start, "full", 0))
    params, extra = exp.objective.init(jax.random.key(0), {})
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 2))
    source = CohortSource(work.cohort, work.rows["val"])
    found = []
    for size in (4, 7, 64):
        loader = Loader(source, exp.preprocess, num_threads=0)
        made = Scores(exp.objective, loader, exp.mesh, batch_size=size)
        found.append(made.all(params, extra))
        state = types.SimpleNamespace(eval_params=params, extra=extra)
        numbers = made(state)
        assert numbers["examples"] == COUNTS["val"] and 0 < numbers["loss"] < 20
    for logits, labels in found[1:]:
        np.testing.assert_allclose(logits, found[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(labels, found[0][1])
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        Scores(exp.objective, loader, exp.mesh, batch_size=0)


def test_a_run_with_inputs_label_sets_and_patients(place, tmp_path, monkeypatch):
    settings = settings_of(place)
    settings.cohort = {"target": f"{__name__}:cohort"}
    settings.update(inputs=("age", "sex"), presets=("full",), floors=("majority",), seeds=(0,))
    settings.report.update(min_cases=5, min_positives=2, duplicates=False)
    found = verb.transfer(settings, str(place / "start"), tmp_path / "run")
    names = {c["question"] for c in found["curves"]}
    assert names == {"sick: yes", "grade: 0", "grade: 1", "grade: 2", "signs: a", "signs: b"}
    assert {g["column"] for a in found["audit"] for g in a["gaps"]} == {"age", "sex"}
    assert len(found["calibration"]) == 3
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    assert "grade: 1" in rows[0] and "true_signs: a" in rows[0]
    assert not any(row["group"].startswith("p") and row["group"][1:].isdigit() for row in rows)


def test_a_patient_in_two_splits_stops_the_transfer(place, tmp_path):
    bad = cohort()
    groups = bad.groups.copy()
    groups[-1] = groups[0]
    with pytest.raises(InputError, match="p0"):
        verb.guards(settings_of(place), cohort(groups=groups))


def test_plain_report_values_are_json():
    value = {"a": np.float64("nan"), "b": np.arange(2), "c": (np.int32(1), {"d": np.bool_(True)})}
    assert json.dumps(report.plain(value)) == '{"a": null, "b": [0, 1], "c": [1, {"d": true}]}'


def test_a_cohort_as_a_source():
    made = cohort(label_sets=(LabelSet("sick", "single", ("no", "yes")),))
    source = CohortSource(made, made.rows("val"))
    assert len(source) == 30 and source[0]["id"] == "image60" and source[0]["group"] == "p30"
    assert source.class_names == ("no", "yes") and source.num_targets == 1
    assert (source.all_labels() == made.labels["sick"][60:90]).all()
    assert CohortSource(cohort()).class_names is None


def test_reports_become_a_table_for_scaling(made, place, tmp_path, capsys):
    from vitjax.scaling.table import read_table

    _, found, workdir = made
    out = tmp_path / "points.csv"
    assert cli.main(["transfer", "collect", str(workdir), f"--out={out}"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == len(found["methods"]) + 2
    assert {r["upstream_examples"] for r in rows} == {str(4 * 32)}
    assert float(rows[0]["auroc_error"]) == pytest.approx(1 - float(rows[0]["auroc"]))
    assert {r["labelled_images"] for r in rows} == {"20", str(COUNTS["train"])}
    assert len(read_table(out).column("upstream_loss")) == len(rows)
    assert cli.main(["transfer", "collect", str(place), f"--out={out}"]) == 2
    assert "has no report.json" in capsys.readouterr().err


def test_images_that_were_pretrained_on_are_counted(place, tmp_path):
    settings = settings_of(place, pretraining=str(place / "start"))
    work = transfer.Transfer(settings, str(place / "start"), tmp_path)
    assert verb.guards(settings, work.cohort)["overlap"]["exact"] == 0

    leakage.hash_index(work.cohort, str(tmp_path / "index.npz"))
    settings = settings_of(place, pretraining=str(tmp_path / "index.npz"))
    assert verb.guards(settings, work.cohort)["overlap"]["exact"] == sum(COUNTS.values())
    with pytest.raises(InputError, match="is no run directory"):
        verb.guards(settings_of(place, pretraining=str(tmp_path)), work.cohort)


def test_pixels_of_images_of_several_sizes_and_of_none():
    sizes = [(20, 30), (40, 10), None, (28, 28)]

    def read(index):
        return None if sizes[index] is None else np.full((*sizes[index], 1), 51 * index, np.uint8)

    found = probes.pixels(cohort(total=120), lambda i: read(i % 4))
    assert found.shape == (120, 20 * 30) and np.isnan(found[2]).all()
    np.testing.assert_allclose(found[[0, 1, 3]].mean(1), [0, 0.2, 0.6], atol=1e-6)


def test_official_metrics_of_a_cohort():
    from vitjax.medical import official

    five = [
        "p0_n0",
        "p0_n1",
        "p0_n2",
        "p0_n3",
        "p0_n4",
        "p1_n0",
        "p1_n1",
        "p1_n2",
        "p1_n3",
        "p1_n4",
    ]
    classes = ("negative", "itc", "micro", "macro")
    truth = np.array([0, 0, 0, 0, 3, 0, 0, 0, 0, 0], np.float64)
    p = np.eye(4)[truth.astype(int)]
    made = scoring.Scored(
        np.array(five), np.array([n[:2] for n in five]), {"slide": truth}, {"slide": p}, {},
        (LabelSet("slide", "single", classes),),
    )  # fmt: skip
    assert official.camelyon17(cohort(), made)["quadratic_kappa"] == 1
    p[4] = np.eye(4)[2]  # pN1mi for pN1
    half = official.camelyon17(cohort(), made)["quadratic_kappa"]
    assert 0 < half < 1
    twice = official.taken(made, np.tile(np.arange(10), 2))
    assert official.camelyon17(cohort(), twice)["quadratic_kappa"] == pytest.approx(half)
    binary = scoring.Scored(
        np.array(["a", "b"]), np.array(["a", "b"]), {"tumour": np.array([0.0, 1.0])},
        {"tumour": np.array([[0.4, 0.6], [0.2, 0.8]])}, {},
        (LabelSet("tumour", "single", ("no", "yes")),),
    )  # fmt: skip
    assert official.pcam(cohort(), binary) == {"accuracy": 0.5, "auc": 1.0}
    assert official.slide_auc(cohort(), binary) == {"slide_auc": 1.0}
    assert official.of(cohort()) is None


@pytest.fixture(scope="module")
def folded(tmp_path_factory, place):
    """Three folds of images of which two are the same and two look alike, as a report."""
    folder = tmp_path_factory.mktemp("folds")
    arrays = dict(np.load(place / "pneumoniamnist.npz"))
    smooth = np.add.outer(np.arange(28) * 3, np.arange(28) ** 2 // 8).astype(np.uint8)
    arrays["train_images"][7], arrays["val_images"][9] = smooth, smooth + 1
    arrays["val_images"][4] = arrays["train_images"][5]
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    settings = settings_of(folder, folds=3)
    settings.update(seeds=(0, 1, 2), floors=("majority",))
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        found = verb.transfer(settings, str(place / "start"), folder / "whole")
    return settings, found, folder / "whole"


def test_folds_hold_every_image_out_once_and_keep_what_looks_alike_together(folded):
    cohort = open_cohort(folded[0].cohort, folds=3)
    trained, held_out = ([cohort.rows(split, seed) for seed in range(3)]
                         for split in ("train", "val"))  # fmt: skip
    whole = np.flatnonzero(cohort.splits != "test")
    assert len(whole) == COUNTS["train"] + COUNTS["val"]
    assert sorted(np.concatenate(held_out)) == whole.tolist()
    for a, b in zip(trained, held_out, strict=True):
        assert sorted([*a, *b]) == whole.tolist() and 28 <= len(b) <= 32
        labels = cohort.labels["class"][b]
        assert abs(labels.mean() - 0.5) < 0.1
    assert cohort.rows("val", 4).tolist() == held_out[1].tolist()  # counted round
    assert cohort.rows("test", 1).tolist() == np.flatnonzero(cohort.splits == "test").tolist()
    assert cohort.rows("val").tolist() == np.flatnonzero(cohort.splits == "val").tolist()
    fold = dict(zip(cohort.ids, cohort.folds, strict=True))
    train, val = (np.asarray(cohort.ids)[cohort.splits == s] for s in ("train", "val"))
    assert fold[train[5]] == fold[val[4]] and fold[train[7]] == fold[val[9]]
    plain = open_cohort(folded[0].cohort)
    assert plain.folds is None and plain.rows("val", 1).tolist() == cohort.rows("val").tolist()


def test_folds_keep_groups_and_their_order_does_not_matter():
    """Joined groups: of the cohort's, and those that share an image."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 28, 28)).astype(np.uint8)
    images[8] = images[1]  # group 4 with group 0, and 5 with 4
    images[10] = images[9]
    images[11] = images[2]  # which is in the test split
    cohort = Cohort(
        name="pairs", images=list(images), ids=[f"i{i}" for i in range(12)],
        label_sets=(LabelSet("class", "single", ("no", "yes")),),
        labels={"class": np.tile([0.0, 1.0], 6).astype(np.float32)},
        splits=np.array(["train", "val"] * 5 + ["train", "test"]),
        groups=np.array([f"g{i // 2}" for i in range(12)]),
    )  # fmt: skip
    joined = joined_groups(cohort)
    assert joined[[0, 1, 8, 9, 10]].tolist() == [joined[0]] * 5
    assert len({*joined}) == 4 and joined[2] != joined[11]


def test_each_fold_is_validated_by_what_did_not_see_it(folded, place):
    settings, found, workdir = folded
    work = transfer.Transfer(settings, str(place / "start"), workdir)
    by_name = {m["method"]: m for m in found["methods"]}
    assert [by_name[m]["seeds"] for m in ("linear", "full", "majority")] == [[0, 1, 2]] * 3
    x, chances = work.features(), {}
    for seed in range(3):
        held_out, rest = (
            np.flatnonzero((work.cohort.folds == seed) == yes) for yes in (True, False)
        )
        rest = rest[work.cohort.folds[rest] >= 0]
        own = probes.linear(x, work.cohort, rest, held_out)
        outcome = work.outcome("linear", seed)
        np.testing.assert_array_equal(outcome.val, own.logits[held_out])
        np.testing.assert_array_equal(outcome.test, own.logits[work.rows["test"]])
        assert outcome.facts["num_trained"] == len(rest)
        config = read_config(workdir / "runs" / f"full-seed{seed}")
        sources = [config["data"]["source"], config["evals"]["val"]["source"]]
        seen = [config_lib.build(dict(source)).rows.tolist() for source in sources]
        assert seen == [rest.tolist(), held_out.tolist()]
        chosen = work.outcome(found["chosen"], seed)
        p = np.exp(chosen.val - chosen.val.max(1, keepdims=True))
        chances |= dict(zip(held_out.tolist(), p[:, 1] / p.sum(1), strict=True))
    each = [scoring.mean_auroc(work.scored(work.outcome("full", s), "val")) for s in range(3)]
    assert by_name["full"]["val_auroc"] == pytest.approx(np.mean(each), abs=1e-12)
    rows = list(csv.DictReader((workdir / "predictions.csv").open()))
    said = {r["id"]: float(r["pneumonia"]) for r in rows if r["split"] == "val"}
    assert len(rows) == sum(COUNTS.values()) and len(said) == len(chances)
    for row, p in chances.items():
        assert said[work.cohort.ids[row]] == pytest.approx(p, abs=1e-5)
    assert found["data"]["trained_on"] == 60
    text = (workdir / "report.md").read_text()
    assert "in 3-fold cross-validation (" in text and "those that look alike in one" in text


def test_a_probe_that_is_kept_is_not_taken_for_other_folds(folded, place):
    """An interrupted transfer leaves it behind; other folds validate what it was trained on."""
    settings, _, workdir = folded
    heads = []
    for number in (3, 2):
        own = config_lib.override(settings, [f"folds={number}"])
        work = transfer.Transfer(own, str(place / "start"), workdir)
        model = vitjax.load(work._with_probe(0, 1.0))
        found = work._probe("linear", 0, 1.0)[0][work.rows["test"]]
        np.testing.assert_allclose(
            work.outputs(model, work.rows["test"])["logits"], found, atol=1e-4
        )
        heads.append(found)
    assert np.abs(heads[0] - heads[1]).max() > 1e-2


@pytest.mark.parametrize("number", [1, -2, 91])
def test_a_number_of_folds_that_cannot_be_is_refused(place, tmp_path, number):
    with pytest.raises(InputError, match=rf"folds must be 0 .* or 2 to \d\d, .*; got {number}$"):
        transfer.Transfer(settings_of(place, folds=number), str(place / "start"), tmp_path)
