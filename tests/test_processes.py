"""Several real processes as one run."""

import json
import signal
import socket
import subprocess
import sys
import time

import environment
import numpy as np
import pytest

from vitjax import processes
from vitjax.errors import InputError
from vitjax.telemetry import read_metrics

STEPS = 12
SHORT = [
    f"--config.total_steps={STEPS}", "--config.checkpoint_every=4", "--config.eval_every=6",
    "--config.log_every=1", "--config.model.depth=1", "--config.model.width=32",
    "--config.model.mlp_dim=64", "--config.optimizer.schedule.warmup_steps=2",
    "--config.checkpoint.keep_last=10",
]  # fmt: skip


def start(count, workdir, *words):
    """Starts the quickstart, shrunk, in some processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(count):
        ranks = {
            "VITJAX_COORDINATOR": f"127.0.0.1:{port}",
            "VITJAX_NUM_PROCESSES": str(count),
            "VITJAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "vitjax", "train", "--config=quickstart",
                   f"--workdir={workdir}", *SHORT, *words]  # fmt: skip
        running.append(
            subprocess.Popen(
                command,
                env=environment.of_a_process(**ranks),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return running


def launch(count, workdir):
    """Trains it to the end in some processes that `vitjax launch local` starts."""
    command = [sys.executable, "-m", "vitjax", "launch", "local", "-n", str(count), "--no-check",
               "--", "train", "--config=quickstart", f"--workdir={workdir}", *SHORT]  # fmt: skip
    environment_ = environment.of_a_process()
    done = subprocess.run(command, env=environment_, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(path.name for path in (workdir / "logs").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(count)]
    assert (workdir / "logs" / "rank-0.log").read_text() == done.stdout


def finish(running, expected=0):
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == expected, output


def losses(workdir):
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    launch(1, workdir)
    return workdir


def test_processes_train_with_the_losses_of_one_and_resume_each_other(alone, tmp_path):
    many = tmp_path / "many"
    launch(4, many)
    np.testing.assert_allclose(losses(many), losses(alone), rtol=1e-5)
    recorded = json.loads((many / "config.json").read_text())["environment"]
    assert recorded["process_count"] == 4
    final = json.loads((many / "summary.json").read_text())
    other = json.loads((alone / "summary.json").read_text())
    assert final["eval/test/accuracy"] == pytest.approx(other["eval/test/accuracy"])

    for folder, processes_then in ((many, 1), (alone, 2)):
        copy = tmp_path / f"resumed_by_{processes_then}"
        subprocess.run(["cp", "-r", folder, copy], check=True)
        for step in (8, 12):  # back to step 4
            subprocess.run(["rm", "-r", copy / "checkpoints" / str(step)], check=True)
        rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(rows[:4]))
        subprocess.run(["rm", "-r", copy / "logs"], check=True)
        launch(processes_then, copy)
        np.testing.assert_allclose(losses(copy), losses(alone), rtol=1e-5)


def test_a_signal_to_one_process_saves_the_same_step_in_all(tmp_path):
    workdir = tmp_path / "run"
    words = ["--config.total_steps=100000", "--config.checkpoint_every=0"]
    words += ["--config.eval_every=0"]  # the row of an interrupted evaluation comes later
    running = start(2, workdir, *words)
    deadline = time.time() + 200
    while time.time() < deadline and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.5)
    while time.time() < deadline and len(read_metrics(workdir)) < 3:
        time.sleep(0.5)
    running[1].send_signal(signal.SIGTERM)
    finish(running, expected=75)
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1
    assert read_metrics(workdir)[-1]["step"] == saved[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("127.0.0.1:1", "2", None), "VITJAX_PROCESS_ID is not set"),
        (("127.0.0.1", "2", "0"), "host:port"),
        (("127.0.0.1:1", "2", "2"), "from 0 to VITJAX_NUM_PROCESSES=2 - 1"),
        (("127.0.0.1:1", "two", "0"), "must be a number"),
    ],
)
def test_half_given_or_wrong_variables_are_refused(values, words, monkeypatch):
    for name, value in zip(processes.GIVEN, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        processes.start()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OpenMPI"),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "x"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
    ],
)
def test_schedulers_are_recognised(environment, found, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE",
                 "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES",
                 "MEGASCALE_COORDINATOR_ADDRESS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._detected() == found
