"""`vitjax launch local`: real processes, their ends, and what is done about them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from vitjax import cli, processes
from vitjax.errors import InputError
from vitjax.launcher.local import Local, cause
from vitjax.watchdog import HUNG

# A process of no training: PLAN says what each attempt of each rank does.
PROGRAM = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["VITJAX_PROCESS_ID"]), pathlib.Path(sys.argv[1])
attempt = len(list(folder.glob(f"started-{rank}-*")))
(folder / f"started-{rank}-{attempt}-{os.getpid()}").touch()
print(f"rank {rank} attempt {attempt} of", os.environ["VITJAX_NUM_PROCESSES"], flush=True)
plan = eval(sys.argv[2])
does = plan[min(attempt, len(plan) - 1)][rank]
def told(number, frame):
    (folder / f"told-{rank}").write_text(signal.Signals(number).name)
    os._exit(75)
if does == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif does == "saves":
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
peers = range(int(os.environ["VITJAX_NUM_PROCESSES"]))
while any(len(list(folder.glob(f"started-{peer}-*"))) <= attempt for peer in peers):
    time.sleep(0.01)
if isinstance(does, str):
    (folder / f"ready-{rank}").touch()
    time.sleep(60)
elif does < 0:
    os.kill(os.getpid(), -does)
sys.exit(does)
"""


@pytest.fixture
def launch(tmp_path):
    """Runs the program by a plan; returns the status and what the launcher said."""

    def start(plan, **options):
        argv = [sys.executable, "-c", PROGRAM, str(tmp_path), repr(plan)]
        said = []
        options = {"grace": 20.0, "say": said.append, **options}
        local = Local(argv, tmp_path / "logs", len(plan[0]), **options)
        return local.run(), said

    return start


def started(tmp_path, rank):
    return len(list(tmp_path.glob(f"started-{rank}-*")))


def assert_none_is_left(tmp_path):
    for path in tmp_path.glob("started-*"):
        pid = int(path.name.split("-")[-1])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_first_bad_end_ends_the_others_and_is_the_status(launch, tmp_path):
    status, said = launch([[0, "sleeps", 1, "saves"]])
    assert status == 1
    assert "rank 2 ended with 1" in said[-1] and "rank-2.log" in said[-1]
    assert started(tmp_path, 0) == 1, "an error is not tried again"
    assert_none_is_left(tmp_path)


def test_who_does_not_end_is_killed_after_the_grace(launch, tmp_path):
    begin = time.monotonic()
    status, _ = launch([["stubborn", 2]], grace=1.0)
    assert status == 2 and time.monotonic() - begin < 30
    assert_none_is_left(tmp_path)


@pytest.mark.parametrize("end", [75, 134, -9, -15])
def test_what_can_go_on_is_started_again_with_all_its_peers(end, launch, tmp_path):
    status, said = launch([["sleeps", end], [0, 0]])
    assert status == 0
    assert started(tmp_path, 0) == started(tmp_path, 1) == 2
    assert f"ended with {end if end > 0 else 128 - end}" in said[0] and "restart 1 of 10" in said[0]
    text = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "rank 1 attempt 0 of 2\n" in text and "rank 1 attempt 1 of 2\n" in text


def test_restarts_have_a_limit(launch, tmp_path):
    status, said = launch([[134]], max_restarts=2)
    assert status == 134 and started(tmp_path, 0) == 3
    assert "not again after 2 restarts" in said[-1]


def test_a_config_s_own_status_of_preemption_is_tried_again(launch, tmp_path):
    assert launch([[42], [0]], preempted=42)[0] == 0
    assert launch([[42], [0]])[0] == 0  # by now it is the second attempt
    assert cause({0: 134, 1: 2}) == (1, 2)
    assert cause({0: 1, 1: 137, 2: 134}) == (1, 137)
    assert cause({0: 75, 1: 42}, preempted=42) == (0, 75)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_once_and_end_the_launch(number, launch, tmp_path):
    def send():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    before = signal.getsignal(number)
    status, _ = launch([["saves", "saves"]])
    assert status == 75 and started(tmp_path, 0) == 1, "who asked for the end gets it"
    assert {(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)} == {number.name}
    assert signal.getsignal(number) == before
    assert_none_is_left(tmp_path)


def test_lines_are_shown_with_their_rank(launch, tmp_path):
    shown = []
    launch([[0, 0]], show=lambda rank, line: shown.append((rank, line)))
    assert sorted(shown) == [(0, "rank 0 attempt 0 of 2"), (1, "rank 1 attempt 0 of 2")]


def test_gpus_are_shared_out():
    local = Local([], Path(), 2, gpus=4)
    assert local.environment(1, 5)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert local.environment(1, 5)["VITJAX_COORDINATOR"] == "127.0.0.1:5"


def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    code = "import pathlib, sys; from vitjax.launcher.local import Local; "
    code += "Local(sys.argv[2:], pathlib.Path(sys.argv[1]), 1).run()"
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path), "[['saves']]"]
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "logs"), *argv])
    while not (tmp_path / "ready-0").exists():
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "told-0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "told-0").read_text() == "SIGTERM"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo collective permute failed: Read error"), HUNG),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed"), HUNG),
        (jax.errors.JaxRuntimeError("UNKNOWN: Connection reset by peer"), HUNG),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1),
        (ValueError("Connection reset by peer"), 1),
        (InputError("no such file"), 2),
    ],
)
def test_a_lost_peer_is_no_failure_of_one_s_own(error, status):
    """What is left of a training whose peer was killed can be started again."""
    assert processes._status(error) == status


def test_what_would_start_is_shown(capsys, tmp_path):
    argv = ["launch", "local", "-n", "2", "--dry-run", "--no-check", "--", "train"]
    assert cli.main([*argv, "--config=quickstart", f"--workdir={tmp_path}/a b"]) == 0
    shown = capsys.readouterr().out
    assert "VITJAX_NUM_PROCESSES=2 VITJAX_PROCESS_ID=1 " in shown and shown.endswith("wait\n")
    assert f"'--workdir={tmp_path}/a b'" in shown and not list(tmp_path.iterdir())
    assert cli.main(["launch", "local", "-n2", "--", "sweep", "run", "--workdir=x"]) == 2
    assert "--workers=N" in capsys.readouterr().err
