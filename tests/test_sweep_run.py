"""Sweeps as processes: branches, kills, failures, two at once, the table."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import environment
import pytest
from conftest import use_one_device

from vitjax import cli
from vitjax import train as train_lib
from vitjax.checkpoints import store
from vitjax.config import override
from vitjax.errors import InputError, NonFiniteError, Preempted
from vitjax.sweep import attempts, run, worker
from vitjax.sweep.cells import training_config
from vitjax.sweep.collect import collect
from vitjax.sweep.config import load_sweep
from vitjax.sweep.fork import fork, has_step
from vitjax.sweep.plan import make_plan
from vitjax.sweep.table import FIRST_COLUMNS, LAST_COLUMNS, read_attempts, read_runs, write_plan

# Two shapes, each a trunk of 400 steps with a branch of 100, and a hold-out run.
TINY = [
    "isoflop.budgets=()", "star.centre=(8, 1, 16)", "star.widths=(12,)",
    "star.images=(1600, 6400)", "batch.size=16", "trunks.warmup_images=80",
    "holdout.seeds=(0,)", "train.log_every=20", "train.checkpoint_every=100",
]  # fmt: skip
METRICS = {"eval/test/loss": 0.5, "eval/test/accuracy": 0.75, "eval/test/examples": 360.0,
           "train/loss": 0.625, "perf/mfu": 0.1}  # fmt: skip


def tiny_plan(*assignments):
    return make_plan(load_sweep("scaling/digits", [*TINY, *assignments]))


@pytest.fixture(scope="module")
def plan():
    return tiny_plan()


@pytest.fixture
def workdir(plan, tmp_path):
    write_plan(tmp_path, plan)
    return tmp_path


@pytest.fixture(autouse=True)
def single_device(monkeypatch):
    """Runs in this process use one of the eight devices."""
    use_one_device(monkeypatch)


def fit_cells(plan):
    return [c for c in plan.cells if c.stage == "fit"]


def prints(run_folder, step):
    """Fingerprints of parameters, optimizer and step."""
    return store.read_contract(run_folder / "checkpoints" / str(step))["arrays"]


def fake_training(monkeypatch, outcomes=None):
    """Replaces training: writes what a run leaves, or does what `outcomes` says for a cell.

    Returns the list of cells in the order in which they were trained.
    """
    trained = []

    def train(config, folder):
        trained.append(folder.name)
        outcome = (outcomes or {}).get(folder.name)
        for step in config.checkpoint.at_steps:
            (folder / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / str(step) / store.FINISHED).touch()
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"git_commit": "abc", "vitjax": "0.1.0", "device_kind": "cpu"}
        text = json.dumps({"config": {}, "environment": environment})
        (folder / "config.json").write_text(text)
        if isinstance(outcome, Exception):
            raise outcome
        return METRICS | (outcome or {})

    monkeypatch.setattr(worker, "train", train)
    return trained


def test_a_half_made_fork_is_made_anew(plan, tmp_path):
    branch = next(c for c in plan.cells if c.is_branch)
    config, trunk, target = training_config(plan.sweep, branch), tmp_path / "t", tmp_path / "b"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        fork(trunk, 3, target, config)
    (trunk / "checkpoints" / "3").mkdir(parents=True)
    (trunk / "checkpoints" / "3" / store.FINISHED).touch()
    (trunk / "checkpoints" / "3" / "data").write_text("x")
    (tmp_path / "b.fork" / "checkpoints" / "3").mkdir(parents=True)
    fork(trunk, 3, target, config)
    linked = target / "checkpoints" / "3" / "data"
    assert linked.read_text() == "x" and linked.stat().st_nlink == 2  # no copy
    assert not (tmp_path / "b.fork").exists()
    (target / "mark").touch()
    fork(trunk, 3, target, config)  # an existing one is left alone
    assert (target / "mark").exists()


@pytest.mark.parametrize("step", [0, 9])
def test_steps_to_save_lie_in_the_run(step, tmp_path, make_config):
    config = make_config()
    override(config, [f"checkpoint.at_steps=({step},)"])
    with pytest.raises(InputError, match=f"at_steps must lie in 1 to total_steps=8, got {step}"):
        train_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_failures_are_recorded_and_stop_nobody(plan, workdir, monkeypatch):
    a, b, c, d = fit_cells(plan)
    trunks = [x for x in (a, b, c, d) if not x.is_branch]
    branches = [x for x in (a, b, c, d) if x.is_branch]
    outcomes = {
        trunks[0].id: NonFiniteError("step 3: loss nan"),
        branches[0].id: {"eval/test/loss": float("nan")},
        trunks[1].id: ValueError("a bug,\nwith two lines"),
    }
    trained = fake_training(monkeypatch, outcomes)
    worker.work(workdir, plan, fit_cells(plan))
    assert sorted(trained) == sorted(x.id for x in (a, b, c, d))
    ended = {x.id: attempts.last(workdir, x.id) for x in (a, b, c, d)}
    assert ended[trunks[0].id]["status"] == "diverged"
    assert ended[trunks[0].id]["reason"] == "step 3: loss nan"
    assert ended[branches[0].id]["status"] == "diverged"
    assert "eval/test/loss is nan" in ended[branches[0].id]["reason"]
    assert ended[trunks[1].id]["status"] == "failed"
    assert ended[trunks[1].id]["reason"] == "ValueError: a bug, with two lines"
    assert ended[branches[1].id]["status"] == "done"
    worker.work(workdir, plan, fit_cells(plan))
    assert len(trained) == 4  # nothing is tried again unasked


def test_a_branch_without_its_trunk_s_checkpoint_fails_and_says_why(plan, workdir, monkeypatch):
    branch = next(c for c in plan.cells if c.is_branch)
    attempts.record(workdir, branch.trunk, "diverged", "too hot")
    trained = fake_training(monkeypatch)
    worker.work(workdir, plan, [branch])
    assert trained == []
    found = attempts.last(workdir, branch.id)
    assert found["status"] == "failed"
    assert f"its trunk {branch.trunk} ended without a checkpoint" in found["reason"]
    assert "(diverged: too hot)" in found["reason"]


def test_trunks_come_first_and_the_longest_before_all(plan):
    order = worker.in_order(plan, fit_cells(plan))
    for index, cell in enumerate(order):
        assert not cell.is_branch or plan.cell(cell.trunk) in order[:index]
    assert order[0].flops == max(c.flops for c in order)


def test_a_learning_rate_beyond_reason_diverges(plan, workdir):
    """A real run: its gradient becomes infinite."""
    cell = next(c for c in fit_cells(plan) if not c.is_branch)
    hot = dataclasses.replace(cell, learning_rate=1e30)
    hot_plan = dataclasses.replace(plan, cells=(hot,))
    worker.work(workdir, hot_plan, [hot])
    found = attempts.last(workdir, hot.id)
    assert found["status"] == "diverged"
    assert "gradient norm inf" in found["reason"]
    assert found["wall_seconds"] > 0 and found["device_kind"] == "cpu"


def test_another_try_adds_a_row_and_keeps_the_old_run(plan, workdir, monkeypatch):
    cells = fit_cells(plan)
    first = worker.in_order(plan, cells)[0]
    fake_training(monkeypatch, {first.id: NonFiniteError("nan")})
    worker.work(workdir, plan, cells)
    assert collect(workdir, plan) == 4
    before = (workdir / "runs.csv").read_text()
    assert collect(workdir, plan) == 0
    assert (workdir / "runs.csv").read_text() == before
    assert [attempts.retry(workdir, c.id) for c in cells].count(True) == 1
    trained = fake_training(monkeypatch)
    worker.work(workdir, plan, cells)
    assert trained == [first.id]
    assert (workdir / "cells" / f"{first.id}.1" / "config.json").exists()
    assert collect(workdir, plan) == 1
    assert (workdir / "runs.csv").read_text().startswith(before)
    both = [r for r in read_attempts(workdir / "runs.csv") if r["cell"] == first.id]
    assert [(r["attempt"], r["status"]) for r in both] == [(1, "diverged"), (2, "done")]
    rows = read_runs(workdir / "runs.csv")
    assert len(rows) == 4 and all(r["status"] == "done" for r in rows)


def test_the_table_has_the_agreed_columns_and_types(plan, workdir, monkeypatch):
    cells = fit_cells(plan)
    fake_training(monkeypatch, {cells[0].id: NonFiniteError("nan")})
    worker.work(workdir, plan, cells)
    collect(workdir, plan)
    with (workdir / "runs.csv").open() as file:
        header = next(csv.reader(file))
    evals = ["eval/test/loss", "eval/test/loss:n", "eval/test/accuracy", "eval/test/accuracy:n"]
    assert header == [*FIRST_COLUMNS, *evals, *LAST_COLUMNS]
    rows = {r["cell"]: r for r in read_runs(workdir / "runs.csv")}
    lost, good = rows[cells[0].id], rows[cells[1].id]
    assert (lost["status"], lost["reason"], lost["eval/test/loss"]) == ("diverged", "nan", None)
    assert (good["eval/test/loss"], good["eval/test/loss:n"]) == (0.5, 360)
    assert (good["eval/test/accuracy"], good["eval/test/accuracy:n"]) == (0.75, 360)
    assert (good["train/loss"], good["train/loss:n"]) == (0.625, 16)
    assert (good["git_commit"], good["device_kind"]) == ("abc", "cpu")
    cell = cells[1]
    for name in ("trunk", "num_params", "flops", "flops_paid", "learning_rate", "unique_images"):
        assert good[name] == getattr(cell, name)
        assert type(good[name]) is type(getattr(cell, name))
    assert good["budget"] is None and good["reason"] is None


def test_a_new_metric_widens_the_header_and_changes_no_row(plan, workdir, monkeypatch):
    cells = fit_cells(plan)
    fake_training(monkeypatch, {cells[-1].id: {"eval/test/calibration": 0.25}})
    last = [c for c in cells if c.trunk == cells[-1].trunk]
    worker.work(workdir, plan, [c for c in cells if c not in last])
    collect(workdir, plan)
    old = (workdir / "runs.csv").read_text().partition("\n")[2]
    worker.work(workdir, plan, last)
    collect(workdir, plan)
    assert (workdir / "runs.csv").read_text().partition("\n")[2].startswith(old)
    rows = {r["cell"]: r for r in read_runs(workdir / "runs.csv")}
    assert rows[cells[-1].id]["eval/test/calibration"] == 0.25
    assert rows[cells[0].id]["eval/test/calibration"] is None


def test_tables_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such table"):
        read_runs(tmp_path / "runs.csv")
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column 'cell'"):
        read_runs(tmp_path / "runs.csv")
    (tmp_path / "runs.csv").write_text("cell,attempt,status,flops\nx,1,done,many\n")
    with pytest.raises(InputError, match=r"line 2: .*many"):
        read_runs(tmp_path / "runs.csv")


def test_cells_are_chosen_by_number(plan, workdir):
    assert [c.number for c in run.parse_cells("1-2,4,2", plan)] == [1, 2, 4]
    assert run.ranges([4, 1, 2, 9, 8]) == "1-2,4,8-9"
    assert run.share_cores(1) == [sorted(os.sched_getaffinity(0))]
    select = lambda **given: run.select(  # noqa: E731
        workdir, plan, **({"stage": "fit", "cells": None, "group": None} | given)
    )
    assert select() == fit_cells(plan)
    branch = next(c for c in plan.cells if c.is_branch)
    trunk = plan.cell(branch.trunk)
    assert select(group=branch.group) == [trunk, branch]
    for given, words in (
        ({"cells": "1-99"}, "there is no cell 6; the plan has 1 to 5"),
        ({"cells": "x"}, "not of the form 1-4,7"),
        ({"group": 77}, "the plan has 0 to 2"),
        ({"cells": str(branch.number)}, f"cell {branch.number} branches off cell {trunk.number}"),
        ({"stage": "holdout"}, "wait until the prediction is frozen"),
        ({"stage": "all"}, "vitjax scaling freeze --workdir"),
        ({"cells": str(len(plan.cells))}, "no cell of stage 'fit'"),
    ):
        with pytest.raises(InputError, match=words):
            select(**given)
    (workdir / "frozen.json").write_text("{}")
    assert [c.stage for c in select(stage="holdout")] == ["holdout"]
    with pytest.raises(InputError, match="--workers must be 1 to"):
        run.share_cores(10_000)


def test_the_training_set_must_have_as_many_images_as_the_plan_counts():
    with pytest.raises(InputError, match="num_images=1000, but the training set has 1437"):
        run.check_data(tiny_plan("num_images=1000"))


def test_a_cell_has_one_worker_at_a_time(workdir):
    with attempts.claim(workdir, "x") as first, attempts.claim(workdir, "x") as second:
        assert (first, second) == (True, False)
        assert attempts.held_by(workdir, os.getpid()) == ["x"]
    with attempts.claim(workdir, "x") as again:
        assert again
    assert attempts.held_by(workdir, os.getpid()) == []


class DyingWorker(run.Sweep):
    """Its first worker takes the first cell and is killed; later ones record what is left."""

    starts = 0

    def command(self, cores):
        DyingWorker.starts += 1
        do = "os.kill(os.getpid(), 9)" if DyingWorker.starts == 1 else "finish()"
        script = f"""
import os, pathlib
from vitjax.sweep import attempts
workdir, cells = pathlib.Path({str(self.workdir)!r}), {[c.id for c in self.cells]!r}
def finish():
    for cell in cells:
        if attempts.last(workdir, cell) is None:
            attempts.record(workdir, cell, "done")
with attempts.claim(workdir, cells[0]):
    {do}
"""
        return [sys.executable, "-c", script]


def test_a_dead_worker_s_cell_is_failed_and_the_others_go_on(plan, workdir):
    from rich.console import Console

    cells = fit_cells(plan)
    status = DyingWorker(workdir, plan, cells, Console(quiet=True)).go(1)
    assert (status, DyingWorker.starts) == (1, 2)
    ended = [attempts.last(workdir, c.id) for c in cells]
    assert [e["status"] for e in ended] == ["failed", "done", "done", "done"]
    assert ended[0]["reason"] == "its worker ended with signal SIGKILL"


class PatientWorker(run.Sweep):
    """A worker that asks for the sweep's end, and leaves a mark when it is told to end itself."""

    def command(self, cores):
        script = f"""
import os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(self.workdir)!r}, "told").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(20)
"""
        return [sys.executable, "-c", script]


def test_a_signal_is_passed_on_and_the_sweep_can_go_on(plan, workdir):
    from rich.console import Console

    before = signal.getsignal(signal.SIGTERM)
    cells = fit_cells(plan)
    assert PatientWorker(workdir, plan, cells, Console(quiet=True)).go(1) == 75
    assert (workdir / "told").exists()
    assert all(attempts.last(workdir, c.id) is None for c in cells)
    assert signal.getsignal(signal.SIGTERM) is before


def start(workdir, *words):
    command = [sys.executable, "-m", "vitjax", "sweep", "run", f"--workdir={workdir}", *words]
    return subprocess.Popen(
        command,
        env=environment.of_a_process(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def events(workdir, cell, name):
    path = attempts.run_folder(workdir, cell.id) / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [e for e in found if e["event"] == name]


def assert_whole(workdir, plan):
    """Every fit cell is done, once, at its last step; one row each."""
    for cell in fit_cells(plan):
        assert attempts.last(workdir, cell.id)["status"] == "done"
        assert attempts.count(workdir, cell.id) == 1
        steps = [p.name for p in (attempts.run_folder(workdir, cell.id) / "checkpoints").iterdir()]
        assert str(cell.steps) in steps
    rows = read_runs(workdir / "runs.csv")
    assert sorted(r["cell"] for r in rows) == sorted(c.id for c in fit_cells(plan))


@pytest.fixture(scope="module")
def with_whole(plan):
    """The plan, and one of its branches once more as a run from the start."""
    branch = next(c for c in plan.cells if c.is_branch)
    alone = dataclasses.replace(
        branch, id="whole", trunk="whole", branch_step=0, number=len(plan.cells) + 1
    )
    return dataclasses.replace(plan, cells=(*plan.cells, alone))


@pytest.fixture(scope="module")
def whole(with_whole, tmp_path_factory):
    """The tiny sweep, run by two launches at once."""
    workdir = tmp_path_factory.mktemp("sweep") / "whole"
    write_plan(workdir, with_whole)
    for process in [start(workdir), start(workdir)]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return workdir


def test_two_launches_at_once_train_each_cell_once(with_whole, whole):
    assert_whole(whole, with_whole)
    for cell in fit_cells(with_whole):
        assert len(events(whole, cell, "start")) == 1
    rows = read_attempts(whole / "runs.csv")
    assert len(rows) == 5  # and both collected
    assert all(r["eval/test/loss"] > 0 and r["eval/test/loss:n"] == 360 for r in rows)
    assert all(r["wall_seconds"] > 0 for r in rows)


def test_a_branch_ends_with_the_bits_of_a_whole_run(with_whole, whole):
    alone = with_whole.cell("whole")
    branch = next(c for c in with_whole.cells if c.is_branch)
    folders = [attempts.run_folder(whole, c.id) for c in (branch, alone)]
    assert prints(folders[0], branch.steps) == prints(folders[1], branch.steps)
    rows = {r["cell"]: r for r in read_runs(whole / "runs.csv")}
    for name in ("eval/test/loss", "eval/test/accuracy", "train/loss", "flops"):
        assert rows[branch.id][name] == rows[alone.id][name]
    assert rows[branch.id]["flops_paid"] == 0.2 * branch.flops
    # It began where the trunk stood, whose checkpoint stays; its own copy went.
    assert [e["step"] for e in events(whole, branch, "resume")] == [branch.branch_step]
    trunk = with_whole.cell(branch.trunk)
    kept = lambda c: sorted(  # noqa: E731
        int(p.name) for p in (attempts.run_folder(whole, c.id) / "checkpoints").iterdir()
    )
    assert kept(trunk) == [branch.branch_step, trunk.steps]
    assert kept(branch) == [branch.steps]


def test_a_finished_sweep_has_nothing_to_do(whole, capsys):
    before = (whole / "runs.csv").read_bytes()
    assert cli.main(["sweep", "collect", f"--workdir={whole}"]) == 0
    assert "0 rows added" in capsys.readouterr().out
    assert cli.main(["sweep", "run", f"--workdir={whole}", "--array=slurm"]) == 0
    assert "nothing is left to be done" in capsys.readouterr().out
    assert not (whole / "array.sbatch").exists()
    assert (whole / "runs.csv").read_bytes() == before


def test_killed_and_preempted_it_goes_on_and_ends_the_same(plan, whole, tmp_path):
    """kill -9 of everything, then a SIGTERM, then to the end."""
    write_plan(tmp_path, plan)
    cells = fit_cells(plan)

    def wait_for(process, is_time):
        while not is_time():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)

    process = start(tmp_path)
    wait_for(process, lambda: any(has_step(tmp_path / "cells" / c.id, 100) for c in cells))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(tmp_path)
    wait_for(process, lambda: any(attempts.last(tmp_path, c.id) for c in cells))
    finished = [c for c in cells if attempts.last(tmp_path, c.id)]
    process.terminate()
    _, err = process.communicate(timeout=60)
    if process.returncode != 0:  # else it was faster
        assert process.returncode == 75, err
    starts = [len(events(tmp_path, c, "start")) for c in finished]
    process = start(tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_whole(tmp_path, plan)
    assert [len(events(tmp_path, c, "start")) for c in finished] == starts
    assert sum(len(events(tmp_path, c, "resume")) for c in cells if not c.is_branch) >= 1
    for cell in cells:
        folders = [attempts.run_folder(w, cell.id) for w in (whole, tmp_path)]
        assert prints(folders[0], cell.steps) == prints(folders[1], cell.steps)


def test_a_preempted_cell_is_no_attempt(plan, workdir, monkeypatch):
    cells = fit_cells(plan)
    fake_training(monkeypatch, {c.id: Preempted(3, 75) for c in cells})
    with pytest.raises(Preempted):
        worker.work(workdir, plan, cells)
    assert all(attempts.last(workdir, c.id) is None for c in cells)
    assert collect(workdir, plan) == 0
