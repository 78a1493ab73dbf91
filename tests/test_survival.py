"""What several real processes survive. `VITJAX_KILLS=200 pytest tests/test_survival.py` is the long
form of the first test."""

import collections
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image
from survival import Launch, kill_at_a_random_moment, make_chance
from test_train import assert_same_run

from vitjax import lock
from vitjax.checkpoints import steps
from vitjax.goodput import read_events
from vitjax.telemetry import read_metrics
from vitjax.watchdog import HUNG

KILLS = int(os.environ.get("VITJAX_KILLS", 3))
SEED = int(os.environ.get("VITJAX_TEST_SEED", time.time()))
STEPS_A_KILL = 10
SHORT = ["--config.total_steps=24", "--config.checkpoint_every=8", "--config.eval_every=12",
         "--config.checkpoint.keep_last=20", "--config.evals.test.batch_size=4"]  # fmt: skip
ENDLESS = ["--config.total_steps=1000000", "--config.eval_every=0"]


def test_killed_at_any_moment_it_ends_with_the_bits_of_a_run_that_was_not(tmp_path):
    """Any of two processes, at start, in a step or in a save, once and again."""
    print(f"VITJAX_TEST_SEED={SEED}")
    total = max(40, STEPS_A_KILL * KILLS)
    words = [f"--config.total_steps={total}", "--config.checkpoint_every=5",
             "--config.eval_every=20"]  # fmt: skip
    with Launch(2, tmp_path / "whole", *words) as launch:
        assert launch.codes(3600) == [0, 0], launch.log()
    chance, kinds = make_chance(SEED), collections.Counter()
    for _ in range(KILLS):
        with Launch(2, tmp_path / "broken", *words) as launch:
            kinds[kill_at_a_random_moment(launch, chance, total - 5)] += 1
    with Launch(2, tmp_path / "broken", *words) as launch:
        assert launch.codes(3600) == [0, 0], launch.log()
    assert_same_run(tmp_path / "whole", tmp_path / "broken", total)
    assert len(read_metrics(tmp_path / "broken")) == total
    left = {p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()}
    left = {name for name in left if not name.endswith(".unfinished")}  # killed before its marker
    assert left == {str(total), str(total - 5)}, left
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    print(dict(kinds), summary["seconds"], summary["goodput"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("survival") / "whole"
    with Launch(4, workdir, *SHORT) as launch:
        assert launch.codes() == [0] * 4, launch.log()
    return workdir


def test_a_signal_to_one_of_four_twice_saves_the_same_step_in_all(whole, tmp_path):
    """In a step, in a save, in an evaluation; signals are repeated. Then to the end."""
    workdir = tmp_path / "broken"
    with Launch(4, workdir, *SHORT) as launch:
        launch.wait_for_step(3)
        for _ in range(2):
            launch.processes[2].send_signal(signal.SIGTERM)
        assert launch.codes() == [75] * 4, launch.log(2)
    saved = steps.whole_steps(workdir / "checkpoints")
    assert len(saved) == 1 and read_metrics(workdir)[-1]["step"] == saved[0]
    with Launch(4, workdir, *SHORT) as launch:
        launch.wait_for(lambda: any((workdir / "checkpoints").glob("*.saving")))
        for _ in range(2):
            launch.processes[1].send_signal(signal.SIGTERM)
        assert launch.codes() == [75] * 4, launch.log(1)
    with Launch(4, workdir, *SHORT) as launch:
        launch.wait_for_step(22)  # the row after it is begun: the last step is evaluated now
        launch.processes[3].send_signal(signal.SIGTERM)
        assert launch.codes() == [75] * 4, launch.log(3)
    with Launch(4, workdir, *SHORT) as launch:
        assert launch.codes() == [0] * 4, launch.log()
    assert_same_run(whole, workdir, 24)


def test_a_step_that_one_process_cannot_read_is_given_up_by_all(whole, tmp_path):
    workdir = tmp_path / "broken"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    (workdir / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:16]))
    shards = workdir / "checkpoints" / "16" / "rest" / "ocdbt.process_2" / "d"
    for path in shards.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Launch(4, workdir, *SHORT) as launch:
        assert launch.codes() == [0] * 4, launch.log()
    assert "set aside as 16.corrupt" in launch.log()
    assert [p.name for p in steps.aside(workdir / "checkpoints")] == ["16.corrupt"]
    assert_same_run(whole, workdir, 24)


def test_the_death_of_the_first_process_ends_the_others_within_the_heartbeat(tmp_path):
    with Launch(2, tmp_path / "run", *ENDLESS, "--config.checkpoint_every=5") as launch:
        launch.wait_for_step(8)
        start = time.monotonic()
        launch.processes[0].kill()
        assert launch.processes[1].wait(100) in (HUNG, -signal.SIGABRT)  # not a failure of its own
        assert time.monotonic() - start < 60
    assert steps.whole_steps(tmp_path / "run" / "checkpoints")


def test_a_process_that_hangs_is_found_by_the_watchdog_of_the_others(tmp_path):
    workdir = tmp_path / "run"
    words = ["--config.faults.watchdog_seconds=8", "--config.faults.heartbeat_seconds=100"]
    with Launch(2, workdir, *ENDLESS, *words) as launch:
        launch.wait_for_step(3)
        launch.processes[1].send_signal(signal.SIGSTOP)
        assert launch.processes[0].wait(60) == 134
        assert "hangs: no sign of life for 8 s" in launch.log()
        assert "most recent call first" in launch.log() and "_collect" in launch.log()
    assert "Thread" in (workdir / "stacks.txt").read_text()
    assert read_events(workdir)[-1]["event"] == "hang"
    assert not lock.is_held(workdir)


def test_a_process_that_was_suspended_is_not_taken_for_hung(tmp_path):
    words = ["--config.faults.watchdog_seconds=8", "--config.checkpoint_every=0"]
    with Launch(1, tmp_path / "run", *ENDLESS, *words) as launch:
        launch.wait_for_step(3)
        launch.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(12)
        seen = launch.last_step()
        launch.processes[0].send_signal(signal.SIGCONT)
        launch.wait_for_step(seen + 20)
        launch.processes[0].send_signal(signal.SIGTERM)
        assert launch.codes() == [75]


CONFIG = """
from vitjax.config import load_config

def get_config():
    config = load_config("quickstart")
    with config.unlocked():
        config.data.source = {{
            "target": "vitjax.data.sources.folders:ImageFolder", "root": {root!r}
        }}
    return config
"""


def test_an_error_of_one_process_ends_all_and_none_waits_for_the_others(tmp_path):
    for i in range(100):
        folder = tmp_path / "data" / f"{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
        if i % 4 == 0:
            (folder / f"{i}.png").write_bytes(b"no image")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(root=str(tmp_path / "data")))
    with Launch(2, tmp_path / "run", *ENDLESS, f"--config={config}") as launch:
        codes = launch.codes(100)
    assert 2 in codes and 0 not in codes
    assert "are unreadable, more than 1.0%" in launch.log(codes.index(2))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, where this machine lets us make one; else None."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        made = False
    yield place if made else None
    if made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_on_a_full_disk_the_run_goes_on_and_saves_when_there_is_room(tmp_path, small_disk):
    words = ["--config.checkpoint_every=5", "--config.checkpoint.max_failed_saves=1000000"]
    if small_disk is None:  # a limit on the size of files does as well
        words += ["--config.checkpoint.keep_last=1"]
        place = tmp_path / "limited"
        limit = ["prlimit", "--fsize=100000:unlimited", "--pid"]
    else:
        place = small_disk / "run"
        ballast = small_disk / "ballast"
    with Launch(1, place, *ENDLESS, *words, logs=tmp_path) as launch:
        launch.wait_for(lambda: steps.whole_steps(place / "checkpoints"))
        pid = str(launch.processes[0].pid)
        if small_disk is None:
            subprocess.run([*limit, pid], check=True)
        else:
            with pytest.raises(OSError, match="No space"), ballast.open("wb") as file:
                file.write(b"x" * 2**22)
        failed = launch.log
        launch.wait_for(lambda: failed().count("could not be saved") >= 2)
        before = steps.whole_steps(place / "checkpoints")
        assert before
        if small_disk is None:
            subprocess.run(["prlimit", "--fsize=unlimited", "--pid", pid], check=True)
        else:
            ballast.unlink()
        launch.wait_for(lambda: steps.whole_steps(place / "checkpoints")[-1] > before[-1])
        launch.processes[0].send_signal(signal.SIGTERM)
        assert launch.codes() == [75], launch.log()[-3000:]
    rows = [row["step"] for row in read_metrics(place)]
    assert rows == list(range(1, len(rows) + 1))
    assert "free space there" in launch.log() or "allows no file so large" in launch.log()
