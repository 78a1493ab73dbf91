"""The command that is launched: what stands after `--`, read and checked before anything starts."""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vitjax import config as config_lib
from vitjax.cli import set_aside
from vitjax.config import Config
from vitjax.errors import InputError, suggest
from vitjax.launcher import templates
from vitjax.launcher.contract import PREEMPTED
from vitjax.launcher.options import Parser, at_least
from vitjax.launcher.tpus import Slices

# Where nodes keep what is theirs alone.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev", "/run", "/local", "/localscratch", "/scratch/local")
MAX_CHECKED = 4096  # devices; a larger mesh takes long to build here


@dataclasses.dataclass(frozen=True)
class Command:
    """What is to run.

    Attributes:
      words: of the command, after `vitjax`.
      workdir: as a path of the machines where it runs.
      config: of a training; None for a sweep, or where it can be read on those machines alone.
      retry: of a sweep: try failed and diverged cells again.
    """

    words: tuple[str, ...]
    workdir: str
    config: Config | None = None
    config_name: str = ""
    assignments: tuple[str, ...] = ()
    stage: str = ""
    retry: bool = False

    @property
    def is_sweep(self) -> bool:
        return self.words[0] == "sweep"

    @property
    def preempted(self) -> int:
        """The exit status of a run that was told to end and has saved."""
        return PREEMPTED if self.config is None else self.config.checkpoint.preempt_exit_code

    @property
    def name(self) -> str:
        """A job's name that says what it is."""
        stem = "sweep" if self.is_sweep else Path(self.config_name).stem
        return "vitjax-" + (re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")[:30] or "run")


def split(argv: list[str], target: str) -> tuple[list[str], list[str]]:
    """The launcher's own options, and the command after `--`."""
    if "--" not in argv:
        raise InputError(
            f"say after -- what to launch: vitjax launch {target} [options] -- train --config=... "
            "--workdir=..."
        )
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def parse(words: list[str], *, absolute: bool = True) -> Command:
    """Reads the command; a training's config is loaded and overridden, which finds most mistakes.

    Args:
      absolute: a relative workdir means one below the current folder, which the other machines
        share; otherwise it stays as it is.

    Raises:
      InputError: no verb that can be launched, an unknown option, a config that is refused.
    """
    templates.check_text(words)
    words = words[1:] if words[:1] == ["vitjax"] else words
    if not words or words[0] not in ("train", "sweep"):
        given = words[0] if words else ""
        raise InputError(f"cannot launch {given!r}; {suggest(given, ('train', 'sweep run'))}")
    if words[0] == "train":
        return _parse_train(words[1:], absolute)
    if words[1:2] != ["run"]:
        raise InputError(f"cannot launch sweep {' '.join(words[1:2])!r}; allowed: sweep run")
    return _parse_sweep(words[2:], absolute)


def _workdir(text: str, absolute: bool) -> str:
    if "://" in text:
        raise InputError(
            f"--workdir={text}: a run directory is a path; mount the bucket, and give the path"
        )
    return os.path.abspath(text) if absolute else text


def _parse_train(words: list[str], absolute: bool) -> Command:
    rest, assignments = set_aside(words, "config")
    parser = Parser(prog="vitjax launch ... -- train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    found = parser.read(rest)
    config = config_lib.override(config_lib.load_config(found.config), assignments)
    workdir = _workdir(found.workdir, absolute)
    given = [f"--config.{assignment}" for assignment in assignments]
    return Command(
        words=("train", f"--config={found.config}", f"--workdir={workdir}", *given),
        workdir=workdir,
        config=config,
        config_name=found.config,
        assignments=tuple(assignments),
    )


def _parse_sweep(words: list[str], absolute: bool) -> Command:
    parser = Parser(prog="vitjax launch ... -- sweep run", add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stage", choices=("fit", "holdout", "all"), default="fit")
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--retry", action="store_true")
    found = parser.read(words)
    workdir = _workdir(found.workdir, absolute)
    given = [f"--workdir={workdir}", f"--stage={found.stage}", f"--workers={found.workers}"]
    return Command(
        words=("sweep", "run", *given), workdir=workdir, stage=found.stage, retry=found.retry
    )


def check_shared(workdir: str, is_shared: bool) -> None:
    """Raises InputError where the name of the workdir says that each node has its own."""
    if is_shared:
        return
    own = [*NODE_LOCAL, *filter(None, map(os.environ.get, ("TMPDIR", "SLURM_TMPDIR")))]
    for folder in own:
        if Path(workdir).is_relative_to(folder):
            raise InputError(
                f"--workdir={workdir}: {folder} is each node's own, but every process reads and "
                "writes the run directory: choose a shared folder, or add --shared-workdir"
            )


def check_mesh(config: Config, devices: int, source: str) -> None:
    """Raises InputError where the mesh cannot be made of the devices.

    Args:
      source: the options that they come from, for the message.
    """
    if config.mesh == "auto":
        return
    sizes = {name: int(size) for name, size in config.mesh.items()}
    written = " x ".join(f"{name}={size}" for name, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if fixed < 1 or len(free) > 1:
        return  # wrong whatever the devices: building the config says so
    if devices % fixed if free else devices != fixed:
        needs = f"a multiple of {fixed}" if free else str(fixed)
        name = free[0] if free else max(sizes, key=lambda n: sizes[n])
        raise InputError(
            f"{source} gives {devices} devices, but the mesh {written} needs {needs}: change the "
            f"one, or set --config.mesh.{name}=-1 and the others to divisors of {devices}"
        )


def check_nodes(command: Command, options: argparse.Namespace, tpu: Slices | None = None) -> None:
    """`check` for what a target's options ask for: nodes with GPUs, without, or TPU slices."""
    skip = options.no_check
    if tpu is not None:
        check(command, tpu.devices, f"--tpu={options.tpu}", "tpu", tpu.kind, skip)
        return
    nodes, gpus = options.nodes or 1, options.gpus_per_node or 0
    if gpus:
        source = f"--nodes={nodes} x --gpus-per-node={gpus}"
        check(command, nodes * gpus, source, "gpu", options.gpu_type, skip)
    else:
        check(command, nodes, f"--nodes={nodes} without GPUs", "cpu", None, skip)


def check(
    command: Command, devices: int, source: str, platform: str, kind: str | None, skip: bool
) -> None:
    """Refuses what would fail at the start: the mesh, the batch, the model, the memory.

    Nothing is compiled: the config is built on so many virtual devices in a process of its own, and
    its memory is estimated, as `vitjax sweep plan --target` does.

    Args:
      platform: "cpu", "gpu" or "tpu"; `kind` of it, as `vitjax plan` names them, where known.
      skip: only look at the mesh.
    """
    if command.config is None:
        return
    check_mesh(command.config, devices, source)
    if skip or devices > MAX_CHECKED:
        return
    asked = {
        "config": command.config_name,
        "assignments": command.assignments,
        "devices": devices,
        "platform": platform,
        "kind": kind,
    }
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "vitjax.launcher.check", json.dumps(asked)],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the check ended without a word"]
        raise InputError(f"{lines[-1]}\nnothing was submitted; --no-check submits all the same")
