"""`vitjax launch slurm`: what the script does, under stand-ins for SLURM's programs."""

import json
import os
import shutil
import subprocess

import pytest
import stand_ins

from vitjax import cli
from vitjax.launcher import command as commands
from vitjax.launcher import contract, slurm
from vitjax.sweep import attempts
from vitjax.watchdog import HUNG

TRAIN = ["--", "train", "--config=quickstart", "--workdir=/shared/runs/x"]
# srun: starts each rank's shell in turn, with SLURM's variables; reports the largest status.
SRUN = """
import subprocess
words = sys.argv[sys.argv.index("bash"):]
count = int(os.environ.get("COUNT", "2"))
codes = []
for rank in range(count):
    ranks = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(count), "SLURM_LOCALID": str(rank)}
    codes.append(subprocess.run(words, env=os.environ | ranks).returncode)
sys.exit(max(c if c >= 0 else 128 - c for c in codes))
"""
# vitjax: ends as STATUSES says for its rank.
VITJAX = """
with open(os.environ["SEEN"], "a") as file:
    found = {n: v for n, v in os.environ.items() if n.startswith(("VITJAX_", "JAX_LOCAL"))}
    file.write(json.dumps(found) + "\\n")
status = int(os.environ["STATUSES"].split(",")[int(os.environ["VITJAX_PROCESS_ID"])])
if status > 128:
    os.kill(os.getpid(), status - 128)
sys.exit(status)
"""
SCONTROL = 'print("n1\\nn2" if "hostnames" in sys.argv else "")'


@pytest.fixture
def render(capsys):
    """The script for some options and words."""

    def make(*options, words=TRAIN):
        argv = ["launch", "slurm", "--dry-run", "--no-check", *options, *words]
        assert cli.main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return make


@pytest.fixture
def run(tmp_path):
    """Runs a script as SLURM would; returns its status and the calls of the programs."""

    def start(script, statuses="0,0", **environment):
        shutil.rmtree(tmp_path / "shared", ignore_errors=True)
        (tmp_path / "shared" / "logs").mkdir(parents=True)
        text = script.replace("/shared/runs/x/logs", str(tmp_path / "shared" / "logs"))
        record = tmp_path / "calls"
        record.unlink(missing_ok=True)
        (tmp_path / "seen").unlink(missing_ok=True)
        stand_ins.install(tmp_path / "bin", record, srun=SRUN, scontrol=SCONTROL, vitjax=VITJAX)
        (tmp_path / "bin" / "activate").write_text("")
        text = text.replace("source /venv/bin/activate", f"source '{tmp_path}/bin/activate'")
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "70001",
                 "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8", "STATUSES": statuses,
                 "SEEN": str(tmp_path / "seen"), **environment},
        )  # fmt: skip
        assert not list((tmp_path / "shared" / "logs").iterdir()), "nothing is left behind"
        return done.returncode, stand_ins.calls(record)

    return start


def directives(script):
    """The #SBATCH options, in order."""
    return [line.removeprefix("#SBATCH --") for line in script.split("\n") if line[:7] == "#SBATCH"]


def test_a_process_for_each_gpu_or_for_each_node(render):
    found = directives(render("--nodes=8", "--gpus-per-node=8", "--gpu-type=h100", "--qos=high"))
    wanted = ["nodes=8", "ntasks=64", "ntasks-per-node=8", "cpus-per-task=8", "requeue",
              "qos=high", "gpus-per-node=h100:8", "time=24:00:00", "signal=TERM@120",
              "open-mode=append"]  # fmt: skip
    assert set(wanted) <= set(found)
    assert "output=/shared/runs/x/logs/%x-%j.log" in found
    found = directives(render("--nodes=8", "--gpus-per-node=8", "--tasks=node", "--gres"))
    assert {"ntasks=8", "ntasks-per-node=1", "cpus-per-task=64", "gres=gpu:8"} <= set(found)
    found = directives(render("--nodes=4", "--grace=45", "--time=2-00:00:00"))
    assert {"ntasks=4", "cpus-per-task=1", "signal=TERM@45", "time=2-00:00:00"} <= set(found)
    assert not any("gpu" in line for line in found)


def test_every_process_learns_its_rank_and_devices(render, run, tmp_path):
    status, calls = run(render("--nodes=1", "--gpus-per-node=2", "--venv=/venv"))
    assert status == 0
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    for rank, found in enumerate(seen):
        assert found == {"VITJAX_COORDINATOR": f"n1:{61440 + 70001 % 4096}",
                         "VITJAX_NUM_PROCESSES": "2", "VITJAX_PROCESS_ID": str(rank),
                         "JAX_LOCAL_DEVICE_IDS": str(rank)}  # fmt: skip
    srun = next(call for call in calls if call[0] == "srun")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8", "--label"} <= set(srun)
    run(render("--nodes=2", "--gpus-per-node=4", "--tasks=node", "--venv=/venv"))
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [found["JAX_LOCAL_DEVICE_IDS"] for found in seen] == ["0,1,2,3"] * 2


@pytest.mark.parametrize(
    ("statuses", "restarts", "status", "requeues"),
    [
        ("0,0", 0, 0, False),
        ("75,75", 500, 75, True),  # preemptions are not counted
        ("143,143", 500, 143, True),
        ("134,134", 0, 134, True),
        ("137,134", 19, 137, True),
        ("137,134", 20, 137, False),  # --max-restarts
        ("1,134", 0, 1, False),
        ("2,143", 0, 2, False),  # the wrong input, and not what srun did to the other
        ("134,2", 0, 134, True),
    ],
)
def test_only_what_can_go_on_is_put_back_into_the_queue(
    statuses, restarts, status, requeues, render, run
):
    """By the status of the first that ended badly, whatever srun reports."""
    environment = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    found, calls = run(render("--venv=/venv"), statuses, **environment)
    assert found == status
    assert (["scontrol", "requeue", "70001"] in calls) == requeues


def test_a_config_s_own_status_of_preemption_is_the_one_that_counts(render, run):
    words = [*TRAIN, "--config.checkpoint.preempt_exit_code=42"]
    status, calls = run(render("--venv=/venv", words=words), "42,42")
    assert status == 42 and ["scontrol", "requeue", "70001"] in calls
    status, calls = run(render("--venv=/venv", words=words), "75,75")
    assert status == 75 and ["scontrol", "requeue", "70001"] not in calls


def test_the_contract_is_that_of_the_package_and_of_the_guides(root):
    assert contract.HUNG == HUNG
    assert contract.endings() == (75, 143, 134, 137)
    text = (root / "docs" / "reliability.md").read_text()
    for status in (*contract.endings(), 0, 1, 2):
        assert f"| {status} |" in text, status


def test_hostile_arguments_arrive_whole_and_nothing_runs(render, run, tmp_path):
    given = [f"--config.data.root={text}" for text in stand_ins.HOSTILE]
    script = render("--venv=/venv", words=[*TRAIN, *given])
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    status, calls = run(script)
    assert status == 0
    words = next(call for call in calls if call[0] == "vitjax")
    assert words[1:] == ["train", "--config=quickstart", "--workdir=/shared/runs/x", *given]
    assert not list(tmp_path.rglob("ran"))
    # sbatch stops reading its settings at the first line that is none: no argument comes before.
    settings = script.split("\n\n")[0]
    assert all(line.startswith("#") for line in settings.split("\n"))
    assert settings == render("--venv=/venv").split("\n\n")[0]


@pytest.mark.parametrize("option", ["name", "partition", "account", "qos", "time", "venv", "mount",
                                    "container", "gpu-type"])  # fmt: skip
def test_hostile_settings_are_refused(option, capsys):
    for text in stand_ins.HOSTILE[1:]:
        argv = ["launch", "slurm", "--dry-run", "--no-check", f"--{option}={text}", *TRAIN]
        assert cli.main(argv) == 2, text
        assert f"--{option}" in capsys.readouterr().err


def test_containers_hold_the_command(render):
    script = render("--gpus-per-node=8", "--container=vitjax.sif", "--mount=/data")
    assert "apptainer exec --nv --bind=/shared/runs --bind=/data vitjax.sif vitjax train" in script
    script = render("--container=registry.example.com/vitjax:1", "--mount=/data")
    assert "--container-image=registry.example.com/vitjax:1" in script
    assert "--container-mounts=/shared/runs:/shared/runs,/data:/data" in script
    assert "source" not in script


def test_a_site_s_settings_are_defaults(render, root, tmp_path):
    script = render("--site=example", "--gpus-per-node=8", "--account=other")
    found = directives(script)
    assert {"partition=gpu", "account=other", "time=12:00:00", "constraint=infiniband"} <= set(
        found
    )
    assert "\nmodule load cuda/12.6\n" in script


def test_it_is_submitted_and_read_back(tmp_path, monkeypatch, capfd):
    record = tmp_path / "calls"
    stand_ins.install(
        tmp_path / "bin", record, sbatch='print("4217;cluster")', squeue='print("RUNNING")',
        sacct='print("COMPLETED")',
        scontrol=f'print("   StdErr=x\\n   StdOut={tmp_path}/log")',
    )  # fmt: skip
    (tmp_path / "log").write_text("the log\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    workdir = tmp_path / "run"
    words = ["--", "train", "--config=quickstart", f"--workdir={workdir}"]
    assert cli.main(["launch", "slurm", "--no-check", "--shared-workdir", *words]) == 0
    assert "vitjax launch status 4217" in capfd.readouterr().out
    script = workdir / "launch.sbatch"
    assert stand_ins.calls(record) == [["sbatch", "--parsable", str(script)]]
    assert (workdir / "logs").is_dir() and script.read_text().startswith("#!/bin/bash\n")
    assert cli.main(["launch", "status", "4217"]) == 0
    assert "RUNNING" in capfd.readouterr().out
    stand_ins.install(
        tmp_path / "bin", record, squeue='sys.exit("slurm_load_jobs error: Invalid job id")'
    )
    assert cli.main(["launch", "status", "4217"]) == 0
    assert "COMPLETED" in capfd.readouterr().out
    assert cli.main(["launch", "logs", "4217"]) == 0
    assert "the log" in capfd.readouterr().out
    stand_ins.install(tmp_path / "bin", record, sbatch='sys.exit("no such partition")')
    assert cli.main(["launch", "slurm", "--no-check", "--shared-workdir", *words]) == 2
    assert "no such partition" in capfd.readouterr().err


@pytest.fixture
def sweep(tmp_path):
    """A sweep's workdir: the first trunk has failed, the second is done."""
    argv = ["sweep", "plan", "--config=scaling/digits", f"--workdir={tmp_path / 'sweep'}",
            "--sweep.isoflop.budgets=(3e8,9e8,2.7e9,8.1e9)", "--sweep.seeds.extra=()",
            "--sweep.trunks.warmup_images=32"]  # fmt: skip
    assert cli.main(argv) == 0
    from vitjax.sweep.table import read_plan

    plan = read_plan(tmp_path / "sweep")
    first = plan.group(0)[0]
    for cell in plan.group(0):
        attempts.record(tmp_path / "sweep", cell.id, "failed", "the disk is full")
    for cell in plan.group(1):
        attempts.record(tmp_path / "sweep", cell.id, "done")
    return tmp_path / "sweep", plan, first


def test_a_sweep_is_an_array_of_what_is_left(sweep, tmp_path, capsys, run, monkeypatch):
    folder, plan, failed = sweep
    fit = sorted({c.group for c in plan.cells if c.stage == "fit"})
    left = [group for group in fit if group > 1]
    assert fit[:2] == [0, 1] and left
    argv = ["launch", "slurm", "--array", "--dry-run", "--venv=/venv", f"--plan={folder}", "--",
            "sweep", "run", "--workdir=/shared/runs/x"]  # fmt: skip
    capsys.readouterr()
    assert cli.main(argv) == 0
    shown = capsys.readouterr()
    array = next(line for line in directives(shown.out) if line.startswith("array="))
    from vitjax.sweep.run import parse_numbers

    assert parse_numbers(array.removeprefix("array=")) == left
    assert (
        f"{len(plan.group(0))} failed or diverged" in shown.err and "the disk is full" in shown.err
    )
    status, calls = run(shown.out, "75", COUNT="1", SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="7")
    assert status == 75
    words = next(call for call in calls if call[0] == "vitjax")
    assert words[1:3] == ["sweep", "run"] and words[-1] == "--group=7"
    assert ["scontrol", "requeue", "9_7"] in calls
    # One command tries the failed ones again: they are set free once, before the array starts.
    record = tmp_path / "calls"
    record.unlink()
    stand_ins.install(tmp_path / "bin", record, sbatch='print("4217")')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    argv = ["launch", "slurm", "--array", "--shared-workdir", "--", "sweep", "run", "--retry",
            f"--workdir={folder}"]  # fmt: skip
    assert cli.main([*argv[:3], "--dry-run", *argv[3:]]) == 0
    assert attempts.last(folder, failed.id) is not None, "a dry run changes nothing"
    assert cli.main(argv) == 0
    assert attempts.last(folder, failed.id) is None
    script = (folder / "launch.sbatch").read_text()
    array = next(line for line in directives(script) if line.startswith("array="))
    assert parse_numbers(array.removeprefix("array=")) == sorted({*left, 0})
    assert "--retry" not in script, "a task that is put back would try them over and over"
    capsys.readouterr()
    assert cli.main(["sweep", "run", f"--workdir={folder}", "--array=slurm"]) == 0
    assert "sbatch" in capsys.readouterr().out
    assert "#SBATCH --array=" in (folder / "array.sbatch").read_text()


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("3:20", 200), ("1:00:10", 3610), ("2-1", 176400), ("0-1:30", 5400),
     ("1-00:00:05", 86405)],
)  # fmt: skip
def test_a_limit_that_the_grace_takes_up_is_refused(limit, seconds, capsys):
    """Such a job would save as soon as it starts, and queue again for ever."""
    assert slurm._seconds(limit) == seconds
    argv = ["launch", "slurm", "--dry-run", "--no-check", f"--time={limit}"]
    assert cli.main([*argv, f"--grace={seconds - 61}", *TRAIN]) == 0
    assert cli.main([*argv, f"--grace={seconds - 60}", *TRAIN]) == 2
    assert "leaves no time to train" in capsys.readouterr().err
    assert cli.main([*argv[:-1], "--time=0", *TRAIN]) == 0, "no limit at all"


def test_without_accounting_the_controller_is_asked(tmp_path, monkeypatch, capfd):
    record, said = tmp_path / "calls", "JobId=9 JobName=x JobState=FAILED ExitCode=1:0 StdOut=/l"
    stand_ins.install(
        tmp_path / "bin", record, squeue="", scontrol=f"print({said!r})",
        sacct='sys.exit("Slurm accounting storage is disabled")',
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert cli.main(["launch", "status", "9"]) == 0
    assert "9 x JobState=FAILED ExitCode=1:0 StdOut=/l\n" in capfd.readouterr().out
    assert cli.main(["launch", "logs", "9"]) == 2
    assert "has written nothing yet" in capfd.readouterr().err
    stand_ins.install(
        tmp_path / "bin", record,
        scontrol='sys.exit("slurm_load_jobs error: Invalid job id specified")',
    )  # fmt: skip
    for verb in ("status", "logs"):
        assert cli.main(["launch", verb, "9"]) == 2
        assert "SLURM does not know job 9" in capfd.readouterr().err
    stand_ins.install(tmp_path / "bin", record, sacct='sys.exit("the database is down")')
    assert cli.main(["launch", "status", "9"]) == 2
    assert "the database is down" in capfd.readouterr().err


def test_a_workdir_that_slurm_cannot_name_is_refused(capsys):
    argv = ["launch", "slurm", "--dry-run", "--no-check", "--", "train", "--config=quickstart"]
    assert cli.main([*argv, "--workdir=/shared/a b/%j"]) == 2
    assert "file names" in capsys.readouterr().err
    assert slurm.PLAIN.fullmatch(commands.parse([*argv[5:], "--workdir=/shared/x"]).workdir)
