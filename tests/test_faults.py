"""Losses that go wrong, signals at bad moments, two runs in one place, clocks that jump."""

import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import poisoned
import pytest
from conftest import tiny_config, use_one_device
from test_train import assert_same_run, interrupt_at

from vitjax import cli, determinism, experiment, guard, lock, parallel
from vitjax import train as train_lib
from vitjax.checkpoints import steps, store
from vitjax.data.loader import Loader
from vitjax.errors import InputError, NonFiniteError, Preempted
from vitjax.goodput import account, read_events
from vitjax.stopping import Stop
from vitjax.telemetry import Lines, read_metrics


@pytest.fixture(autouse=True)
def single_device(monkeypatch, request):
    if "mesh" not in request.node.name:
        use_one_device(monkeypatch)


@pytest.fixture
def poison(monkeypatch, make_config):
    """A config whose batches of the given steps go wrong, and what stays of it."""

    def make(bad, **changes):
        real = Loader.train_batch

        def train_batch(self, step, *args):
            batch = real(self, step, *args)
            if step + 1 in bad:
                batch["labels"][0] = bad[step + 1]
            return batch

        monkeypatch.setattr(Loader, "train_batch", train_batch)
        config = make_config(**{"eval_every": 0, "total_steps": 12, **changes})
        config.objective.target = "poisoned:Poisoned"
        return config

    return make


def fault_events(workdir):
    return [e for e in read_events(workdir) if e["event"] == "fault"]


def test_by_default_a_bad_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, poison):
    config = poison({6: poisoned.NAN})
    with pytest.raises(
        NonFiniteError, match=r"step 6: loss nan.*the last good checkpoint is step 4"
    ):
        train_lib.train(config, tmp_path)
    assert steps.find_step(tmp_path).name == "4"
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [(e["step"], e["kind"], e["action"]) for e in fault_events(tmp_path)] == [
        (6, "non_finite", "stop")
    ]


def test_a_skipped_update_changes_nothing_and_is_counted(tmp_path, poison):
    config = poison({6: poisoned.NAN, 9: poisoned.NAN}, faults__policy="skip")
    exp = experiment.build(config)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state = exp.compile(), exp.fresh_state()
    for number in range(6):
        before = jax.tree.map(np.array, state)
        state, metrics = step(state, loader.train_batch(number, config.batch_size, config.seed))
    assert int(metrics["fault"]) == 1 and int(state.step) == 6
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    loader.close()

    train_lib.train(config, tmp_path)
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert rows[6]["train/loss"] is None and rows[7]["train/loss"] > 0
    assert [rows[s]["train/skipped"] for s in (5, 6, 8, 9, 12)] == [0, 1, 1, 2, 2]
    # The schedule goes by the updates made.
    assert rows[7]["train/learning_rate"] == rows[6]["train/learning_rate"]
    assert [e["step"] for e in fault_events(tmp_path)] == [6, 9]
    assert account(read_events(tmp_path)).lost > 0


def test_after_a_rollback_the_run_is_that_of_the_checkpoint_on_later_batches(tmp_path, poison):
    config = poison({7: poisoned.NAN}, faults__policy="rollback", total_steps=10)
    train_lib.train(config, tmp_path)
    event = fault_events(tmp_path)[0]
    assert (event["step"], event["action"], event["to"]) == (7, "rollback", 4)
    # By hand: the state of step 4, then batches 8, 9 and 10.
    exp = experiment.build(config)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state = exp.compile(), exp.fresh_state()
    for number in (0, 1, 2, 3, 7, 8, 9):
        if number == 7:
            state.step = jnp.asarray(7, jnp.int32)
        state, _ = step(state, loader.train_batch(number, config.batch_size, config.seed))
    loader.close()
    _, _, found = steps.open_newest(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, state.ema))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["train/skipped"] for row in rows[6:]] == [0, 3, 3, 3]


def test_a_run_that_rolled_back_resumes_to_the_same_bits(tmp_path, poison, monkeypatch):
    config = poison({7: poisoned.NAN}, faults__policy="rollback")
    train_lib.train(config, tmp_path / "whole")
    for where in (8, 10):  # before the rollback is saved, and after

        def crash():
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            interrupt_at(patch, where, crash)
            with pytest.raises(KeyboardInterrupt):
                train_lib.train(config, tmp_path / str(where))
        train_lib.train(config, tmp_path / str(where))
        assert_same_run(tmp_path / "whole", tmp_path / str(where), 12)


def test_a_checkpoint_that_leads_to_the_next_fault_is_not_used_again(tmp_path, poison):
    config = poison({9: poisoned.NAN, 10: poisoned.NAN}, faults__policy="rollback")
    train_lib.train(config, tmp_path)
    assert [(e["step"], e["to"]) for e in fault_events(tmp_path)] == [(9, 8), (10, 4)]


def test_with_nothing_to_go_back_to_the_run_stops(tmp_path, poison):
    config = poison({2: poisoned.NAN}, faults__policy="rollback")
    with pytest.raises(NonFiniteError, match="step 2 went wrong, and there is no checkpoint"):
        train_lib.train(config, tmp_path)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_faults_stop_the_run(policy, tmp_path, poison):
    bad = dict.fromkeys(range(6, 12, 2), poisoned.NAN)
    config = poison(bad, faults__policy=policy, faults__max_faults=2)
    with pytest.raises(NonFiniteError, match=r"fault 3 of this launch, more than faults.max_fault"):
        train_lib.train(config, tmp_path)


def test_a_jump_of_the_loss_is_a_fault_only_when_asked_for(tmp_path, poison, monkeypatch):
    monkeypatch.setattr(guard, "MEMORY", 5)
    config = poison({3: poisoned.SPIKE, 9: poisoned.SPIKE}, total_steps=10)
    train_lib.train(config, tmp_path / "off")
    assert not fault_events(tmp_path / "off")
    with config.unlocked():
        config.faults.spike_factor = 3.0
    with pytest.raises(NonFiniteError, match=r"step 9: .*above 3.0 times the running mean"):
        train_lib.train(config, tmp_path / "on")  # step 3 is too early to judge
    assert fault_events(tmp_path / "on")[0]["kind"] == "spike"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"faults__policy": "ignore"}, "stop, skip, rollback"),
        ({"faults__spike_factor": 0.5}, "spike_factor must be above 1"),
        ({"faults__max_faults": -1}, "max_faults must be 0 or more"),
        ({"faults__watchdog_seconds": -1.0}, "watchdog_seconds must be 0"),
        ({"checkpoint__max_failed_saves": -1}, "max_failed_saves must be 0 or more"),
        ({"checkpoint__every_minutes": 0.0}, "every_minutes must be positive"),
        ({"checkpoint__at_powers_of": 1}, "at_powers_of must be 2 or more"),
        ({"monitor__attention_alarm": 0.0}, "must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, words, tmp_path, make_config):
    with pytest.raises(InputError, match=words):
        train_lib.train(make_config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_norms_and_logits_are_logged_and_large_logits_raise_an_alarm(tmp_path, make_config):
    config = make_config(total_steps=2, eval_every=0)
    config.monitor.update(layer_norms=True, attention_logits=True, attention_alarm=1e-6)
    train_lib.train(config, tmp_path)
    row = read_metrics(tmp_path)[-1]
    assert row["layers/grad_norm/blocks/01"] > 0 and row["layers/param_norm/head"] > 0
    assert row["attention/max_logit"] >= row["attention/max_logit/00"] > 0
    assert any(e["event"] == "alarm" for e in read_events(tmp_path))


def kill_in(monkeypatch, target, name, when=1, number=signal.SIGTERM, times=1):
    """Sends this process a signal when a function is called for the `when`th time."""
    real, calls = getattr(target, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapped)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny run, to its end without an event."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train_lib.train(tiny_config(), workdir)
    return workdir


@pytest.mark.parametrize("when", [2, 5])
def test_a_signal_in_an_evaluation_leaves_it_and_it_is_made_up_for(
    when, whole, tmp_path, make_config, monkeypatch
):
    """The second batch of the first evaluation, and of the last."""
    config = make_config()  # evaluations of three batches at steps 4 and 8
    with monkeypatch.context() as patch:
        kill_in(patch, Stop, "check", when)
        with pytest.raises(Preempted) as caught:
            train_lib.train(config, tmp_path / "broken")
    assert caught.value.step == (4 if when == 2 else 8)
    train_lib.train(config, tmp_path / "broken")
    assert_same_run(whole, tmp_path / "broken", 8)
    assert (tmp_path / "broken" / "summary.json").exists()
    monkeypatch.setattr(experiment.Experiment, "compile", lambda self: 1 / 0)
    assert train_lib.train(config, tmp_path / "broken")["step"] == 8  # nothing is left to do


def test_signals_that_are_repeated_or_come_during_a_save_are_one(
    whole, tmp_path, make_config, monkeypatch
):
    config = make_config()
    with monkeypatch.context() as patch:
        kill_in(patch, store.Writing, "wait", 1, times=3)
        with pytest.raises(Preempted) as caught:
            train_lib.train(config, tmp_path / "broken")
    assert caught.value.step in (4, 5, 6)
    train_lib.train(config, tmp_path / "broken")
    assert_same_run(whole, tmp_path / "broken", 8)


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(
    tmp_path, make_config, monkeypatch
):
    config = make_config()
    problems = []

    def second():
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()

    def try_it():
        try:
            train_lib.train(config, tmp_path)
        except InputError as error:
            problems.append(str(error))

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, second)
        before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
        assert not before
        train_lib.train(config, tmp_path)
    assert len(problems) == 1
    assert f"process {os.getpid()} on " in problems[0] and "choose another" in problems[0]
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    assert not lock.is_held(tmp_path)


def test_a_clock_that_jumps_back_changes_nothing(whole, tmp_path, make_config, monkeypatch):
    config = make_config()
    real, shift = time.time, [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + shift[0])

        def jump():
            shift[0] = -7200.0
            raise KeyboardInterrupt

        interrupt_at(patch, 6, jump)
        with pytest.raises(KeyboardInterrupt):
            train_lib.train(config, tmp_path / "broken")
        patch.undo()
        patch.setattr(time, "time", lambda: real() + shift[0])
        train_lib.train(config, tmp_path / "broken")
    assert_same_run(whole, tmp_path / "broken", 8)
    times = account(read_events(tmp_path / "broken"))
    assert times.launches == 2
    assert all(seconds >= 0 for seconds in times.seconds.values())
    assert times.wall < 600  # and not two hours


def test_on_another_mesh_and_accumulation_the_run_goes_on_with_the_same_losses(
    tmp_path, make_config
):
    """Of single steps, all meshes have the same: test_train.py."""

    def settled(mesh, parts):
        config = make_config(eval_every=0, optimizer__accumulation_steps=parts)
        config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
        return config

    whole = tmp_path / "whole"
    train_lib.train(settled((8, 1, 1), 1), whole)
    wanted = [row["train/loss"] for row in read_metrics(whole)]
    for number, (mesh, parts) in enumerate([((1, 8, 1), 2), ((2, 2, 2), 4)]):
        other = tmp_path / str(number)
        shutil.copytree(whole, other)
        shutil.rmtree(other / "checkpoints/8")
        (other / "summary.json").unlink()
        lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
        (other / "metrics.jsonl").write_text("".join(lines[:4]))
        train_lib.train(settled(mesh, parts), other)
        found = [row["train/loss"] for row in read_metrics(other)]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_two_runs_have_the_same_bits_and_a_difference_is_found(make_config, monkeypatch, capsys):
    config = make_config(model__drop_path_rate=0.2)
    assert determinism.compare(config, 3) is None
    real, calls = Loader.train_batch, [0]

    def train_batch(self, *args):
        calls[0] += 1
        batch = real(self, *args)
        if calls[0] == 5:  # the second step of the second run
            batch["images"][0] ^= 255
        return batch

    monkeypatch.setattr(Loader, "train_batch", train_batch)
    found = determinism.compare(config, 3)
    assert found.step == 2 and any(name.startswith("params/") for name in found.arrays)
    with pytest.raises(InputError, match="must be 1 step or more"):
        determinism.compare(config, 0)


def test_the_command_for_determinism_needs_no_workdir(capsys):
    from test_docs import SHRINK

    assert cli.main(["train", "--config=quickstart", "--check_determinism=2", *SHRINK]) == 0
    assert "two runs of 2 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=quickstart"])


def test_lines_wait_for_a_full_disk_and_none_is_half_written(tmp_path, monkeypatch):
    lines, real, room = Lines(tmp_path / "x.jsonl"), os.write, [10**9]
    lines.add({"n": 0})

    def write(file, content):
        if file != lines._file:
            return real(file, content)
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = real(file, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    room[0] = 5
    for number in (1, 2):
        lines.add({"n": number})
        assert (tmp_path / "x.jsonl").read_text() == '{"n": 0}\n'
    room[0] = 10**9
    lines.add({"n": 3})
    lines.close()
    found = [json.loads(line)["n"] for line in (tmp_path / "x.jsonl").open()]
    assert found == [0, 1, 2, 3]


def test_half_a_percent_of_broken_images_is_no_reason_to_stop_and_five_percent_are(
    tmp_path, make_config
):
    from PIL import Image

    for i in range(400):
        folder = tmp_path / "data" / f"{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    config = make_config(eval_every=0, total_steps=13)
    config.data.unlock()
    config.data.source = {
        "target": "vitjax.data.sources.folders:ImageFolder", "root": str(tmp_path / "data"),
    }  # fmt: skip
    for number in (100, 200):  # 2 of 400
        path = tmp_path / "data" / f"{number % 2}" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:20])
    train_lib.train(config, tmp_path / "few")
    assert read_metrics(tmp_path / "few")[-1]["data/unreadable"] == 2
    for number in range(0, 400, 20):  # 20 of 400
        (tmp_path / "data" / f"{number % 2}" / f"{number:03}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"are unreadable, more than 1.0%[\s\S]*0/\d\d0.png"):
        train_lib.train(config, tmp_path / "many")
