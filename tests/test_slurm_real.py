"""`vitjax launch slurm` on a real SLURM of this machine: four nodes of one CPU each."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
import numpy as np
import pytest
import slurm_cluster
from survival import ARGV, FLAGS
from test_train import assert_same_run

from vitjax.checkpoints import steps
from vitjax.sweep import attempts
from vitjax.sweep.table import read_plan
from vitjax.telemetry import read_metrics

STEPS, SHORT_STEPS = 32, 8
SHORT = [f"--config.total_steps={STEPS}", "--config.checkpoint_every=4", "--config.eval_every=16",
         "--config.checkpoint.keep_last=10"]  # fmt: skip
# Two trunks of 60 steps, each with a branch: two tasks of two cells.
SWEEP = ["--sweep.isoflop.budgets=()", "--sweep.star.centre=(8, 1, 16)",
         "--sweep.star.widths=(12,)", "--sweep.star.images=(320, 960)", "--sweep.batch.size=16",
         "--sweep.trunks.warmup_images=80", "--sweep.holdout.seeds=(0,)",
         "--sweep.train.log_every=1", "--sweep.train.data.source.target=held:Held"]  # fmt: skip
# A source of the same images whose runs a test meets in their middle: while the file `hold` exists
# an image takes a while. A sweep's task whose number is in the file `broken` cannot read.
HELD = """
import os, pathlib, time
from vitjax.config import load_config
from vitjax.data.sources.arrays import Digits

FOLDER = pathlib.Path(__file__).parent

class Held(Digits):
    def __getitem__(self, index):
        if (FOLDER / "hold").exists():
            time.sleep(0.08)
        broken = FOLDER / "broken"
        if broken.exists() and os.environ.get("SLURM_ARRAY_TASK_ID") == broken.read_text():
            raise RuntimeError("the disk is not there")
        return super().__getitem__(index)

def get_config():
    config = load_config("quickstart")
    config.data.source.target = "held:Held"
    config.data.num_threads = 1
    return config
"""


@pytest.fixture(scope="module")
def cluster():
    if why := slurm_cluster.lacks():
        pytest.skip(why)
    with slurm_cluster.Cluster() as made:
        yield made


class Desk:
    """What a user at the cluster does, and sees."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.hold, self.broken = folder / "hold", folder / "broken"
        (folder / "held.py").write_text(HELD)

    def vitjax(self, *words):
        """Runs the command; returns its status and all that it says."""
        programs = Path(sys.executable).parent
        variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                     "PYTHONPATH": str(self.folder), **self.cluster.environment}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "vitjax", *words], capture_output=True, text=True, timeout=300,
            env=environment.of_a_process(FLAGS, **variables),
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def submit(self, *options, words):
        """The number of the job that a launch submits, and what the launch said."""
        status, said = self.vitjax("launch", "slurm", "--shared-workdir", *options, "--", *words)
        assert status == 0, said
        found = re.search(r"submitted job (\d+)", said)
        assert found, said
        return found[1], said

    def train(self, workdir, *options, words=()):
        """Submits the quickstart, shrunk, over two nodes; returns the job's number."""
        words = ["train", f"--config={self.folder / 'held.py'}", f"--workdir={workdir}",
                 *ARGV[1:], *SHORT, *words]  # fmt: skip
        options = ["--no-check", "--nodes=2", "--time=00:10:00", *options]
        return self.submit(*options, words=words)[0]

    def log(self, workdir, job):
        return (workdir / "logs" / f"vitjax-held-{job}.log").read_text()

    def fail(self, what):
        """Fails with the ends of all logs."""
        logs = [f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.rglob("*.log")]
        jobs = self.cluster.ask("scontrol", "--oneliner", "show", "job")
        pytest.fail("\n".join([what, *logs, jobs, self.cluster.logs()]))

    def wait_for(self, is_so, what, seconds=200):
        deadline = time.monotonic() + seconds
        while not is_so():
            self.cluster.check()
            if time.monotonic() > deadline:
                self.fail(f"not seen: {what}")
            time.sleep(0.2)

    def wait_for_state(self, job, wanted, restarts=None):
        """Returns when a job is in a state; fails at once where it can never come to it."""

        def is_so():
            found = self.cluster.job(job)
            if found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", wanted):
                self.fail(f"job {job} is {found['JobState']}, not {wanted}")
            return found["JobState"] == wanted and restarts in (None, found["Restarts"])

        self.wait_for(is_so, f"{wanted} of job {job}")

    def wait_for_end(self, job, state="COMPLETED"):
        self.wait_for_state(job, state)

    def wait_for_requeue(self, job):
        """Returns when the job waits in the queue for its second start."""
        self.wait_for_state(job, "PENDING", restarts="1")

    def wait_for_step(self, workdir, step):
        path = workdir / "metrics.jsonl"
        self.wait_for(
            lambda: path.exists() and len(path.read_bytes().splitlines()) > step,
            f"step {step} of {workdir}",
        )

    def go_on(self, job):
        """The second start, for which a job waits two minutes otherwise; to its end.

        Not in the second of the first end: SLURM's credentials go by whole seconds, and the new one
        would be revoked with the old.
        """
        self.hold.unlink(missing_ok=True)
        self.wait_for_idle()
        said = self.cluster.ask("scontrol", "update", f"jobid={job}", "StartTime=now+2")
        assert not said, said
        self.wait_for_end(job)

    def wait_for_idle(self):
        self.wait_for(lambda: self.cluster.idle_nodes() == 4, "idle nodes")


@pytest.fixture
def desk(cluster, tmp_path):
    made = Desk(cluster, tmp_path)
    yield made
    cluster.ask("scancel", f"--user={cluster.user}")
    made.wait_for_idle()


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A run over two nodes that nothing is done to."""
    desk = Desk(cluster, tmp_path_factory.mktemp("whole"))
    job = desk.train(desk.folder / "run")
    desk.wait_for_end(job)
    return desk.folder / "run"


def losses(workdir):
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, SHORT_STEPS + 1))
    return [row["train/loss"] for row in rows]


def pids(job, rank):
    """A rank's processes of a training."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"VITJAX_PROCESS_ID={rank}".encode()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if wanted <= set(variables) and b"train" in words and b"bash" not in words:
            yield int(path.name)


def test_four_nodes_train_with_the_losses_of_one_process(desk):
    many, alone = desk.folder / "many", desk.folder / "alone"
    words = [f"--config.total_steps={SHORT_STEPS}", "--config.eval_every=0"]
    desk.hold.touch()
    job = desk.train(many, "--nodes=4", words=words)
    desk.wait_for_step(many, 1)
    status, said = desk.vitjax("launch", "status", job)
    assert status == 0 and re.search(rf"{job} +vitjax-held +RUNNING .* 4 n\[1-4\]", said), said
    desk.hold.unlink()
    desk.wait_for_end(job)
    status, said = desk.vitjax("launch", "status", job)  # this SLURM keeps no accounting
    assert status == 0 and f"{job} vitjax-held JobState=COMPLETED" in said, said
    assert f"StdOut={many}/logs/vitjax-held-{job}.log" in said
    assert [path.name for path in (many / "logs").iterdir()] == [f"vitjax-held-{job}.log"]
    status, said = desk.vitjax("launch", "logs", job)
    assert status == 0 and said in desk.log(many, job)
    assert f"0: step {SHORT_STEPS}/{SHORT_STEPS} " in said and "0: done in" in said
    assert "devices: 4 x cpu" in desk.log(many, job)

    job = desk.train(alone, "--nodes=1", words=words)
    desk.wait_for_end(job)
    np.testing.assert_allclose(losses(many), losses(alone), rtol=1e-5)


def test_who_is_preempted_saves_queues_again_and_ends_with_the_same_bits(whole, desk, cluster):
    workdir = desk.folder / "run"
    desk.hold.touch()
    job = desk.train(workdir, "--partition=low")
    desk.wait_for_step(workdir, 4)
    other = ["--partition=high", "--nodes=4", "--output=/dev/null", "--wrap=srun hostname"]
    high = cluster.ask("sbatch", "--parsable", *other).strip()
    desk.wait_for_requeue(job)
    desk.wait_for_end(high)
    assert f"status 75: job {job} goes back into the queue" in desk.log(workdir, job)
    assert read_metrics(workdir)[-1]["step"] == steps.whole_steps(workdir / "checkpoints")[-1]
    desk.go_on(job)
    assert_same_run(whole, workdir, STEPS)


def test_after_a_kill_of_one_rank_all_start_again_and_end_with_the_same_bits(whole, desk):
    workdir = desk.folder / "run"
    desk.hold.touch()
    job = desk.train(workdir)
    desk.wait_for(lambda: steps.whole_steps(workdir / "checkpoints"), "a checkpoint")
    for pid in pids(job, rank=1):
        os.kill(pid, signal.SIGKILL)
    desk.wait_for_requeue(job)
    found = re.search(rf"status (\d+): job {job} goes back", desk.log(workdir, job))
    assert found and found[1] in ("134", "137"), "killed, or who noticed first that a peer is lost"
    desk.go_on(job)
    assert_same_run(whole, workdir, STEPS)


def test_before_the_time_limit_a_run_saves_and_queues_again(whole, desk, cluster):
    workdir = desk.folder / "run"
    desk.hold.touch()
    job = desk.train(workdir, "--grace=100")
    desk.wait_for_step(workdir, 2)
    # Of two minutes the grace leaves so little that the signal is due, and comes within 30 seconds.
    assert not cluster.ask("scontrol", "update", f"jobid={job}", "TimeLimit=2")
    desk.wait_for_requeue(job)
    assert f"status 75: job {job} goes back into the queue" in desk.log(workdir, job)
    assert not cluster.ask("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    desk.go_on(job)
    assert_same_run(whole, workdir, STEPS)


def test_who_is_cancelled_stays_cancelled(desk, cluster):
    """Though its training saves and ends as if it had been preempted."""
    workdir = desk.folder / "run"
    words = ["--config.total_steps=1000000", "--config.eval_every=0", "--config.log_every=10"]
    job = desk.train(workdir, "--nodes=1", words=words)
    desk.wait_for_step(workdir, 2)
    assert not cluster.ask("scancel", job)
    desk.wait_for_end(job, "CANCELLED")
    desk.wait_for_idle()
    assert "is saved; start the same command to go on" in desk.log(workdir, job)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert not cluster.ask("squeue", "--noheader")


def test_a_sweep_s_tasks_go_on_and_its_failed_cells_are_tried_again(desk, cluster):
    workdir = desk.folder / "sweep"
    argv = ["sweep", "plan", "--config=scaling/digits", f"--workdir={workdir}", *SWEEP]
    status, said = desk.vitjax(*argv)
    assert status == 0, said
    plan = read_plan(workdir)
    cells = [cell for cell in plan.cells if cell.stage == "fit"]
    assert sorted(cell.group for cell in cells) == [0, 0, 1, 1]

    desk.hold.touch()
    desk.broken.write_text("1")
    launch = ["--array", "--time=00:10:00"]
    words = ["sweep", "run", f"--workdir={workdir}"]
    array, said = desk.submit(*launch, words=words)
    assert "2 tasks for 4 cells; 0 are done" in said
    trunk = next(cell for cell in plan.group(0) if not cell.is_branch)
    desk.wait_for(lambda: attempts.progress(workdir, trunk.id) > 2, "steps of the first task")
    assert not cluster.ask("scancel", "--signal=TERM", f"{array}_0")
    desk.wait_for_requeue(f"{array}_0")
    desk.wait_for_end(f"{array}_1", "FAILED")
    desk.go_on(f"{array}_0")
    status, said = desk.vitjax("launch", "status", array)
    assert status == 0
    assert f"{array}_0 vitjax-sweep JobState=COMPLETED" in said and f"{array}_1" in said
    status, said = desk.vitjax("launch", "logs", array)
    assert f"status 75: job {array}_0 goes back into the queue" in said
    assert "the disk is not there" in said

    desk.broken.unlink()
    again, said = desk.submit(*launch, words=[*words, "--retry"])
    assert "1 tasks for 2 cells; 2 are done" in said and "the disk is not there" in said
    assert "#SBATCH --array=1\n" in (workdir / "launch.sbatch").read_text()
    desk.wait_for_end(f"{again}_1")
    ended = [attempts.last(workdir, cell.id) for cell in cells]
    assert [attempt and attempt["status"] for attempt in ended] == ["done"] * 4
    assert [attempts.count(workdir, c.id) for c in (*plan.group(0), *plan.group(1))] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition=hihg"], "invalid partition specified: hihg"),
        (["--gpus-per-node=2"], "Invalid generic resource (gres) specification"),
        (["--time=2", "--grace=100"], "leaves no time to train"),
    ],
)
def test_what_slurm_refuses_is_said(options, message, desk, cluster):
    config = desk.folder / "held.py"
    words = ["train", f"--config={config}", f"--workdir={desk.folder / 'run'}"]
    options = ["--shared-workdir", "--no-check", *options]
    status, said = desk.vitjax("launch", "slurm", *options, "--", *words)
    assert status == 2 and message in said, said
    assert "Traceback" not in said and not cluster.ask("squeue", "--noheader")


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_a_job_that_slurm_has_forgotten_is_named(verb, desk):
    status, said = desk.vitjax("launch", verb, "999999")
    assert status == 2 and "SLURM does not know job 999999" in said, said
    assert "Traceback" not in said
