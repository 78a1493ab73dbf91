"""Data in whole runs: what the loader meets, and what a user then sees."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import use_one_device
from PIL import Image
from test_prepare import BAD, messy

from vitjax import cli
from vitjax import train as train_lib
from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.arrays import Digits
from vitjax.data.sources.folders import open_folder
from vitjax.data.transforms import RandomResizedCrop
from vitjax.errors import InputError
from vitjax.telemetry import read_metrics


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 grey files of 8 x 8 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(400):
        place = root / ("even", "odd")[i % 2]
        place.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.png")
    return root


def of_source(config, target, **arguments):
    with config.unlocked():
        config.data.source = {"target": target, **arguments}
    return config


def of_folder(config, root):
    return of_source(config, "vitjax.data.sources.folders:ImageFolder", root=str(root))


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def test_unreadable_images_stand_in_the_metrics_by_name_once(tmp_path, folder, make_config):
    shutil.copytree(folder, tmp_path / "data")
    bad = tmp_path / "data" / "odd" / "101.png"
    bad.write_bytes(bad.read_bytes()[:40])
    config = of_folder(
        make_config(total_steps=26, eval_every=0, checkpoint_every=0), bad.parent.parent
    )
    train_lib.train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    named = [row["data/unreadable_ids"] for row in rows if "data/unreadable_ids" in row]
    assert named == [[str(bad)]]  # met in both epochs
    assert rows[-1]["data/unreadable"] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train/loss"] > 0


def test_all_that_is_wrong_with_a_table_is_said_before_the_first_step(
    tmp_path, folder, make_config, capsys
):
    rows = [f"even/{i:03}.png,{i % 3}" for i in range(0, 90, 2)]
    rows += [f"gone/{i}.png,1" for i in range(30)]
    table = folder / "table.csv"
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    config = of_source(make_config(), "vitjax.data.sources.manifest:Manifest", path=str(table))
    with pytest.raises(InputError) as caught:
        train_lib.train(config, tmp_path / "run")
    text = str(caught.value)
    assert text.startswith("data.source has 30 problems") and "... and 10 more" in text
    assert "gone/0.png" in text and not list(tmp_path.glob("run/checkpoints/*"))


class Breaking(Digits):
    """Digits whose disk goes away in the middle of a run, if a file says so."""

    switch = Path("/nonexistent")

    def __getitem__(self, index):
        if index == 777 and self.switch.exists():
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_an_error_of_a_worker_ends_the_run_with_its_cause_and_the_run_goes_on_later(
    tmp_path, make_config, monkeypatch
):
    Breaking.switch = tmp_path / "broken"
    config = of_source(
        make_config(total_steps=90, eval_every=0, checkpoint_every=5, log_every=5),
        f"{__name__}:Breaking", split="train",
    )  # fmt: skip
    Breaking.switch.touch()
    with pytest.raises(OSError, match="the disk is gone"):
        train_lib.train(config, tmp_path / "run")
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert 0 < max(saved) < 90
    Breaking.switch.unlink()
    train_lib.train(config, tmp_path / "run")
    config.data.source.target = "vitjax.data.sources.arrays:Digits"
    train_lib.train(config, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_resume_with_other_threads_gives_the_same_bits(tmp_path, make_config):
    crop = {"target": "vitjax.data.transforms:RandomResizedCrop"}
    config = make_config(total_steps=8, eval_every=0, checkpoint_every=4)
    with config.unlocked():
        config.data.transforms = (crop,)
    fingerprints = []
    for threads in (0, 3):
        config.data.num_threads = threads
        train_lib.train(config, tmp_path / "run")
        step = tmp_path / "run" / "checkpoints" / "8"
        fingerprints.append(json.loads((step / "contract.json").read_text())["arrays"])
        shutil.rmtree(step)  # the next launch goes on from step 4
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("sampling", ["classes", "groups"])
def test_sampling_is_a_setting(tmp_path, make_config, sampling, capsys):
    argv = ["train", "--config=quickstart", f"--workdir={tmp_path / 'run'}",
            "--config.total_steps=2", "--config.log_every=1", "--config.eval_every=0",
            "--config.model.depth=1", "--config.optimizer.schedule.warmup_steps=1",
            "--config.mesh.fsdp=1", f"--config.data.sampling={sampling}"]  # fmt: skip
    status = cli.main(argv)
    if sampling == "classes":
        assert status == 0 and len(losses(tmp_path / "run")) == 2
    else:
        assert status == 2 and "Digits does not" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_cifar_is_prepared_and_trained_on_with_the_batches_of_its_zip(test_data, tmp_path):
    with zipfile.ZipFile(test_data / "images" / "cifar10_jpeg.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(("00.jpg", "50.jpg"))]
        with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as small:
            for name in names:
                small.writestr(name, archive.read(name))
    store = tmp_path / "store"
    assert cli.main(["data", "prepare", f"--source={tmp_path / 'cifar.zip'}", f"--out={store}",
                     "--split=train,test", "--workers=2"]) == 0  # fmt: skip
    crop = [RandomResizedCrop(32)]
    batches = []
    for place in (tmp_path / "cifar.zip", store):
        loader = Loader(open_folder(str(place), "train"), Preprocess(32), transforms=crop)
        batches.append(loader.train_batch(3, 64, seed=0))
    np.testing.assert_array_equal(batches[0]["images"], batches[1]["images"])
    np.testing.assert_array_equal(batches[0]["labels"], batches[1]["labels"])
    argv = ["train", "--config=cifar10", f"--workdir={tmp_path / 'run'}", "--config.total_steps=2",
            f"--config.data.root={store}", "--config.batch_size=16", "--config.log_every=1",
            "--config.model.width=32", "--config.model.depth=1", "--config.model.mlp_dim=32",
            "--config.model.num_heads=1", "--config.optimizer.schedule.warmup_steps=1",
            "--config.mesh.fsdp=1", "--config.eval_every=0"]  # fmt: skip
    assert cli.main(argv) == 0
    assert read_metrics(tmp_path / "run")[-1]["eval/test/examples"] == len(
        [n for n in names if n.startswith("test/")]
    )


@pytest.mark.parametrize("name", ["chest_xray", "ct"])
def test_a_policy_is_one_line_of_a_config(tmp_path, make_config, name):
    config = make_config(total_steps=2, eval_every=0, checkpoint_every=0)
    with config.unlocked():
        config.augment = ({"target": "vitjax.data.policies:Policy", "name": name},)
    train_lib.train(config, tmp_path / "run")
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_a_messy_folder_is_trained_on_as_it_is(tmp_path, make_config):
    """Every kind of file that folders collect, each as docs/data.md says."""
    messy(tmp_path / "birds")
    config = make_config(total_steps=4, eval_every=0, checkpoint_every=0)
    of_source(
        config, "vitjax.data.sources.folders:open_folder", path=str(tmp_path / "birds"),
        split="train",
    )  # fmt: skip
    with config.unlocked():
        crop = {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.3}
        config.data.transforms = (crop,)
    config.data.max_unreadable_fraction = 0.3
    train_lib.train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    named = {Path(n).name for row in rows for n in row.get("data/unreadable_ids", [])}
    assert named == {Path(name).name for name in BAD}
    assert np.isfinite(losses(tmp_path / "run")).all()
    config.data.max_unreadable_fraction = 0.01
    with pytest.raises(InputError, match=r"[23] of 15 examples read are unreadable"):
        train_lib.train(config, tmp_path / "strict")
