"""`vitjax launch`: what is refused and why, what is never written, and what the guide shows."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import stand_ins
import yaml
from test_docs import commands as commands_of_guides

from vitjax import cli
from vitjax.errors import InputError
from vitjax.launcher import clients, contract, templates, tpus
from vitjax.launcher import command as commands
from vitjax.launcher.verb import TARGETS
from vitjax.planning import targets

TRAIN = ["--", "train", "--config=quickstart", "--workdir=/runs/x"]
PLACES = {
    "local": [],
    "slurm": [],
    "k8s": ["--image=registry.example.com/vitjax:1", "--pvc=runs:/runs"],
    "tpu-vm": ["--tpu=v5e:4x4", "--zone=us-west4-a", "--bucket=runs:/runs"],
    "sky": ["--bucket=gs://runs:/runs"],
}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["slrm"], "did you mean 'slurm'?"),
        (["slurm", "--nods=3", *TRAIN], "did you mean '--nodes'?"),
        (["slurm", "--nodes=2"], "say after --"),
        (["slurm", "--nodes=0", *TRAIN], "'0' is not a whole number from 1 on"),
        (["slurm", "--nodes=two", *TRAIN], "'two' is not a whole number"),
        (["slurm", "--time=1h", *TRAIN], "'1h' is not a time such as"),
        (["slurm", "--tasks=gpu", *TRAIN], "needs --gpus-per-node"),
        (["slurm", "--mount=/data", *TRAIN], "needs --container"),
        (["slurm", "--container=a.sif", "--venv=/v", *TRAIN], "not both"),
        (["slurm", "--site=nowhere", *TRAIN], "allowed: example"),
        (["slurm", "--template=nowhere", *TRAIN], "no template"),
        (["slurm", "--", "predict"], "allowed: train, sweep run"),
        (["slurm", "--", "sweep", "collect"], "allowed: sweep run"),
        (["slurm", "--", "train", "--workdir=/x"], "--config"),
        (
            ["slurm", "--", "train", "--config=quikstart", "--workdir=/x"],
            "did you mean 'quickstart'",
        ),
        (["slurm", *TRAIN, "--workdr=/y"], "did you mean '--workdir'?"),
        (["slurm", *TRAIN, "--config.optimizer.peak_lrr=1"], "did you mean 'peak_lr'?"),
        (["slurm", *TRAIN, "--config.batch_size=many"], "must be int"),
        (["slurm", *TRAIN[:3], "--workdir=/tmp/x"], "/tmp is each node's own"),
        (["slurm", *TRAIN[:3], "--workdir=/dev/shm/x"], "/dev is each node's own"),
        (["slurm", *TRAIN[:3], "--workdir=gs://bucket/x"], "mount the bucket"),
        (["slurm", "--array", *TRAIN], "--array is for sweeps"),
        (["slurm", "--", "sweep", "run", "--workdir=/runs/x"], "add --array"),
        (["slurm", "--array", "--", "sweep", "run", "--workdir=/runs/x"], "holds no plan.json"),
        (["k8s", *TRAIN], "--image"),
        (["k8s", "--image=a/b:1", *TRAIN], "lies in no volume"),
        (["k8s", *PLACES["k8s"], "--tpu=v5e:15x16", *TRAIN], "close ones: "),
        (["k8s", *PLACES["k8s"], "--tpu=v9:4x4", *TRAIN], "allowed: v4, v5e, v5p, v6e, tpu7x"),
        (["k8s", *PLACES["k8s"], "--tpu=v5e:4x4", "--nodes=2", *TRAIN], "leave --nodes"),
        (["tpu-vm", *PLACES["tpu-vm"], "--tpu=tpu7x:2x2x1", *TRAIN], "no TPU VMs of it"),
        (["tpu-vm", *PLACES["tpu-vm"][:2], *TRAIN], "Add --bucket"),
        (["sky", *PLACES["sky"], "--gpus-per-node=8", *TRAIN], "needs --gpu-type"),
        (["sky", *PLACES["sky"], "--tpu=v5e:4x4:2", *TRAIN], "one slice"),
        (["sky", *TRAIN], "Add --bucket"),
        (["status", "17", "--zone=x"], "does not belong to --on=slurm"),
        (["status"], "job"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_what_is_allowed(argv, words, capsys, tmp_path):
    before = set(tmp_path.iterdir())
    assert cli.main(["launch", *argv]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and not shown.out
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("target", "options", "assignments", "words"),
    [
        ("slurm", ["--nodes=2", "--gpus-per-node=8"], ["mesh.fsdp=8"],
         "--nodes=2 x --gpus-per-node=8 gives 16 devices, but the mesh "
         "fsdp=8 x replica=1 x tensor=1 needs 8"),
        ("slurm", ["--nodes=3"], ["mesh.tensor=2"], "3 devices, but the mesh fsdp=-1 x replica=1 x "
         "tensor=2 needs a multiple of 2"),
        ("k8s", ["--tpu=v5e:4x4:2"], ["mesh.fsdp=16"], "--tpu=v5e:4x4:2 gives 32 devices"),
        ("tpu-vm", [], ["mesh.fsdp=8"], "--tpu=v5e:4x4 gives 16 devices"),
        ("sky", ["--nodes=2"], ["mesh.fsdp=8"], "--nodes=2 without GPUs gives 2 devices"),
        ("local", ["-n2", "--gpus-per-process=4"], ["mesh.fsdp=4"], "gives 8 devices"),
    ],
)  # fmt: skip
def test_resources_that_contradict_the_mesh_are_refused(
    target, options, assignments, words, capsys
):
    given = [f"--config.{assignment}" for assignment in assignments]
    argv = ["launch", target, "--dry-run", "--no-check", *PLACES[target], *options, *TRAIN, *given]
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_a_config_that_would_fail_is_refused_unless_told_not_to_look(capsys):
    argv = ["launch", "slurm", "--dry-run", "--nodes=2", "--gpus-per-node=8"]
    indivisible = [*argv, *TRAIN, "--config.batch_size=100"]
    assert cli.main(indivisible) == 2
    shown = capsys.readouterr().err
    assert "batch_size 100 is not divisible by 16" in shown and "--no-check" in shown
    assert cli.main([*indivisible[:3], "--no-check", *indivisible[3:]]) == 0
    large = ["--", "train", "--config=vit_22b", "--workdir=/runs/x"]
    assert cli.main([*argv, "--gpu-type=h100", *large]) == 2
    assert re.search(r"needs about \d+\.\d GiB a device, and a h100 has", capsys.readouterr().err)


@pytest.mark.parametrize(("target", "client"), [("slurm", "sbatch"), ("k8s", "kubectl"),
                                                ("tpu-vm", "gcloud")])  # fmt: skip
def test_a_missing_client_is_named_with_where_it_comes_from(target, client, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    argv = ["launch", target, "--no-check", *PLACES[target], *TRAIN]
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert f"{client} is not installed here" in shown and "--dry-run" in shown
    assert clients.SOURCES[client] in shown
    assert cli.main([*argv[:2], "--dry-run", *argv[2:]]) == 0


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "local"])
def test_no_value_of_the_environment_is_written(target, capsys, monkeypatch):
    """A rendered file holds what the command line holds, and no secret of who launches."""
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GITHUB_TOKEN", "PASSWORD",
                 "MY_OWN", "KUBECONFIG", "USER", "LOGNAME", "VITJAX_SECRET"):  # fmt: skip
        monkeypatch.setenv(name, f"hidden-{name}")
    options = ["--venv=/venv"] if target == "slurm" else []
    argv = ["launch", target, "--dry-run", "--no-check", *PLACES[target], *options, *TRAIN]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "hidden" not in shown and "quickstart" in shown


def test_values_are_quoted_by_one_function_each():
    for text in stand_ins.HOSTILE:
        words = ["a", text]
        assert shlex.split(templates.shell(words)) == words
        assert yaml.safe_load(templates.yaml({"a": [text]})) == {"a": [text]}
        assert "\n" not in templates.yaml(text)
        assert yaml.safe_load(templates.container(words)) == ["a", text.replace("$", "$$")]
    for text in ("a\0b", "a\udcff"):
        with pytest.raises(InputError):
            templates.check_text([text])


def test_a_template_and_its_values_belong_together(tmp_path):
    path = tmp_path / "own.sbatch"
    path.write_text("a @A@\nb @B@ @A@\nc @B@\n@@A@@B@@\n")
    filled = templates.fill("", {"A": "@B@", "B": ""}, str(path))
    assert filled == "a @B@\nb  @B@\n@@B@@\n", "put in once; a line without values is left out"
    with pytest.raises(InputError, match="unknown @B@; known: A"):
        templates.fill("", {"A": ""}, str(path))
    with pytest.raises(InputError, match="has no @C@ any more"):
        templates.fill("", {"A": "", "B": "", "C": ""}, str(path))


def test_an_edited_template_and_a_site_s_file_are_taken(root, tmp_path, capsys):
    own = tmp_path / "own.sbatch"
    own.write_text((root / "launch" / "slurm.sbatch").read_text().replace("srun ", "srun --exact "))
    site = tmp_path / "site.toml"
    argv = ["launch", "slurm", "--dry-run", "--no-check", f"--template={own}", f"--site={site}"]
    site.write_text('[options]\nnodes = 2\ntime = "1:00:00"\n[lines]\nsetup = ["module load x"]\n')
    assert cli.main([*argv, *TRAIN]) == 0
    shown = capsys.readouterr().out
    assert "srun --exact " in shown and "--nodes=2" in shown and "\nmodule load x\n" in shown
    for text, words in (
        ("[options]\nnods = 2", "did you mean 'nodes'"),
        ("[option]\nnodes = 2", "did you mean 'options'"),
        ("[options]\nnodes = -2", "'-2' is not a whole number"),
        ('[lines]\nsbatch = ["rm -r x"]', "no #SBATCH"),
        ("nodes: 2", "site "),
    ):
        site.write_text(text)
        assert cli.main([*argv, *TRAIN]) == 2
        assert words in capsys.readouterr().err
    site.write_text('[lines]\nsetup = ["module load x"]\n')
    argv = ["launch", "k8s", "--dry-run", "--no-check", f"--site={site}", *PLACES["k8s"]]
    assert cli.main([*argv, *TRAIN]) == 2
    assert "for vitjax launch slurm alone" in capsys.readouterr().err


def test_the_mesh_check_knows_free_axes(make_config):
    config = make_config(mesh__fsdp=-1, mesh__tensor=2)
    commands.check_mesh(config, 8, "x")
    with pytest.raises(InputError, match="multiple of 2"):
        commands.check_mesh(config, 7, "x")
    with pytest.raises(InputError, match=r"needs 4: .*set --config.mesh.fsdp=-1"):
        commands.check_mesh(make_config(mesh__fsdp=4), 8, "x")


def test_every_tpu_kind_of_the_plans_has_a_name_on_gke():
    assert set(tpus.GKE) == set(targets.TPUS)
    assert set(tpus.VM) == set(targets.TPUS) - {"tpu7x"}
    for text, name, hosts in (("v5e:2x4", "v5litepod-8", 1), ("v5e:16x16", "v5litepod-256", 64),
                              ("v5p:4x4x4", "v5p-128", 16), ("v4:2x2x1", "v4-8", 1),
                              ("v6e:4x4", "v6e-16", 4)):  # fmt: skip
        found = tpus.parse(text)
        assert (found.vm_type, found.hosts) == (name, hosts)
    assert tpus.parse("tpu7x:2x2x1").devices == 8, "two devices a chip"


def test_statuses_have_names():
    assert contract.as_shell(-9) == contract.KILLED and contract.as_shell(75) == 75
    assert contract.meaning(42, preempted=42) == "preempted and saved"
    assert contract.meaning(139) == "signal 11"


def test_launching_a_training_imports_no_jax(tmp_path):
    argv = ["launch", "slurm", "--dry-run", "--no-check", *TRAIN]
    code = f"import sys; from vitjax import cli; cli.main({argv!r}); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize("name", ["", *TARGETS, "status", "logs"])
def test_help_shows_an_example(name, capsys):
    try:
        status = cli.main(["launch", *([name] if name else []), "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0 and "example: vitjax launch" in " ".join(capsys.readouterr().out.split())


def test_the_image_holds_what_the_package_is_built_from(root):
    text = (root / "launch" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
    names = [name for line in copied for name in line.split()]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in [*built["packages"], *built["force-include"], "pyproject.toml", "README.md"]:
        assert name in names and (root / name).exists(), name
    extras = re.search(r"^\s+case|(\w+)\|(\w+)\) pip install", text, re.M)
    assert set(re.search(r"(\w+)\|(\w+)\) pip install", text).groups()) <= set(
        project["project"]["optional-dependencies"]
    ), extras


def test_every_rendered_file_of_the_guide_is_what_its_command_prints(
    root, capsys, monkeypatch, tmp_path
):
    """`VITJAX_WRITE_GOLDEN=1` writes them anew."""
    monkeypatch.chdir(tmp_path)
    path = root / "docs" / "launch.md"
    pattern = r"^```\n(vitjax launch [^`]*?)\n```\n\nprints\n\n```(?:bash|yaml)\n(.*?)^```"
    text, found = path.read_text(), 0
    for match in re.finditer(pattern, text, re.M | re.S):
        argv = shlex.split(match[1].replace("\\\n", " "))[1:]
        assert "--dry-run" in argv or argv[1] == "sky"
        assert cli.main([*argv[:2], "--no-check", *argv[2:]]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        if os.environ.get("VITJAX_WRITE_GOLDEN"):
            new = match[0].removesuffix(f"{match[2]}```") + printed + "```"
            path.write_text(path.read_text().replace(match[0], new))
        else:
            assert match[2] == printed, match[1]
        found += 1
    assert found >= 3
    shown = [line for name, line in commands_of_guides(root) if name == "launch.md"]
    for target in TARGETS:  # and test_docs runs them, with their checks
        assert any(line.startswith(f"vitjax launch {target} ") for line in shown)
