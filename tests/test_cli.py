"""The command line as users meet it: verbs, exit codes, eval, predict, load."""

import csv
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import vitjax
from vitjax import cli, train
from vitjax.checkpoints import steps
from vitjax.data.sources.arrays import Digits
from vitjax.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small trained run on one device."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(batch_size=64, total_steps=40, optimizer__peak_lr=4e-3, eval_every=0)
    config.mesh.fsdp = 8
    train.train(config, folder)
    return folder


def call(*argv):
    """Runs the command line in this process; returns its exit status."""
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stopped:
        return stopped.code


def test_help_lists_every_verb_without_importing_jax():
    script = (
        "import sys; from vitjax.cli import main; main(['--help']); assert 'jax' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb in cli.VERBS:
        assert f"  {verb}" in out.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_shows_an_example(verb, capsys):
    assert call(verb, "--help") == 0
    assert f"example: vitjax {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--config=quickstrat", "--workdir=x"], "did you mean 'quickstart'"),
        (
            ["train", "--config=quickstart", "--workdir=x", "--config.modle.width=8"],
            "did you mean 'model'",
        ),
        (["train", "--config=quickstart", "--workdir=x", "--config.seed=a"], "must be int"),
        (["train", "--config=quickstart"], "--workdir"),
        (["eval", "--workdir=nowhere"], "no run directory"),
        (["predict", "--checkpoint=nowhere", "--images=x.png", "--out=o.csv"], "no such file"),
        (["train", "--config=quickstart", "--workdir=/dev/null/x"], "cannot write to --workdir"),
        ([], ""),
    ],
)
def test_wrong_input_exits_with_2_and_one_message(argv, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    err = capfd.readouterr().err
    assert words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_eval_repeats_the_run_s_numbers(run, capsys):
    assert call("eval", f"--workdir={run}") == 0
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert printed["eval/test/accuracy"] == summary["eval/test/accuracy"]
    assert printed["eval/test/loss"] == pytest.approx(summary["eval/test/loss"], rel=1e-6)
    assert printed["step"] == 40


def test_eval_of_a_missing_step_lists_those_there_are(run, capsys):
    assert call("eval", f"--workdir={run}", "--step=3") == 2
    assert "no step 3; it has" in capsys.readouterr().err


def test_predict_folder_npz_and_dicom(run, tmp_path, capsys):
    digits = Digits("test")
    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(digits.images[i]).save(images / f"{i}.png")
    (images / "notes.txt").write_text("no image")
    (images / "broken.png").write_bytes(b"broken")
    np.savez(tmp_path / "digits.npz", images=digits.images[:5], labels=digits.labels[:5])
    rows = {}
    for name in ("images", "digits.npz"):
        out = tmp_path / f"{name}.csv"
        assert call("predict", f"--checkpoint={run}", f"--images={tmp_path / name}",
                    f"--out={out}", "--batch-size=2") == 0  # fmt: skip
        rows[name] = list(csv.DictReader(out.open()))
    assert "broken.png" in capsys.readouterr().err
    assert [r["image"] for r in rows["digits.npz"]] == [f"images[{i}]" for i in range(5)]
    assert rows["images"][0]["image"].endswith("deep/0.png")
    for a, b in zip(rows["images"], rows["digits.npz"], strict=True):
        assert a["prediction"] == b["prediction"]
        assert sum(float(a[f"p_{c}"]) for c in range(10)) == pytest.approx(1, abs=1e-4)
        assert float(a["probability"]) == max(float(a[f"p_{c}"]) for c in range(10))
    vit = vitjax.load(str(run))
    top = np.asarray(vit.logits(digits.images[:5, ..., None])).argmax(-1)
    assert [int(r["prediction"]) for r in rows["images"]] == top.tolist()

    pytest.importorskip("pydicom", reason="needs pydicom")
    from pydicom.data import get_testdata_file

    dicom = get_testdata_file("CT_small.dcm")
    out = tmp_path / "dicom.csv"
    assert call("predict", f"--checkpoint={run}", f"--images={dicom}", f"--out={out}") == 0
    assert len(list(csv.DictReader(out.open()))) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("empty", "holds no images"), ("a.txt", "is no image"), ("bad.npz", "as npz"),
     ("bad.png", "as an image"), ("keys.npz", "one array of images")],
)  # fmt: skip
def test_predict_refuses_what_it_cannot_read(run, tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    for file in ("a.txt", "bad.npz", "bad.png"):
        (tmp_path / file).write_bytes(b"something")
    np.savez(tmp_path / "keys.npz", x=np.zeros(3))
    out = tmp_path / "out.csv"
    argv = ("predict", f"--checkpoint={run}", f"--images={tmp_path / name}", f"--out={out}")
    assert call(*argv) == 2
    assert words in capsys.readouterr().err
    assert not out.exists() and not out.with_name("out.csv.tmp").exists()


def test_load_gives_features_tokens_logits_and_facts(run):
    vit = vitjax.load(str(run))
    images = Digits("test").images[:6, ..., None]
    assert vit.embed(images).shape == (6, 32)
    assert vit.tokens(images).shape == (6, 16, 32)
    assert vit.logits(images).shape == (6, 10)
    assert vit.num_params == sum(x.size for x in jax.tree.leaves(vit.params))
    assert vit.config["width"] == 32 and vit.class_names == tuple("0123456789")
    p = vit.preprocess
    ready = (images / np.float32(255) - p.mean[0]) / p.std[0]
    np.testing.assert_allclose(
        vit.embed(ready.astype(np.float32), preprocessed=True), vit.embed(images), atol=1e-4
    )
    larger = np.asarray(images).repeat(4, 1).repeat(4, 2)
    assert vit.embed(larger).shape == (6, 32)


def test_load_takes_a_run_a_step_and_a_saved_folder(run, tmp_path):
    images = Digits("test").images[:3, ..., None]
    vit = vitjax.load(run)
    vit.save(tmp_path / "saved")
    for place in (run / "checkpoints" / "40", tmp_path / "saved"):
        np.testing.assert_array_equal(vitjax.load(place).logits(images), vit.logits(images))
    with pytest.raises(InputError, match="not empty"):
        vit.save(tmp_path / "saved")
    with pytest.raises(InputError, match="unknown format 'pickle'"):
        vit.save(tmp_path / "other", format="pickle")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"must be \[B, Y, X, 1\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"must be \[B, Y, X, 1\]"),
        (np.zeros((2, 8, 8, 1), np.float32), "preprocessed=True"),
    ],
)
def test_wrong_arrays_are_refused(run, images, words):
    with pytest.raises(InputError, match=words):
        vitjax.load(run).embed(images)


def test_loading_nothing_says_so(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint, file or folder"):
        vitjax.load(tmp_path / "none")
    with pytest.raises(InputError, match="no finished step"):
        vitjax.load(tmp_path)
    (tmp_path / "7").mkdir()  # an empty step folder is no step
    with pytest.raises(InputError, match="no finished step"):
        steps.find_step(tmp_path)


def test_cifar_from_a_zip_through_the_shipped_config(test_data, tmp_path, make_config):
    """Real JPEG files, a part of the archive, two steps on the data path of the shipped config."""
    source = test_data / "images" / "cifar10_jpeg.zip"
    part = tmp_path / "part.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(part, "w") as file:
        names = [n for n in whole.namelist() if n.endswith(".jpg")]
        for name in names[::600]:
            file.writestr(name, whole.read(name))
    argv = [
        f"data.root={part}", "batch_size=16", "total_steps=2", "evals.test.batch_size=16",
        "optimizer.schedule.warmup_steps=1", "model.width=32", "model.depth=1",
        "model.mlp_dim=32", "model.num_heads=1",
    ]  # fmt: skip
    status = call("train", "--config=cifar10", f"--workdir={tmp_path / 'run'}",
                  *[f"--config.{a}" for a in argv])  # fmt: skip
    assert status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/test/examples"] >= 10
