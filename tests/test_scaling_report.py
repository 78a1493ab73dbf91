"""From a sweep's record to its report, on planted laws; the command line; what is refused."""

import json

import numpy as np
import pytest

from vitjax import cli
from vitjax.errors import InputError
from vitjax.scaling import freeze as freezing
from vitjax.scaling import sweep_fits
from vitjax.scaling.checklist import checklist
from vitjax.scaling.law_check import check_law
from vitjax.scaling.table import read_table, unit_factor
from vitjax.sweep.config import arm, load_sweep
from vitjax.sweep.plan import make_plan
from vitjax.sweep.table import append_runs, columns_of, write_plan

METRIC = "eval/test/loss"
LAW = {"E": 0.3, "A": 30.0, "B": 200.0, "alpha": 0.5, "beta": 0.6}


def planted(cell, generator, noise=0.01):
    """A loss of E + A/N^alpha + B/D^beta; label noise raises the floor to its own."""
    floor = 1.3 if cell.arm == "noise" else LAW["E"]
    # A recipe that is better for small runs and worse for large ones.
    exponent = LAW["alpha"] - (0.1 if cell.arm == "decayed" else 0.0)
    size = LAW["A"] * cell.num_params**-exponent * (0.36 if cell.arm == "decayed" else 1.0)
    loss = floor + size
    loss += LAW["B"] * cell.images ** -LAW["beta"]
    return float(loss * np.exp(noise * generator.standard_normal()))


def record(workdir, plan, stage, loss=planted, seed=0):
    """Rows as `vitjax sweep collect` writes them, of a law instead of trainings."""
    generator = np.random.default_rng(seed)
    rows = []
    for cell in plan.cells:
        if cell.stage != stage:
            continue
        value = loss(cell, generator)
        row = {name: getattr(cell, name) for name in columns_of(plan) if hasattr(cell, name)}
        row |= {"cell": cell.id, "attempt": 1, "status": "done", "reason": "", "wall_seconds": 1.0}
        row |= {"git_commit": "0" * 40, "vitjax_version": "0", "device_kind": "cpu"}
        row |= {METRIC: value, f"{METRIC}:n": 360, "eval/test/accuracy": 1 - 0.3 * value}
        rows.append(row | {"eval/test/accuracy:n": 360, "budget": cell.budget})
    append_runs(workdir / "runs.csv", columns_of(plan), rows)


def make_sweep(workdir, *assignments):
    sweep = load_sweep(
        "scaling/digits",
        (
            "isoflop.budgets=(3e9, 1e10, 3e10, 1e11)", "isoflop.sizes=6", "isoflop.spread=5.0",
            "isoflop.max_epochs=None", "shapes.widths=(8, 128)", "seeds.extra=(1,)",
            "holdout.seeds=(0, 1)", "holdout.share=0.9", *assignments,
        ),
    )  # fmt: skip
    with sweep.unlocked():
        sweep.arms.update(noise=arm(label_noise=0.3))
        sweep.arms.update(decayed=arm(config=("optimizer.weight_decay=0.3",)))
    plan = make_plan(sweep)
    write_plan(workdir, plan)
    return plan


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A sweep that was planned, fitted, frozen, held out and reported."""
    workdir = tmp_path_factory.mktemp("report") / "sweep"
    plan = make_sweep(workdir)
    record(workdir, plan, "fit")
    assert cli.main(["scaling", "freeze", f"--workdir={workdir}", "--resamples=100"]) == 0
    before = (workdir / "frozen.json").read_bytes()
    record(workdir, plan, "holdout", seed=1)
    argv = ["scaling", "report", f"--workdir={workdir}", "--resamples=100", "--max-params=3000"]
    assert cli.main(argv) == 0
    assert (workdir / "frozen.json").read_bytes() == before
    return workdir, plan


def test_a_planted_law_is_frozen_held_and_reported(reported):
    workdir, plan = reported
    content = json.loads((workdir / "report" / "report.json").read_text())
    law = content["arms"]["main"]["law"]
    for name in ("E", "alpha", "beta"):  # A and B move with their exponents
        low, high = law["intervals"][name]
        assert low * 0.9 <= LAW[name] <= high * 1.1, name
    total = sum(len(o["measured"]) for o in content["hold_out"])
    assert total == sum(c.stage == "holdout" for c in plan.cells) >= 2
    assert sum(o["held"]["0.9"] for o in content["hold_out"]) >= total - 1
    for outcome in content["hold_out"]:
        assert abs(outcome["error"]) < abs(outcome["naive_errors"]["last_value"])
    assert content["verdict"].startswith("supported up to ")
    assert content["reach"] == pytest.approx(4, rel=0.02)
    assert content["seed_noise"] == pytest.approx(0.01, rel=0.8)


def test_a_report_has_its_pictures_and_every_answer(reported):
    workdir, _ = reported
    text = (workdir / "report" / "report.md").read_text()
    for name in ("isoflop.png", "frontier.png", "residuals.png"):
        picture = (workdir / "report" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
        assert f"({name})" in text
    content = json.loads((workdir / "report" / "report.json").read_text())
    assert all(content["checklist"].values()) and len(content["checklist"]) >= 12
    assert content["decisions"]["inference_limited"]["num_params"] == pytest.approx(3000)
    assert "| nan" not in text and "None" not in text


def test_a_known_floor_is_marked_right_or_wrong(reported):
    """Thirty percent of redrawn labels in ten classes cannot fall below 1.18 nats."""
    workdir, _ = reported
    content = json.loads((workdir / "report" / "report.json").read_text())
    answer = content["arms"]["noise"]  # its law
    side = json.loads((workdir / "report" / "report.json").read_text())["recipes"]["noise"]
    assert side["known_floor"] == pytest.approx(-0.73 * np.log(0.73) - 0.27 * np.log(0.03))
    low, high = answer["law"]["intervals"]["E"]
    assert side["is_right"] == (low <= side["known_floor"] <= high)


def test_two_recipes_cross_where_they_were_planted(reported):
    """0.36 N^0.1 is one at N = 27,000; along the frontier that is beyond the largest budget."""
    workdir, _ = reported
    recipes = json.loads((workdir / "report" / "report.json").read_text())["recipes"]
    met = recipes["decayed"]["crossing"]
    assert met["better_below"] == "b"
    assert "`decayed` against `main`" in (workdir / "report" / "report.md").read_text()


def test_hold_out_runs_never_enter_a_fit(reported):
    workdir, plan = reported
    sweep = sweep_fits.read_sweep(workdir)
    held = {c.id for c in plan.cells if c.stage == "holdout"}
    assert held and not held & {row["cell"] for row in sweep_fits.fit_arm(
        sweep, "main", resamples=0).rows}  # fmt: skip


def test_a_prediction_is_frozen_once_and_before(tmp_path):
    plan = make_sweep(tmp_path)
    record(tmp_path, plan, "fit")
    sweep = sweep_fits.read_sweep(tmp_path)
    fits = sweep_fits.fit_arm(sweep, "main", resamples=60)
    freezing.freeze(sweep, fits)
    with pytest.raises(InputError, match="not made again"):
        freezing.freeze(sweep, fits)
    record(tmp_path, plan, "holdout")
    (tmp_path / "frozen.json").unlink()
    with pytest.raises(InputError, match="would be no prediction"):
        freezing.freeze(sweep_fits.read_sweep(tmp_path), fits)


def test_a_prediction_of_other_runs_is_refused(tmp_path):
    plan = make_sweep(tmp_path)
    record(tmp_path, plan, "fit")
    sweep = sweep_fits.read_sweep(tmp_path)
    fits = sweep_fits.fit_arm(sweep, "main", resamples=60)
    frozen = freezing.freeze(sweep, fits)
    freezing.check_rows(sweep, fits, frozen)
    (tmp_path / "runs.csv").unlink()
    record(tmp_path, plan, "fit", seed=7)
    sweep = sweep_fits.read_sweep(tmp_path)
    again = sweep_fits.fit_arm(sweep, "main", resamples=0)
    with pytest.raises(InputError, match="no longer tests it"):
        freezing.check_rows(sweep, again, frozen)


def test_a_star_sweep_says_which_shape(tmp_path):
    """A loss with a best width of 2 C^0.1 and nothing in depth: the first is found."""
    assignments = (
        "isoflop.budgets=()", "star.centre=(16, 2, 48)", "star.widths=(8, 24, 32, 48)",
        "star.depths=(3, 4)", "star.mlp_dims=(32, 96)", "star.images=(3200, 12800, 51200)",
        "seeds.extra=()", "holdout.factors=(4.0,)", "holdout.share=0.9",
    )  # fmt: skip
    plan = make_plan(load_sweep("scaling/digits", assignments))
    write_plan(tmp_path, plan)

    def loss(cell, generator):
        best = 2 * cell.flops**0.1
        wide = (cell.width / best) ** 0.5 + (cell.width / best) ** -0.5
        noise = np.exp(0.002 * generator.standard_normal())
        return float((0.2 + 20 * cell.flops**-0.25 * wide) * noise)

    record(tmp_path, plan, "fit", loss=loss)
    argv = ["scaling", "report", f"--workdir={tmp_path}", "--resamples=60", "--budget=1e10"]
    assert cli.main(argv) == 0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    best = content["shape"]["width"]["optima"][0]
    assert best["best"] == pytest.approx(2 * 1e10**0.1, rel=0.25)
    assert (tmp_path / "report" / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert "## Shape" in (tmp_path / "report" / "report.md").read_text()


def test_losses_that_follow_no_law_are_not_supported(tmp_path):
    """Every run's loss drawn anew: neither cuts nor the hold-out may support it."""
    plan = make_sweep(tmp_path)
    record(tmp_path, plan, "fit", loss=lambda cell, g: float(g.uniform(0.5, 2.0)))
    sweep = sweep_fits.read_sweep(tmp_path)
    fits = sweep_fits.fit_arm(sweep, "main", resamples=0)
    verdict = check_law(fits.column("num_params"), fits.column("images"), fits.losses)
    assert str(verdict).startswith("not supported")
    assert checklist(sweep, fits, None)["Was a larger run predicted before it was made?"]


def test_a_law_of_two_variables_is_supported_and_shuffled_is_not():
    generator = np.random.default_rng(0)
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e5, 1e8, 6), np.geomspace(1e6, 1e9, 6)))
    loss = 0.5 + 40 * n**-0.3 + 300 * d**-0.35
    loss *= np.exp(0.005 * generator.standard_normal(len(n)))
    assert str(check_law(n, d, loss)).startswith("supported up to ")
    for _ in range(8):
        assert str(check_law(n, d, generator.permutation(loss))).startswith("not supported")
    # Losses that do fall, but then stop: steady enough, and no better than the last value.
    flat = np.where(n * d > np.median(n * d), np.quantile(loss, 0.3) - 1e-9 * np.log(n * d), loss)
    assert str(check_law(n, d, flat)).startswith("not supported: held-out")


@pytest.fixture
def table(tmp_path):
    x = np.geomspace(1e3, 1e6, 10)
    lines = ["gmacs,err,acc,run,stage"]
    lines += [f"{v},{2 * v**-0.3},{1 - 2 * v**-0.3},r{i},fit" for i, v in enumerate(x)]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_is_fitted_from_the_command_line(table, tmp_path, capsys):
    argv = ["scaling", "fit", f"--table={table}", "--x=gmacs:GMAC", "--y=err", "--form=power",
            "--predict=1e17", f"--out={tmp_path / 'fit'}"]  # fmt: skip
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "supported up to" in printed
    content = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert content["params"]["c"] == pytest.approx(0.3, rel=1e-6)
    # x is in FLOPs, two a MAC.
    assert content["x_range"][1] == pytest.approx(2e15)
    assert content["predictions"][0]["y"] == pytest.approx(2 * (1e17 / 2e9) ** -0.3, rel=1e-6)
    assert (tmp_path / "fit" / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv[:4], "--y=acc", "--accuracy", "--form=power"]) == 0
    assert "0.3 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--x=gmac", "--y=err"], "did you mean 'gmacs'"),
        (["--x=gmacs:GFLOP", "--y=err"], "says MAC, but its unit is given as GFLOP"),
        (["--x=gmacs:MAC", "--y=err"], "says GMAC, but its unit is given as MAC"),
        (["--x=gmacs"], "--law=curve needs --y"),
        (["--x=gmacs", "--y=err", "--law=kurve"], "did you mean 'curve'"),
        (["--x=gmacs", "--y=err", "--form=cubic"], "unknown form 'cubic'"),
        (["--x=gmacs", "--y=run"], r"10 of 10 rows do not .*row 0 \('r0'\)"),
        (["--x=gmacs", "--y=err", "--where=run~r1"], "not of the form COLUMN=VALUE"),
        (["--x=gmacs", "--y=err", "--where=gmacs<2000"], "at least 4 different x"),
        (["--x=gmacs", "--y=err", "--where=run=none"], "no row meets"),
        (["--x=gmacs", "--y=gmacs", "--accuracy"], "accuracies lie below 1"),
        (["--x=gmacs", "--y=err", "--predict=ten"], "must be numbers"),
        (["--law=isoflop", "--flops=gmacs", "--num-params=err", "--loss=err"], "its unit is given"),
        (
            [
                "--law=parametric",
                "--flops=gmacs:GMAC",
                "--num-params=err",
                "--num-examples=acc",
                "--loss=err",
            ],
            "do not share a unit",
        ),
    ],
)
def test_bad_requests_exit_with_2_and_one_message(table, options, words, capsys):
    import re

    assert cli.main(["scaling", "fit", f"--table={table}", *options]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(words, err), err


def test_a_hold_out_that_leaks_is_refused(table, capsys):
    rows = table.read_text().splitlines()
    held = [*rows, "2e6,0.02,0.98,r10,holdout"]
    table.write_text("\n".join(held) + "\n")
    argv = ["scaling", "fit", f"--table={table}", "--x=gmacs", "--y=err", "--form=power"]
    assert cli.main(argv) == 2
    assert "must not leak" in capsys.readouterr().err
    assert cli.main([*argv, "--where=stage=fit"]) == 0
    assert cli.main([*argv, "--hold-out=stage=holdout"]) == 0
    assert "Held out: 1 points" in capsys.readouterr().out
    table.write_text("\n".join([*held, held[1].replace(",fit", ",holdout")]) + "\n")
    assert cli.main([*argv, "--hold-out=stage=holdout"]) == 2
    assert "a leak" in capsys.readouterr().err


def test_tables_that_are_none_are_refused(tmp_path, capsys):
    for name, text in (("a.csv", ""), ("b.csv", "x,y\n1,2,3\n"), ("c.jsonl", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            read_table(tmp_path / name)
    with pytest.raises(InputError, match="no such table"):
        read_table(tmp_path / "d.csv")
    with pytest.raises(InputError, match="unknown unit"):
        unit_factor("flops", "GIGA")
    assert cli.main(["scaling", "report", f"--workdir={tmp_path}"]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert cli.main(["scaling", "fitt"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err
