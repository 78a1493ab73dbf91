"""Every evaluator in a run of the trainer, and again by `vitjax eval`."""

import json

import numpy as np
import pytest
from conftest import use_one_device
from PIL import Image
from test_evals_dense import write_folder

from vitjax import cli, experiment
from vitjax import train as train_lib
from vitjax.errors import InputError
from vitjax.evals import evaluation
from vitjax.evaluate import evaluate
from vitjax.telemetry import read_metrics

DIGITS = "vitjax.data.sources.arrays:Digits"
TRAIN, TEST = ({"target": DIGITS, "split": split} for split in ("train", "test"))
FEW = {
    "target": "vitjax.data.sources.subset:Subset",
    "source": TRAIN,
    "num_examples": 600,
}
PICTURES = ["attention", "parts", "pca", "pixels"]


def blocks(root):
    """A block of each evaluator, the cheapest."""
    both = {"source": TEST, "train_source": FEW, "batch_size": 128}
    masks = {
        "target": "vitjax.data.sources.segmentation_folder:SegmentationFolder",
        "values": (0, 100, 200),
        "ignored": (250,),
        "pattern": r"(\d+)_.*",
    }
    targets = {
        "knn": both | {"target": "knn:KNN", "neighbours": (5, 20)},
        "probe": both | {"target": "linear_probe:LinearProbe", "rates": (0.1, 1.0), "epochs": 2},
        "few": both | {"target": "few_shot:FewShot", "shots": (5, 10), "num_seeds": 2},
        "health": {"target": "health:Health", "source": TEST, "batch_size": 128},
        "parts": {
            "target": "segmentation:Segmentation",
            "source": masks | {"root": str(root / "test")},
            "train_source": masks | {"root": str(root / "train")},
            "batch_size": 8,
        },
        "attention": {
            "target": "attention_distance:AttentionDistance", "source": TEST, "num_images": 20,
        },
        "pca": {"target": "feature_pca:FeaturePCA", "source": TEST, "num_images": 6},
        "pixels": {"target": "reconstruction:Reconstruction", "source": TEST, "batch_size": 128},
    }  # fmt: skip
    for block in targets.values():
        block["target"] = f"vitjax.evals.{block['target']}"
    return targets


def make_mae(make_config, evals, **changes):
    """Masked autoencoding of the digits, with these evaluators."""
    config = make_config(eval_every=8, **changes)
    with config.unlocked(), config.ignore_type():
        config.model.num_classes = 0
        config.objective = {
            "target": "vitjax.objectives.mae:MAE",
            "mask_ratio": 0.5,
            "decoder": {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16},
        }
        config.augment = ()
        config.checkpoint.metric = None
        config.evals = evals
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir, and what its evaluation found."""
    from conftest import tiny_config

    root = tmp_path_factory.mktemp("evals")
    for name in ("train", "test"):
        write_folder(root / name, count=64, size=8)
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train_lib.train(make_mae(tiny_config, blocks(root)), root / "run")
    row = read_metrics(root / "run")[-1]
    return root / "run", {k: v for k, v in row.items() if k.startswith("eval/")}


EXPECTED = [
    "knn/accuracy", "knn/accuracy_k5", "knn/best_k", "probe/ridge_accuracy", "probe/sgd_rate",
    "few/accuracy_10shot", "health/effective_rank", "health/collapsed", "parts/miou",
    "attention/first_layer", "pca/explained", "pixels/psnr",
]  # fmt: skip


def test_every_evaluator_runs_in_training(run):
    workdir, found = run
    for name in EXPECTED:
        assert np.isfinite(found[f"eval/{name}"]), name
    assert found["eval/knn/accuracy"] > 0.5 and found["eval/probe/ridge_accuracy"] > 0.5
    assert found["eval/knn/examples"] == 360 and found["eval/parts/miou"] > 0.5
    written = sorted(str(p.relative_to(workdir / "pictures"))
                     for p in (workdir / "pictures").rglob("*.*"))  # fmt: skip
    names = ("attention_distance", "segmentation", "feature_pca", "reconstruction")
    assert written == [f"{k}/{name}-8.png" for k, name in zip(PICTURES, names, strict=True)]
    for name in written:
        with Image.open(workdir / "pictures" / name) as png:
            png.verify()


def test_vitjax_eval_finds_the_same_and_draws_again(run, monkeypatch, capsys):
    workdir, found = run
    use_one_device(monkeypatch)
    drawn = workdir / "pictures" / "pca" / "feature_pca-8.png"
    before = drawn.read_bytes()
    drawn.unlink()
    assert cli.main(["eval", f"--workdir={workdir}"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("step") == 8
    assert again == pytest.approx(found, rel=1e-6) and list(again) == list(found)
    assert drawn.read_bytes() == before


def test_every_mesh_finds_the_same(run):
    workdir, found = run
    spread = evaluate(workdir, assignments=["mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2"])
    spread.pop("step")
    for name, value in found.items():
        slack = 0.006 if "accuracy" in name or "iou" in name else 1e-3 * (1 + abs(value))
        if name.endswith(("best_k", "sgd_rate", "penalty")):  # of equally good ones
            continue
        assert spread[name] == pytest.approx(value, abs=slack), name


def test_a_picture_that_cannot_be_written_is_left_out(tmp_path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("vitjax"), "propagate", True)
    (tmp_path / "pictures").write_text("in the way")
    evaluation.write_pictures(tmp_path, {"a/b": b"x"}, 3)
    assert "cannot write" in caplog.text and "b-3.png" in caplog.text


def test_sources_are_checked_before_the_first_step(make_config, monkeypatch):
    use_one_device(monkeypatch)
    knn = {"target": "vitjax.evals.knn:KNN", "source": TEST}
    wrong = {
        "evals.x has no source": {"target": "vitjax.evals.knn:KNN"},
        "evals.x has no train_source, which vitjax.evals.knn:KNN needs": knn,
        r"takes no train_source; .*allowed: source": {
            "target": "vitjax.evals.health:Health", "source": TEST, "train_source": TRAIN,
        },
        r"evals.x has no source, which": {
            "target": "vitjax.evals.knn:KNN", "train_source": TRAIN,
        },
        "neighbours must be in 1 to 360": knn | {"train_source": TEST, "neighbours": (500,)},
        "shots=400, but class": {
            "target": "vitjax.evals.few_shot:FewShot", "source": TEST, "train_source": TRAIN,
            "shots": (400,),
        },
        "gives no masks": {
            "target": "vitjax.evals.segmentation:Segmentation", "source": TEST,
            "train_source": TRAIN,
        },
        "takes no argument 'neighbors'": knn | {"train_source": TRAIN, "neighbors": (5,)},
    }  # fmt: skip
    for message, block in wrong.items():
        exp = experiment.build(make_mae(make_config, {"x": block}))
        with pytest.raises(InputError, match=message):
            experiment.make_evaluators(exp)


def test_equal_sources_are_opened_once(make_config, monkeypatch):
    use_one_device(monkeypatch)
    opened = []
    make_loader = experiment.make_loader
    monkeypatch.setattr(
        experiment, "make_loader",
        lambda *a, **k: opened.append(k["name"]) or make_loader(*a, **k),
    )  # fmt: skip
    knn = {"target": "vitjax.evals.knn:KNN", "source": TEST, "train_source": TRAIN}
    evals = {"a": knn, "b": knn | {"neighbours": (3,)}}
    experiment.make_evaluators(experiment.build(make_mae(make_config, evals)))
    assert opened == ["evals.a.source", "evals.a.train_source"]
