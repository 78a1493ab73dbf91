"""Every command of the guides runs, shrunk, in a folder with what the guides speak of."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import environment
import numpy as np
import pytest
from conftest import use_one_device
from PIL import Image
from test_scaling_report import record

from vitjax import cli
from vitjax.config import load_config
from vitjax.sweep.table import read_plan

SHRINK = [
    "--config.total_steps=2", "--config.batch_size=8", "--config.optimizer.schedule.warmup_steps=1",
    "--config.model.width=16", "--config.model.depth=1", "--config.model.mlp_dim=16",
    "--config.model.num_heads=1", "--config.eval_every=0", "--config.checkpoint_every=0",
]  # fmt: skip

# Few sizes, steps and recipes, so that a cell takes seconds.
SHRINK_SWEEP = [
    "--sweep.isoflop.budgets=(3e8,9e8,2.7e9,8.1e9)", "--sweep.seeds.extra=()",
    "--sweep.trunks.warmup_images=32",
]  # fmt: skip

SHRINK_TRANSFER = [
    "--config.presets=('linear','full')", "--config.floors=('majority',)",
    "--config.seeds=(0,)", "--config.train.min_steps=2", "--config.train.max_steps=2",
    "--config.train.batch_size=8", "--config.report.num_bootstraps=20",
    "--config.robustness=False", "--config.low_data.labelled=()",
]  # fmt: skip

SHRINK_PLAN = [
    "--config.model.depth=2", "--config.model.width=512", "--config.model.mlp_dim=1024",
    "--config.model.num_heads=16", "--best=1",
]  # fmt: skip

MY_CONFIG = """
from vitjax.config import load_config

def get_config():
    return load_config("quickstart")
"""


def commands(root):
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.M | re.S)
        for block in (text for language, text in blocks if not language):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("vitjax ") and "..." not in line:
                    yield path.name, line


def make_images(folder, classes, size):
    for split in ("train", "test"):
        for index, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i + index).integers(0, 256, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")


def run_sweep(argv):
    """`vitjax sweep run`: one cell is trained, the others are recorded with losses of a law."""
    workdir = next(Path(a.partition("=")[2]) for a in argv if a.startswith("--workdir="))
    stage = "holdout" if "--stage=holdout" in argv else "fit"
    plan = read_plan(workdir)
    cheapest = min((c for c in plan.cells if c.stage == stage and not c.is_branch),
                   key=lambda c: c.flops)  # fmt: skip
    status = cli.main([*argv, f"--cells={cheapest.number}"])
    record(workdir, plan, stage)
    return status


def make_weights(native):
    """The files that docs/weights.md speaks of, small."""
    torch_like = {"activation": "gelu", "pool": "cls"}
    native(channels=3).save("vit-classifier", format="hf")
    dino = torch_like | {"layer_scale": 1.0, "mask_token": True, "mlp_dim": 64, "num_classes": 0}
    native(**dino).save("dinov2-base", format="hf")
    native(pool="cls").save("ViT-B_16.npz", format="npz")
    Path("ViT-B_16.json").unlink()
    native(**torch_like).save("timm", format="timm")
    shutil.copy("timm/model.safetensors", "bare.safetensors")


def make_medical(folder):
    """The files that docs/medical.md speaks of, small."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        labels = np.arange(count) % 2
        arrays[f"{split}_images"] = rng.integers(0, 200, (count, 28, 28)).astype(np.uint8)
        arrays[f"{split}_images"][labels == 1] //= 2
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    for name in ("breastmnist", "pneumoniamnist"):
        np.savez(folder / f"{name}.npz", **arrays)
    lines = ["path,label,patient_id,sex"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (30, 30), np.uint8)).save(folder / f"scan{i}.png")
        lines.append(f"scan{i}.png,{'ill' if i % 4 < 2 else 'well'},p{i // 2},{'FM'[i // 2 % 2]}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")


def test_every_command_of_the_guides_runs(root, tmp_path, monkeypatch, capsys, native):
    monkeypatch.chdir(tmp_path)
    use_one_device(monkeypatch)
    for name, value in environment.of_a_process().items():  # of the workers of sweeps
        monkeypatch.setenv(name, value)
    make_images(tmp_path / "birds", ("robin", "wren"), 40)
    make_images(tmp_path / "cifar10", [f"class{i}" for i in range(10)], 32)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "my_config.py").write_text(MY_CONFIG)
    make_weights(native)
    make_medical(tmp_path)
    found = list(commands(root))
    assert len(found) >= 5
    plans = []
    row = "{0},{1},{2},{3},fit\n"
    lines = [row.format(n * 500 * d, n, d, 1 + 20 / n**0.4 + 9 / d**0.3)
             for n in (1e3, 1e4, 1e5) for d in (1e4, 1e5, 1e6)]  # fmt: skip
    (tmp_path / "runs.csv").write_text(
        "flops,num_params,images,eval/test/loss,stage\n" + "".join(lines)
    )
    for name, line in found:
        line = line.replace("cifar10.zip", "cifar10").replace("cifar10_jpeg.zip", "cifar10")
        argv = shlex.split(line)[1:]
        if argv[:2] == ["sweep", "run"]:
            assert run_sweep(argv) == 0, f"{name}: {line}"
            continue
        if argv[:2] == ["sweep", "plan"]:
            argv += SHRINK_SWEEP
        if argv[0] == "plan":  # its compiler's settings are for a whole process
            plans.append((name, argv))
            continue
        if "--format=onnx" in argv and importlib.util.find_spec("onnx") is None:
            pytest.skip("the guides' exports need vitjax[onnx]")
        shrunk = [*argv, *SHRINK] if argv[0] == "train" else argv
        if any(word.startswith("--profile") for word in argv):
            shrunk = [*shrunk, "--config.total_steps=10"]  # five pass before its trace begins
        if argv[:2] in (["scaling", "report"], ["scaling", "freeze"], ["scaling", "fit"]):
            shrunk = [*argv, "--resamples=50"]
        if argv[0] == "transfer" and argv[1] != "collect":
            shrunk = [*argv, *SHRINK_TRANSFER]
        assert cli.main(shrunk) == 0, f"{name}: {line}\n{capsys.readouterr().err}"

    for name, argv in plans:
        if "tpu:" in shlex.join(argv) and importlib.util.find_spec("libtpu") is None:
            pytest.skip("the guides' plans need vitjax[plan]")
        shrunk = [sys.executable, "-m", "vitjax", *argv, *SHRINK_PLAN]
        if "--search" in argv:  # a third of the ways, since one head lies on one device
            shrunk.append("--config.model.num_heads=1")
        as_users = environment.of_a_process(flags="")
        done = subprocess.run(shrunk, capture_output=True, text=True, env=as_users)
        assert done.returncode == 0, f"{name}: {argv}\n{done.stderr}"


def test_every_promise_names_a_test_that_there_is(root):
    text = (root / "docs" / "reliability.md").read_text()
    promised = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(promised) > 20
    for path, name in promised:
        assert f"def {name}(" in (root / path).read_text(), f"{path}::{name}"
    keys = re.findall(r"`((?:checkpoint|faults|monitor)\.\w+)", text)
    config = load_config("quickstart")
    for key in keys:
        block, _, name = key.partition(".")
        assert name in config[block], key


def test_the_readme_s_commands_are_those_of_ci(root):
    text = (root / "README.md").read_text()
    for mark in ("<!-- main job -->", "<!-- tests -->"):
        block = re.search(re.escape(mark) + r"\n```\n(.*?)\n```", text, re.S)
        assert block and "\n" not in block[1], "one line to paste"
    assert "<!-- tests -->" in (root / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/own_data.md",
        "docs/data.md",
        "docs/scale.md",
        "docs/plans.md",
        "docs/scaling.md",
        "docs/scaling_reproductions.md",
        "docs/weights.md",
        "docs/reliability.md",
        "docs/launch.md",
        "docs/medical.md",
        "docs/explain.md",
        "docs/objectives.md",
        "docs/evaluation.md",
        "docs/image_text.md",
    ],
)
def test_links_lead_somewhere(root, name):
    path = root / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target
