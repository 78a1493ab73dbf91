"""`vitjax launch tpu-vm` and `sky`: golden files, and the script under a gcloud that records."""

import os
import shlex
import subprocess

import pytest
import stand_ins
import yaml

from vitjax import cli

TRAIN = ["--", "train", "--config=quickstart", "--workdir=/mnt/runs/x"]
PLACE = [
    "--tpu=v5e:4x4",
    "--zone=us-west4-a",
    "--bucket=my-runs:/mnt/runs",
    "--source=/home/me/vitjax",
]
SKY = ["--bucket=gs://my-runs:/mnt/runs"]
# gcloud: the queue has the machines at the second look; ssh runs the command here, in $WORKER.
GCLOUD = """
import subprocess
words = sys.argv[1:]
if "describe" in words:
    with open(os.environ["LOOKS"], "a+") as file:
        file.write("x")
        file.seek(0)
        print(os.environ.get("STATE") or ("PROVISIONING", "ACTIVE")[len(file.read()) > 1])
if "ssh" in words:
    command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
    if "tmux" in command:
        sys.exit(subprocess.run(["bash", "-c", command], cwd=os.environ["WORKER"]).returncode)
"""
# tmux: runs what it is given, at once, as a session would.
TMUX = """
import subprocess
if "new-session" in sys.argv:
    words = sys.argv[sys.argv.index("bash"):]
    sys.exit(subprocess.run(words, stdout=subprocess.DEVNULL).returncode)
"""
# vitjax: ends as the next word of STATUSES says.
VITJAX = """
path = os.environ["STATUSES"]
statuses = open(path).read().split()
open(path, "w").write(" ".join(statuses[1:]))
sys.exit(int(statuses[0]))
"""


@pytest.fixture
def render(capsys):
    def make(*options, target="tpu-vm", words=TRAIN):
        place = PLACE if target == "tpu-vm" else SKY
        argv = ["launch", target, "--dry-run", "--no-check", *place, *options, *words]
        assert cli.main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return make


@pytest.fixture
def run(tmp_path):
    """Runs a step of a script; returns its status and the calls of the programs."""

    def start(script, step, statuses="0", **environment):
        record, worker = tmp_path / "calls", tmp_path / "worker"
        record.unlink(missing_ok=True)
        (tmp_path / "statuses").write_text(statuses)
        stand_ins.install(tmp_path / "bin", record, gcloud=GCLOUD, tmux=TMUX, sleep="")
        stand_ins.install(worker / "vitjax" / ".venv" / "bin", record, vitjax=VITJAX)
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / "pyproject.toml").write_text("")
        script = script.replace("/home/me/vitjax", shlex.quote(str(tmp_path / "source")))
        (tmp_path / "launch.sh").write_text(script)
        done = subprocess.run(
            ["bash", str(tmp_path / "launch.sh"), step],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LOOKS": str(tmp_path / "looks"),
                 "WORKER": str(worker), "STATUSES": str(tmp_path / "statuses"), **environment},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, stand_ins.calls(record)

    return start


def gcloud(calls):
    """The calls of gcloud without the words that they share."""
    return [call[3:] for call in calls if call[0] == "gcloud"]


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("tpu_vm.sh", "tpu-vm", ()),
        ("tpu_vm_slices.sh", "tpu-vm", ("--tpu=v5p:2x2x4:2", "--spot", "--project=mine")),
        ("sky_gpu.yaml", "sky", ("--nodes=2", "--gpus-per-node=8", "--gpu-type=h100", "--spot")),
        ("sky_tpu.yaml", "sky", ("--tpu=v6e:4x4", "--infra=gcp/us-east5-a")),
    ],
)
def test_what_is_rendered_is_what_was_looked_at(name, target, options, render, root):
    """`VITJAX_WRITE_GOLDEN=1` writes the files anew; then read the difference."""
    path = root / "tests" / "golden" / name
    text = render(*options, target=target)
    if os.environ.get("VITJAX_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_up_creates_waits_copies_installs_and_starts(render, run, tmp_path):
    status, calls = run(render("--spot"), "up")
    assert status == 0
    zone, name = "--zone=us-west4-a", "vitjax-quickstart"
    create, look, again, copy, install, mount, start = gcloud(calls)
    assert create == ["queued-resources", "create", name, zone, f"--node-id={name}",
                      "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
                      "--spot"]  # fmt: skip
    assert (
        look == again == ["queued-resources", "describe", name, zone, "--format=value(state.state)"]
    )
    assert copy[:2] == ["tpu-vm", "scp"] and copy[3:] == [
        f"{name}:vitjax.tar.gz",
        zone,
        "--worker=all",
    ]
    for call, word in ((install, 'vitjax[tpu]"'), (mount, "gcsfuse"), (start, "tmux new-session")):
        assert call[:5] == ["tpu-vm", "ssh", name, zone, "--worker=all"] and word in call[5]
        syntax = subprocess.run(["bash", "-n"], input=call[5].partition("=")[2], text=True)
        assert syntax.returncode == 0
    trained = [call for call in calls if call[0] == "vitjax"]
    assert trained == [["vitjax", "train", "--config=quickstart", "--workdir=/mnt/runs/x"]]
    for step, words in (("delete", ["delete", name, zone, "--force", "--quiet"]),
                        ("stop", ["ssh", name, zone, "--worker=all"]),
                        ("follow", ["ssh", name, zone, "--worker=0"])):  # fmt: skip
        status, calls = run(render(), step)
        assert status == 0 and gcloud(calls)[0][1 : 1 + len(words)] == words
    assert run(render(), "dance")[0] == 2
    assert run(render(), "wait", STATE="FAILED")[0] == 1


def test_several_slices_are_several_nodes_of_one_request(render, run):
    status, calls = run(render("--tpu=v5p:2x2x4:2"), "up")
    assert status == 0
    found = gcloud(calls)
    assert {
        "--node-prefix=vitjax-quickstart",
        "--node-count=2",
        "--accelerator-type=v5p-32",
    } <= set(found[0])
    nodes = [call[2] for call in found if call[:2] == ["tpu-vm", "ssh"]]
    assert nodes == ["vitjax-quickstart-0", "vitjax-quickstart-1"] * 3


@pytest.mark.parametrize(
    ("statuses", "attempts"),
    [("0", 1), ("75 134 0", 3), ("143 137 2", 3), ("1 0", 1), ("75 75 75 75", 3)],
)
def test_workers_go_on_after_what_can_go_on(statuses, attempts, render, run):
    _, calls = run(render("--max-restarts=2"), "start", statuses)
    assert sum(call[0] == "vitjax" for call in calls) == attempts


def test_hostile_arguments_arrive_whole(render, run, tmp_path):
    given = [f"--config.data.root={text}" for text in stand_ins.HOSTILE]
    workdir = "--workdir=/mnt/runs/" + stand_ins.HOSTILE[5]
    words = [*TRAIN[:3], workdir, *given]
    status, calls = run(render(words=words), "start")
    assert status == 0
    assert [c for c in calls if c[0] == "vitjax"] == [["vitjax", *words[1:]]]
    assert not list(tmp_path.rglob("ran"))
    task = yaml.safe_load(render(target="sky", words=words))
    stand_ins.install(tmp_path / ".venv" / "bin", tmp_path / "sky", vitjax="")
    subprocess.run(
        ["bash", "-c", task["run"]], check=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
             "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
    )  # fmt: skip
    assert stand_ins.calls(tmp_path / "sky") == [["vitjax", *words[1:]]]
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("option", ["name", "zone", "project", "runtime", "bucket", "tpu"])
def test_hostile_settings_are_refused(option, capsys):
    for text in stand_ins.HOSTILE:
        argv = ["launch", "tpu-vm", "--dry-run", "--no-check", *PLACE, f"--{option}={text}", *TRAIN]
        assert cli.main(argv) == 2, text
        assert f"--{option}" in capsys.readouterr().err


def test_sky_numbers_the_processes(render, tmp_path):
    task = yaml.safe_load(render("--nodes=2", "--gpus-per-node=8", "--gpu-type=h100", target="sky"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    assert task["file_mounts"] == {"/mnt/runs": {"source": "gs://my-runs", "mode": "MOUNT"}}
    body = (
        'print(json.dumps({k: v for k, v in os.environ.items() if k[:6] in ("VITJAX", "JAX_LO")}))'
    )
    stand_ins.install(tmp_path / ".venv" / "bin", tmp_path / "calls", vitjax=body)
    done = subprocess.run(
        ["bash", "-c", task["run"]], check=True, cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
             "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"},
    )  # fmt: skip
    assert yaml.safe_load(done.stdout) == {
        "VITJAX_COORDINATOR": "10.0.0.1:8476", "VITJAX_NUM_PROCESSES": "2",
        "VITJAX_PROCESS_ID": "1", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3,4,5,6,7",
    }  # fmt: skip


def test_a_sweep_is_a_request_for_each_trunk(render, run, tmp_path, capsys):
    argv = ["sweep", "plan", "--config=scaling/digits", f"--workdir={tmp_path / 'sweep'}",
            "--sweep.isoflop.budgets=(3e8,9e8,2.7e9,8.1e9)", "--sweep.seeds.extra=()",
            "--sweep.trunks.warmup_images=32"]  # fmt: skip
    assert cli.main(argv) == 0
    from vitjax.sweep import attempts
    from vitjax.sweep.table import read_plan

    plan = read_plan(tmp_path / "sweep")
    fit = sorted({c.group for c in plan.cells if c.stage == "fit"})
    for cell in (c for c in plan.cells if c.group not in fit[2:4]):
        attempts.record(tmp_path / "sweep", cell.id, "done")
    capsys.readouterr()
    words = ["--", "sweep", "run", "--workdir=/mnt/runs/sweep"]
    options = ["--array", f"--plan={tmp_path / 'sweep'}"]
    script = render(*options, "--tpu=v5e:2x2", words=words)
    status, calls = run(script, "start", "0 0")
    assert status == 0
    assert [c[-1] for c in calls if c[0] == "vitjax"] == [f"--group={g}" for g in fit[2:4]]
    assert [c[2] for c in gcloud(calls)] == [f"vitjax-sweep-{g}" for g in fit[2:4]]
    task = render(*options, target="sky", words=words)
    assert f"for group in {fit[2]} {fit[3]}; do" in task
    assert yaml.safe_load(task)["run"].endswith('--group="$GROUP"')
    assert yaml.safe_load(task)["envs"] == {"GROUP": str(fit[2])}
    argv = ["launch", "tpu-vm", "--dry-run", *PLACE, *options, *words]
    assert cli.main(argv) == 2 and "runs on one host" in capsys.readouterr().err


def test_it_is_started_and_read_back(tmp_path, monkeypatch, capfd):
    stand_ins.install(tmp_path / "bin", tmp_path / "calls", gcloud=GCLOUD, tmux="", sleep="")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LOOKS", str(tmp_path / "looks"))
    monkeypatch.setenv("WORKER", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    argv = ["launch", "tpu-vm", "--no-check", *PLACE[:3]]
    assert cli.main([*argv, *TRAIN]) == 2 and "no repository" in capfd.readouterr().err
    (tmp_path / "pyproject.toml").write_text("")
    assert cli.main([*argv, *TRAIN]) == 0
    assert "delete" in capfd.readouterr().out and (tmp_path / "vitjax-quickstart.sh").is_file()
    for action, word in (("status", "describe"), ("logs", "ssh")):
        words = ["launch", action, "vitjax-quickstart", "--on=tpu-vm", "--zone=us-west4-a"]
        assert cli.main(words) == 0
        assert word in stand_ins.calls(tmp_path / "calls")[-1]
    assert cli.main(words[:-1]) == 2 and "--zone" in capfd.readouterr().err
