"""Sweeps: what a plan promises, what it refuses, and the sources that sweeps add."""

import csv
import gzip
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from vitjax import cli, experiment
from vitjax import config as config_lib
from vitjax.data.sources.arrays import Digits
from vitjax.data.sources.idx import Idx, read_idx
from vitjax.data.sources.noise import NoisyLabels, noise_floor
from vitjax.data.sources.subset import Subset
from vitjax.errors import InputError
from vitjax.models.shapes import Geometry, Shape, count_flops, count_params
from vitjax.sweep.cells import branch_steps, training_config
from vitjax.sweep.config import arm, load_sweep
from vitjax.sweep.plan import make_plan
from vitjax.sweep.shapes import nearest_heads
from vitjax.sweep.table import read_plan, write_plan

SHIPPED = sorted(p.stem for p in (config_lib.config_folder() / "scaling").glob("*.py"))
DIGITS = {"target": "vitjax.data.sources.arrays:Digits", "split": "train"}


def plan_of(*assignments, **arms):
    sweep = load_sweep("scaling/digits", assignments)
    with sweep.unlocked():
        sweep.arms.update(arms)
    return make_plan(sweep)


@pytest.fixture(scope="module")
def plan():
    """The digits' sweep with every kind of run."""
    return plan_of(
        "lr.check_factors=(0.5, 1.0, 2.0)", "lr.check_params=(4000.0,)",
        "star.centre=(16, 2, 48)", "star.widths=(8, 24)", "star.depths=(4,)",
        "star.mlp_dims=(96,)", "star.images=(3200, 9600)", "seeds.every=(0, 1)", "seeds.extra=(2,)",
        "data.params=4000.0", "data.images=(960, 1400)", "data.repeats=(2.0, 4.0)",
        noise=arm(label_noise=0.3, sizes=3, config=("optimizer.weight_decay=0.0",)),
    )  # fmt: skip


def test_flops_are_the_model_s_own_and_match_the_budget(plan):
    """Against the count of shapes.py, and within half a step of the budget."""
    for cell in plan.cells:
        shape = Shape(cell.width, cell.depth, cell.mlp_dim, cell.num_heads)
        g = Geometry(shape, 2, 8, 1, 10, "gap", "learned", True, True, False, False)
        assert cell.flops_per_image == count_flops(g)
        parts = count_params(g)
        assert (cell.num_params, cell.num_body_params) == (sum(parts.values()), parts["blocks"])
        assert cell.flops == 3 * cell.flops_per_image * cell.steps * cell.batch_size
        assert cell.images == cell.steps * cell.batch_size
        if cell.budget:
            assert abs(cell.flops - cell.budget) <= cell.flops / cell.steps / 2 * (1 + 1e-9)


def test_budgets_lie_apart_and_have_five_sizes_around_the_guess(plan):
    own = [c for c in plan.cells if c.kind == "isoflop" and c.arm == "main"]
    budgets = sorted({c.budget for c in own})
    assert all(high >= 3 * low for low, high in itertools.pairwise(budgets))
    for budget in budgets:
        for seed in (0, 1):
            sizes = [c.num_params for c in own if (c.budget, c.seed) == (budget, seed)]
            assert len(set(sizes)) == len(sizes) >= 5
            g = plan.sweep["isoflop"]["guess"]
            guess = g["params"] * (budget / g["flops"]) ** g["exponent"]
            assert min(sizes) < guess < max(sizes)


def test_holdout_is_beyond_the_fit_and_shares_nothing_with_it(plan):
    held = [c for c in plan.cells if c.stage == "holdout"]
    fit = [c for c in plan.cells if c.stage == "fit"]
    assert held and all(c.kind == "holdout" for c in held)
    assert min(c.budget for c in held) >= 4 * max(c.budget or 0 for c in fit)
    assert not {c.trunk for c in held} & {c.trunk for c in fit}
    assert not {c.group for c in held} & {c.group for c in fit}


def test_trunks_are_the_longest_and_branches_start_before_any_cooldown(plan):
    assert len({c.id for c in plan.cells}) == len(plan.cells)
    assert [c.number for c in plan.cells] == list(range(1, len(plan.cells) + 1))
    assert any(c.is_branch for c in plan.cells)
    for cell in plan.cells:
        trunk = plan.cell(cell.trunk)
        assert not trunk.is_branch and trunk.group == cell.group
        assert cell.steps - cell.cooldown_steps >= cell.warmup_steps
        if not cell.is_branch:
            assert (cell.flops_paid, cell.branch_step) == (cell.flops, 0)
            continue
        assert cell.branch_step == cell.steps - cell.cooldown_steps
        assert cell.branch_step <= trunk.steps - trunk.cooldown_steps
        assert cell.branch_step in branch_steps(list(plan.cells), trunk)
        assert cell.flops_paid == cell.flops * cell.cooldown_steps / cell.steps
        same = ("width", "depth", "mlp_dim", "batch_size", "learning_rate", "seed", "arm",
                "warmup_steps", "stage")  # fmt: skip
        assert all(getattr(cell, name) == getattr(trunk, name) for name in same)
    t = plan.totals
    assert t["flops_saved"] == pytest.approx(sum(c.flops - c.flops_paid for c in plan.cells))
    assert t["flops_saved"] > 0


def test_every_question_has_its_runs(plan):
    kinds = {k: [c for c in plan.cells if c.kind == k] for k in ("seed", "star", "data", "lr")}
    assert {c.seed for c in kinds["seed"]} == {2}
    shapes = {(c.width, c.depth, c.mlp_dim) for c in kinds["star"]}
    assert shapes == {(16, 2, 48), (8, 2, 48), (24, 2, 48), (16, 4, 48), (16, 2, 96)}
    assert {c.images for c in kinds["star"]} == {3200, 9600}
    sizes = [c for c in kinds["data"] if c.epochs <= 1]
    repeats = [c for c in kinds["data"] if c.epochs > 1]
    assert [c.images for c in sizes] == [960, 1408] and len({c.trunk for c in sizes}) == 1
    assert [(c.unique_images, round(c.epochs)) for c in repeats] == [(700, 2), (350, 4)]
    rates = sorted(c.learning_rate for c in kinds["lr"])
    assert rates[1] == pytest.approx(
        4 * rates[0], rel=1e-4
    )  # the factor 1 is one of the isoFLOP runs
    noisy = [c for c in plan.cells if c.arm == "noise"]
    assert len(noisy) == 3 * 4 and all(c.label_noise == 0.3 for c in noisy)


def test_cells_become_training_configs_that_build(plan):
    repeated = next(c for c in plan.cells if c.kind == "data" and c.epochs > 1)
    noisy = next(c for c in plan.cells if c.arm == "noise")
    trunk = next(c for c in plan.cells if any(b.trunk == c.id != b.id for b in plan.cells))
    for cell in (repeated, noisy, trunk):
        steps = branch_steps(list(plan.cells), cell)
        config = training_config(plan.sweep, cell, steps)
        assert (config.seed, config.total_steps) == (cell.seed, cell.steps)
        assert config.checkpoint.at_steps == steps
        assert config.mesh.fsdp == -1
        model = experiment.make_model(
            config.model, experiment.make_preprocess(config), experiment.precision_lib.Precision()
        )
        assert model.num_params == cell.num_params
    assert training_config(plan.sweep, trunk, (3,)).checkpoint.at_steps == (3,)
    source = config_lib.build(training_config(plan.sweep, repeated).data.source)
    assert len(source) == repeated.unique_images
    config = training_config(plan.sweep, noisy)
    assert config.optimizer.weight_decay == 0.0
    for block in (config.data.source, config.evals.test.source):
        assert block.target.endswith(":NoisyLabels") and block.fraction == 0.3


def test_a_budget_in_hours_is_converted_and_spent(tmp_path):
    plan = plan_of(
        "isoflop.budgets=None", "isoflop.count=3", "budget.hours=0.5",
        "budget.flops_per_second=1e9", "budget.target=cpu:2",
    )  # fmt: skip
    assert 0.95 * 1.8e12 < plan.totals["flops_paid"] <= 1.8e12
    assert "0.5 hours on cpu:2 x 1e+09 FLOP/s as measured = 1.8e+12" in plan.notes[0]
    budgets = sorted({c.budget for c in plan.cells if c.kind == "isoflop"})
    assert len(budgets) == 3 and budgets[-1] == pytest.approx(16 * budgets[0])


def test_the_plan_says_when_the_holdout_does_not_fit_its_share():
    notes = "\n".join(plan_of("holdout.share=0.2", "holdout.factors=(4.0, 10.0)").notes)
    assert "more than holdout.share=20%" in notes and "at 4x, 10x" in notes
    assert "repeat data" in notes and "epochs" in notes


BAD = [
    (["budget.flops=1e6", "isoflop.budgets=None"], r"1e\+06 training FLOPs is too small.*smallest"),
    (["isoflop.budgets=(1e5,)"], r"1e\+05 training FLOPs is below the smallest legal run, .*630"),
    (["isoflop.budgets=(1e9, 2e9)"], "at least 3, got 1e.09 and 2e.09"),
    (["isoflop.ratio=2.5"], "ratio must be at least 3, got 2.5"),
    (["isoflop.sizes=4"], "sizes must be at least 5, got 4"),
    (["isoflop.sizs=6"], "did you mean 'sizes'"),
    (["holdout.factors=(2.0,)"], "must each be at least 3"),
    (["budget.flops=1e9"], "more than the whole budget of 1e.09"),
    (["budget.flops=1e12", "budget.hours=1"], "not both"),
    (["budget.hours=1"], "needs budget.flops_per_second"),
    (["num_images=0"], "num_images must be"),
    (["isoflop.budgets=()"], "the sweep has no runs"),
    (["isoflop.max_epochs=0.01"], "can train 0 of the|at most 0.01 epochs"),
    (["trunks.cooldown_fraction=1.5"], "cooldown_fraction must be in"),
    (["data.images=(5000,)", "data.params=4000.0"], "5000 is more than num_images=1437"),
    (["star.centre=(16, 2, 48)"], "needs star.images"),
    (["shapes.widths=(5, 3)"], "allow no shape"),
    (["train.model.patch_size=3"], "not divisible by patch size 3"),
    (["isoflop=3"], r"--sweep\.isoflop is a block"),
]


@pytest.mark.parametrize(("assignments", "words"), BAD, ids=[b[0][0] for b in BAD])
def test_a_sweep_that_cannot_work_is_refused_with_what_can(assignments, words):
    with pytest.raises(InputError, match=words):
        plan_of(*assignments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": ("optimizer.peak_lr=1.0",)}, "sets optimizer.peak_lr, which the sweep sets"),
        ({"config": ("optimizer.weight_deca=1.0",)}, "did you mean 'weight_decay'"),
        ({"label_noise": 2.0}, "label_noise must be in"),
        ({"lr_factor": 0.0}, "lr_factor must be positive"),
        ({"nose": 1}, "did you mean"),
    ],
)
def test_a_wrong_arm_is_explained(changes, words):
    with pytest.raises(InputError, match=words):
        plan_of(noise=arm(**changes))


def test_heads_divide_the_width():
    for width in range(4, 200, 4):
        heads = nearest_heads(width, 16)
        assert width % heads == 0
    assert [nearest_heads(w, 64) for w in (64, 768, 1024, 608, 4)] == [1, 12, 16, 8, 1]


def test_a_plan_is_read_back_and_another_may_not_take_its_place(plan, tmp_path):
    write_plan(tmp_path, plan)
    again = read_plan(tmp_path)
    assert again.cells == plan.cells
    assert again.totals == plan.totals
    rows = list(csv.DictReader((tmp_path / "plan.csv").open()))
    assert [row["id"] for row in rows] == [cell.id for cell in plan.cells]
    write_plan(tmp_path, plan_of())  # nothing has run yet
    (tmp_path / "cells").mkdir()
    write_plan(tmp_path, plan_of())
    with pytest.raises(
        InputError, match=r"holds another plan[\s\S]*lr\.peak: 0.01 there, 1.0 here"
    ):
        write_plan(tmp_path, plan_of("lr.peak=1.0"))
    with pytest.raises(InputError, match="holds no plan"):
        read_plan(tmp_path / "cells")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_sweep_says_where_it_runs_and_what_to_expect(name, root):
    path = root / "configs" / "scaling" / f"{name}.py"
    text = path.read_text()
    for word in (f"vitjax sweep plan --config=scaling/{name}", "Runs on:", "Expected:", "un by us"):
        assert word in text, word
    with pytest.raises(InputError, match=r"has no function get_config\(\)"):
        config_lib.load_config(f"scaling/{name}")


def test_sweeps_that_ship():
    assert {"digits", "fashion", "i1k_isoflop", "i21k_sovit", "jft_like"} <= set(SHIPPED)


@pytest.mark.parametrize("name", ["fashion", "jft_like"])
def test_shipped_sweeps_plan(name):
    plan = make_plan(load_sweep(f"scaling/{name}"))
    assert plan.totals["holdout_cells"] >= 1
    assert plan.totals["fit_cells"] >= 20


def plan_for(target, name, workdir, *words):
    """Plans in a process of its own: a plan for other devices must come before JAX starts."""
    command = [sys.executable, "-m", "vitjax", "sweep", "plan", f"--config=scaling/{name}",
               f"--workdir={workdir}", f"--target={target}", *words]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"hours of {target} in all" in done.stdout
    return read_plan(workdir).cells


def test_a_pod_sized_sweep_has_memory_and_hours_for_every_cell(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="needs vitjax[plan]")
    cells = plan_for("gpu:h100:1x1x8", "i1k_isoflop", tmp_path, "--check-memory")
    assert all(c.memory_gib and c.hours and c.fits for c in cells)
    largest = max(cells, key=lambda c: c.num_params)
    assert largest.memory_gib > 2**-30 * 16 * largest.num_params / 8  # the state alone, sharded
    per_flop = [c.hours / c.flops_paid for c in cells]
    assert max(per_flop) < 10 * min(per_flop)


def test_cpu_targets_have_no_speed_but_the_measured_one(tmp_path):
    cells = plan_for("cpu:2", "digits", tmp_path, "--sweep.budget.flops_per_second=1e9")
    assert all(c.hours == pytest.approx(c.flops_paid / 1e9 / 3600, rel=1e-3) for c in cells)
    assert all(c.fits is None and c.memory_gib for c in cells)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pln"], "did you mean 'plan'"),
        (["plan", "--config=scaling/digts", "--workdir=x"], "did you mean 'scaling/digits'"),
        (["plan", "--config=quickstart", "--workdir=x"], r"has no function get_sweep()"),
        (["plan", "--config=scaling/digits", "--workdir=x", "--compile"], "needs --target"),
        (["plan", "--config=scaling/digits", "--workdir=x", "--target=gpu:h100:8"], "SLICES"),
        (["run", "--workdir=x"], "holds no plan.json"),
        (["collect", "--workdir=x"], "holds no plan.json"),
        (["run", "--workdir=x", "--sweep.num_images=3"], "needs --config"),
        (["run", "--workdir=x", "--cells=1", "--group=1"], "not both"),
    ],
)
def test_wrong_commands_exit_with_2_and_one_message(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *argv]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["", "plan", "run", "collect"])
def test_every_action_shows_an_example(action, capsys):
    try:
        status = cli.main(["sweep", *([action] if action else []), "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0
    assert f"example: vitjax sweep {action or 'plan'}" in capsys.readouterr().out


def test_subsets_are_fixed_nested_and_checked():
    small, large = (Subset(DIGITS, n) for n in (50, 400))
    whole = Digits("train")
    assert len(small) == 50 and set(small.rows) < set(large.rows)
    assert small[3]["id"] == whole[int(small.rows[3])]["id"]
    assert small.num_classes == 10
    assert (Subset(DIGITS, 50).rows == small.rows).all()
    assert (Subset(DIGITS, 50, seed=1).rows != small.rows).any()
    for bad in (0, 1438):
        with pytest.raises(InputError, match="1 to 1437"):
            Subset(DIGITS, bad)


def test_noise_is_a_fixed_share_and_its_entropy_is_the_floor():
    noisy, clean = NoisyLabels(DIGITS, 0.4), Digits("train")
    labels = np.array([noisy[i]["label"] for i in range(len(noisy))])
    wrong = (labels != clean.labels).mean()
    assert wrong == pytest.approx(0.4 * 0.9, abs=0.04)
    again = NoisyLabels(DIGITS, 0.4)
    assert all(again[i]["label"] == labels[i] for i in range(100))
    other = NoisyLabels(DIGITS, 0.4, seed=1)
    assert any(noisy[i]["label"] != other[i]["label"] for i in range(100))
    # A longer source begins with the same noise.
    part = NoisyLabels({"target": "vitjax.data.sources.subset:Subset", "source": DIGITS,
                        "num_examples": 1437}, 0.4)  # fmt: skip
    assert [part[i]["label"] for i in range(50)] == labels[:50].tolist()
    assert all(NoisyLabels(DIGITS, 0.0)[i]["label"] == clean.labels[i] for i in range(50))
    # The floor against the cross entropy of the best prediction, by simulation.
    draws = np.random.default_rng(0).random(200_000)
    right = 1 - 0.4 + 0.04
    simulated = -np.where(draws < right, np.log(right), np.log(0.04)).mean()
    assert noise_floor(0.4, 10) == pytest.approx(simulated, rel=0.01)
    assert noise_floor(0.0, 10) == 0 and noise_floor(1.0, 10) == pytest.approx(np.log(10))
    for bad in (-0.1, 1.1):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            NoisyLabels(DIGITS, bad)
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            noise_floor(bad, 10)


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def test_idx_files_are_read_plain_and_packed(tmp_path):
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    labels = np.array([1, 0], np.uint8)
    (tmp_path / "images").write_bytes(idx_bytes(images))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    source = Idx("images", "labels.gz", root=str(tmp_path), class_names=("a", "b"))
    assert (len(source), source.num_classes, source.class_names) == (2, 2, ("a", "b"))
    np.testing.assert_array_equal(source[1]["image"], images[1])
    assert [source[i]["label"] for i in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "magic number"),
        (b"PK\x03\x04", "magic number is 0x504b0304, it must be 0x00000803"),
        (idx_bytes(np.zeros(4, np.uint8)), "it must be 0x00000803"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1], r"2 x 3 x 3 values, the file holds 17"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"x", "the file holds 19"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header"),
        (gzip.compress(b"x" * 100, mtime=0)[:-9], "cannot unpack"),
    ],
)
def test_broken_idx_files_are_refused(content, words, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_idx(tmp_path / "x", 3)


def test_missing_idx_files_are_named():
    with pytest.raises(InputError, match="no such idx file"):
        Idx("nowhere", "nowhere")
    with pytest.raises(InputError, match="the path is empty"):
        read_idx("", 3)
