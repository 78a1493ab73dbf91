"""What can happen to saved steps, and that none of it puts wrong weights to use."""

import collections
import contextlib
import json
import os
import random
import shutil
import time

import jax
import numpy as np
import pytest
from conftest import use_one_device

import vitjax
from vitjax import cli, experiment
from vitjax.checkpoints import steps, store
from vitjax.checkpoints.policy import Interval, Keep
from vitjax.checkpoints.run import Checkpoints
from vitjax.errors import DamagedCheckpointError, InputError, SaveError
from vitjax.train import train

FLIPS = int(os.environ.get("VITJAX_FLIPS", 60))
SEED = int(os.environ.get("VITJAX_TEST_SEED", time.time()))


@pytest.fixture(autouse=True)
def single_device(monkeypatch):
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with steps 4, 8 and 12, and its config."""
    from conftest import tiny_config

    config = tiny_config(total_steps=12, eval_every=12)
    workdir = tmp_path_factory.mktemp("checkpoints") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train(config, workdir)
    return workdir, config


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def target(trained):
    return experiment.build(trained[1]).state_target


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def spoil(step):
    """Flips a bit of an array in every part."""
    for part in ("params", "ema", "rest"):
        path = max(files(step / part), key=lambda p: p.stat().st_size)
        flip(path, path.stat().st_size // 2, 3)


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_no_flipped_bit_anywhere_puts_wrong_weights_to_use(run, target):
    print(f"VITJAX_TEST_SEED={SEED}")
    folder = Checkpoints(run / "checkpoints")
    truth, _ = folder.restore(12, target)
    step = run / "checkpoints" / "12"
    chance, all_files, caught = random.Random(SEED), files(step), collections.Counter()
    sizes = [path.stat().st_size for path in all_files]
    others = [path for path in all_files if path.name != store.CONTRACT]
    in_turn = [step / store.CONTRACT, *chance.sample(others, len(others))]
    for number in range(FLIPS):
        # Half of them in any byte, which is mostly arrays, half in each file, which is mostly not.
        path = in_turn[number // 2 % len(in_turn)]
        if number % 2:
            path = chance.choices(all_files, sizes)[0]
        position, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, position, bit)
        try:
            found, _ = folder.restore(12, target)
            assert same_bits(found, truth), (path, position, bit)
            caught["harmless"] += 1
        except DamagedCheckpointError as error:
            is_ours = "differ from what was saved" in str(error)
            is_contract = path.name in (store.CONTRACT, store.FINISHED)
            kind = "fingerprint" if is_ours else "contract" if is_contract else "format"
            caught[kind] += 1
        finally:
            flip(path, position, bit)
    print(dict(caught))
    assert caught["fingerprint"] and caught["contract"]
    assert same_bits(folder.restore(12, target)[0], truth)


def largest(step):
    return max(files(step / "params"), key=lambda p: p.stat().st_size)


def empty_all(step):
    for path in files(step):
        path.write_bytes(b"")


def swap_two(step):
    a, b = (max(files(step / part), key=lambda p: p.stat().st_size) for part in ("params", "rest"))
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def swap_parts_of_steps(step):
    """The arrays of an earlier step: whole, only old."""
    shutil.rmtree(step / "params")
    shutil.copytree(step.parent / "8" / "params", step / "params")


DAMAGE = {
    "truncated": lambda step: os.truncate(largest(step), largest(step).stat().st_size // 2),
    "deleted file": lambda step: largest(step).unlink(),
    "deleted part": lambda step: shutil.rmtree(step / "rest"),
    "emptied files": empty_all,
    "swapped files": swap_two,
    "params of another step": swap_parts_of_steps,
    "contract gone": lambda step: (step / store.CONTRACT).unlink(),
    "contract of another step": lambda step: shutil.copy(step.parent / "8" / store.CONTRACT, step),
    "marker of another step": lambda step: shutil.copy(step.parent / "8" / store.FINISHED, step),
    "marker emptied": lambda step: (step / store.FINISHED).write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_it_used(damage, run, target):
    events = []
    directory = run / "checkpoints"
    eight, _ = Checkpoints(directory).restore(8, target)
    damage(directory / "12")
    folder = Checkpoints(directory, on_event=lambda event, **facts: events.append((event, facts)))
    folder.clean()
    step, state, _ = folder.resume(target)
    assert step == 8 and same_bits(state, eight)
    assert steps.whole_steps(directory) == [4, 8]
    assert [p.name for p in steps.aside(directory)] == ["12.corrupt"]
    assert [event for event, _ in events] == ["set_aside"]


UNFINISHED = {
    "empty": lambda step: empty_directory(step),
    "no marker": lambda step: (step / store.FINISHED).unlink(),
}


def empty_directory(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize("damage", UNFINISHED.values(), ids=UNFINISHED)
def test_a_step_without_its_marker_does_not_count(damage, run, target):
    damage(run / "checkpoints" / "12")
    assert steps.find_step(run).name == "8"
    folder = Checkpoints(run / "checkpoints")
    folder.clean()
    assert folder.resume(target)[0] == 8
    assert [p.name for p in steps.aside(run / "checkpoints")] == ["12.unfinished"]


def test_a_run_with_a_damaged_last_step_ends_as_if_nothing_had_been(trained, run):
    DAMAGE["truncated"](run / "checkpoints" / "12")
    (run / "summary.json").unlink()
    whole, config = trained
    train(config, run)  # step 12 is there, so it is complete: nothing is read, nothing is lost
    shutil.rmtree(run / "checkpoints" / "12")
    spoil(run / "checkpoints" / "8")
    train(config, run)
    contracts = [store.read_contract(d / "checkpoints" / "12")["arrays"] for d in (whole, run)]
    assert contracts[0] == contracts[1]
    assert "8.corrupt" in [p.name for p in steps.aside(run / "checkpoints")]


def test_with_every_step_damaged_the_run_does_not_start_anew(trained, run):
    for step in (4, 8, 12):
        spoil(run / "checkpoints" / str(step))
    (run / "summary.json").unlink()
    config = trained[1].copy_and_resolve_references()
    for _ in range(2):
        shutil.rmtree(run / "checkpoints" / "12", ignore_errors=True)
        with pytest.raises(DamagedCheckpointError, match=r"4\.corrupt, 8\.corrupt"):
            train(config, run)


def test_loading_takes_the_newest_good_step_and_says_so(run, caplog):
    good = vitjax.load(run, step=8).params
    spoil(run / "checkpoints" / "12")
    with caplog.at_level("WARNING", logger="vitjax"):
        import logging

        logging.getLogger("vitjax").addHandler(caplog.handler)
        found = vitjax.load(run).params
        logging.getLogger("vitjax").removeHandler(caplog.handler)
    assert same_bits(found, good)
    assert "step 8 is used" in caplog.text
    with pytest.raises(DamagedCheckpointError, match="differ from what was saved"):
        vitjax.load(run, step=12)
    with pytest.raises(DamagedCheckpointError):
        vitjax.load(run / "checkpoints" / "12")


def test_leftovers_of_killed_saves_are_removed(run):
    directory = run / "checkpoints"
    for name in ("16.saving", "4.removing"):
        shutil.copytree(directory / "8", directory / name)
    Checkpoints(directory).clean()
    assert sorted(p.name for p in directory.iterdir()) == ["12", "4", "8"]


def test_one_model_is_told_from_another_before_damage_is_looked_for(run, make_config):
    other = experiment.build(make_config(model__width=64)).state_target
    with pytest.raises(InputError, match="is of another model"):
        Checkpoints(run / "checkpoints").resume(other)
    assert steps.whole_steps(run / "checkpoints") == [4, 8, 12]


def test_keeping():
    steps_to_20 = dict.fromkeys(range(1, 21))
    assert Keep(last=3).kept(steps_to_20) == {18, 19, 20}
    assert Keep(last=1, at_steps=(5,), at_powers_of=2).kept(steps_to_20) == {1, 2, 4, 5, 8, 16, 20}
    assert Keep(last=1, every=6).kept(steps_to_20) == {6, 12, 18, 20}
    scores = {1: 0.5, 2: 0.9, 3: None, 4: float("nan"), 5: 0.9, 6: 0.1}
    assert Keep(last=1, best=1, metric="m").kept(scores) == {5, 6}
    assert Keep(last=1, best=2, metric="m").kept(scores) == {2, 5, 6}
    assert Keep(last=1, best=1, metric="m", mode="min").kept(scores) == {6}
    assert Keep(last=1).kept({}) == set()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"last": 0}, "keep_last must be 1 or more"),
        ({"mode": "best"}, "'max' or 'min'"),
        ({"at_powers_of": 1}, "at_powers_of must be 2 or more"),
        ({"every": 0}, "must be 1 or more"),
    ],
)
def test_rules_that_keep_nothing_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        Keep(**change)


def test_minutes_are_counted_by_a_clock_that_does_not_jump(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interval = Interval(2)
    now[0] += 119
    assert not interval.is_over()
    now[0] += 1
    assert interval.is_over()
    interval.restart()
    assert not interval.is_over()
    assert not Interval(None).is_over()
    with pytest.raises(InputError, match="every_minutes"):
        Interval(0)


def test_saves_by_minutes_and_at_powers(tmp_path, make_config, monkeypatch):
    config = make_config(checkpoint_every=0, eval_every=0, total_steps=9)
    config.checkpoint.update(keep_last=1, at_powers_of=2)
    train(config, tmp_path / "powers")
    assert steps.whole_steps(tmp_path / "powers" / "checkpoints") == [1, 2, 4, 8, 9]
    config.checkpoint.update(keep_last=10, at_powers_of=None)
    with config.unlocked():
        config.checkpoint.every_minutes = 1e-6
    config.log_every = 3  # minutes are looked at when a step is logged
    train(config, tmp_path / "minutes")
    assert steps.whole_steps(tmp_path / "minutes" / "checkpoints") == [3, 6, 9]


def failing_disk(monkeypatch, calls):
    """The saves of these numbers find a full disk, half way."""
    real, number = store.Writing.wait, [0]

    def wait(self):
        number[0] += 1
        real(self)
        if number[0] in calls:
            (self._folder / "half").write_text("written")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Writing, "wait", wait)


def test_a_marker_that_is_cut_short_leaves_no_step_that_counts(tmp_path, make_config, monkeypatch):
    real = store.mark_finished

    def cut_short(folder):
        if folder.name == "4":
            (folder / store.FINISHED).touch()
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(store, "mark_finished", cut_short)
    train(make_config(total_steps=6, eval_every=0, checkpoint_every=2), tmp_path)
    assert steps.whole_steps(tmp_path / "checkpoints") == [2, 6]


def test_no_reader_meets_a_marker_before_it_is_whole(tmp_path, make_config, monkeypatch):
    seen, real = [], store._write_synced

    def watched(path, text):
        real(path, text)
        seen.append((path.parent.name, steps.whole_steps(tmp_path / "checkpoints")))

    monkeypatch.setattr(store, "_write_synced", watched)
    train(make_config(total_steps=2, eval_every=0, checkpoint_every=2), tmp_path)
    assert seen == [("2.saving", []), ("2.saving", [])]  # contract and marker
    assert steps.whole_steps(tmp_path / "checkpoints") == [2]


def test_training_goes_on_over_failed_saves_and_tries_the_last_again(
    tmp_path, make_config, monkeypatch
):
    failing_disk(monkeypatch, {2, 3, 4})
    config = make_config(total_steps=6, eval_every=0, checkpoint_every=2)
    train(config, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    failed = [e for e in events if e["event"] == "save_failed"]
    assert [e["step"] for e in failed] == [4, 6, 6]
    assert "No space left" in failed[0]["reason"] and "free space there" in failed[0]["reason"]
    assert "MiB are free" in failed[0]["reason"]
    assert steps.whole_steps(tmp_path / "checkpoints") == [2, 6]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_too_many_failed_saves_end_the_run_and_leave_the_steps_before(
    tmp_path, make_config, monkeypatch
):
    failing_disk(monkeypatch, range(2, 100))
    config = make_config(total_steps=40, eval_every=0, checkpoint_every=2)
    with pytest.raises(
        SaveError, match=r"4 saves in a row failed.*max_failed_saves is 3.*No space"
    ):
        train(config, tmp_path)
    assert steps.whole_steps(tmp_path / "checkpoints") == [2]
    monkeypatch.undo()


def test_verify_names_the_damaged_arrays(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert cli.main(["checkpoints", "verify", "--workdir=run"]) == 0
    assert cli.main(["checkpoints", "verify", f"--workdir={run}"]) == 0
    assert "step 12: whole" in capsys.readouterr().out
    spoil(run / "checkpoints" / "8")
    assert cli.main(["checkpoints", "verify", f"--workdir={run}"]) == 1
    out = capsys.readouterr().out
    assert "step 8: DAMAGED" in out and "params/" in out and "step 12: whole" in out
    assert cli.main(["checkpoints", "verify", f"--workdir={run}", "--step=12"]) == 0


def test_diff_finds_what_changed_and_how_much(run, tmp_path, capsys):
    argv = ["checkpoints", "diff", f"--workdir={run}", "--json"]
    assert cli.main([*argv, "--step=8", "--with=8"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main([*argv, "--step=8", "--with=12"]) == 0
    rows = {row["array"]: row for row in json.loads(capsys.readouterr().out)}
    _, _, a = steps.open_newest(run, 8)
    _, _, b = steps.open_newest(run, 12)
    x, y = (np.asarray(t["patch_embed"]["kernel"]) for t in (a, b))
    wanted = np.linalg.norm(y - x) / np.linalg.norm(x)
    assert rows["ema/patch_embed/kernel"]["change"] == pytest.approx(wanted, rel=1e-6)
    assert cli.main([*argv, f"--with={tmp_path / 'none'}"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_prune_removes_what_no_rule_keeps_and_never_under_a_running_run(run, capsys):
    argv = ["checkpoints", "prune", f"--workdir={run}", "--keep-last=1"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert steps.whole_steps(run / "checkpoints") == [4, 8, 12]
    from vitjax import lock

    with lock.on_run(run):
        assert cli.main(argv) == 2
    assert "is training in" in capsys.readouterr().err
    steps.set_aside(run / "checkpoints", 4)
    assert cli.main([*argv, "--set-aside"]) == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12"]


def test_list_shows_steps_scores_and_what_was_set_aside(run, capsys):
    steps.set_aside(run / "checkpoints", 4)
    assert cli.main(["checkpoints", "list", f"--workdir={run}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["state"]) for r in rows] == [
        ("8", "whole"), ("12", "whole"), ("4.corrupt", "set aside"),
    ]  # fmt: skip
    assert rows[1]["metrics"].keys() == {"eval/test/accuracy"}
    assert cli.main(["checkpoints", "list", f"--workdir={run}"]) == 0
    assert "set aside" in capsys.readouterr().out


@contextlib.contextmanager
def another_user(folder):
    """Without the rights of root, for which the rights of files mean nothing; the folder and what
    leads to it may be passed through."""
    while folder != folder.parent and folder.stat().st_uid == os.getuid():
        folder.chmod(0o755)
        folder = folder.parent
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["contract.json", "params", "rest/_METADATA"])
def test_a_step_that_may_not_be_read_is_no_damaged_one(name, run, target):
    folder = Checkpoints(run / "checkpoints")
    folder.restore(12, target)  # imports what it needs
    (run / "checkpoints" / "12" / name).chmod(0)
    with another_user(run / "checkpoints"), pytest.raises(InputError, match="may not read"):
        folder.resume(target)
    assert steps.whole_steps(run / "checkpoints") == [4, 8, 12]


def test_a_run_directory_that_cannot_be_written_is_refused_at_once(trained, run):
    (run / "summary.json").unlink()
    before = sorted(p for p in run.rglob("*"))
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with (
        another_user(run.parent),
        pytest.raises(InputError, match=r"cannot write to --workdir.*Permission denied"),
    ):
        train(trained[1], run)
    assert sorted(p for p in run.rglob("*")) == before
