"""Whole processes: trained, killed at random moments, resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import environment
import pytest
from test_train import assert_same_run

STEPS = 240
ARGV = [
    "train", "--config=quickstart", f"--config.total_steps={STEPS}", "--config.batch_size=32",
    "--config.log_every=1", "--config.eval_every=60", "--config.checkpoint_every=20",
    "--config.model.width=32", "--config.model.depth=2", "--config.model.mlp_dim=64",
    "--config.model.scan=True",
    "--config.model.num_heads=2", "--config.optimizer.schedule.warmup_steps=10",
]  # fmt: skip


def start(workdir):
    command = [sys.executable, "-m", "vitjax", *ARGV, f"--workdir={workdir}"]
    variables = environment.of_a_process(flags="")  # compiled as users' runs are
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def stop_at(workdir, step, number):
    """Starts the run and sends a signal once the step is written; returns the exit status."""
    process = start(workdir)
    while last_step(workdir) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("end_to_end") / "whole"
    process = start(workdir)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir


def test_the_main_job_learns(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval/test/accuracy"] > 0.3  # by chance: 0.1
    assert summary["eval/test/examples"] == 360


def test_killed_at_random_steps_it_ends_with_the_same_bits(whole, tmp_path):
    """A kill -9 and a SIGTERM, then to the end; test_survival.py kills more often."""
    seed = int(os.environ.get("VITJAX_TEST_SEED", time.time()))
    print(f"VITJAX_TEST_SEED={seed}")  # shown when the test fails
    steps = sorted(random.Random(seed).sample(range(5, STEPS - 30), 2))
    preempted = random.Random(seed).randrange(2)
    workdir = tmp_path / "broken"
    for index, step in enumerate(steps):
        number = signal.SIGTERM if index == preempted else signal.SIGKILL
        status = stop_at(workdir, step, number)
        assert status == (75 if index == preempted else -signal.SIGKILL)
    process = start(workdir)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_run(whole, workdir, STEPS)
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == STEPS
    events = [json.loads(line) for line in (workdir / "events.jsonl").open()]
    starts = []
    for event in events:
        if event["event"] == "start":
            starts.append(0)
        elif event["event"] == "resume":
            starts[-1] = event["step"]
    # At most the steps since the last save are lost, and a save that was still being written.
    assert all(step - at <= 2 * 20 + 3 for step, at in zip(steps, starts[1:], strict=True))
