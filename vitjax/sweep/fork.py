"""A branch's run directory, started from a checkpoint of its trunk."""

import json
import os
import shutil
from pathlib import Path

from vitjax.checkpoints.store import is_finished
from vitjax.config import Config
from vitjax.telemetry import write_config


def has_step(run: Path, step: int) -> bool:
    """Whether a run has a whole checkpoint of a step; one that is being written is not there."""
    return is_finished(run / "checkpoints" / str(step))


def _link(source: str, target: str) -> None:
    """A hard link where the file system has them: checkpoints are written once, then only read."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fork(trunk: Path, step: int, branch: Path, config: Config) -> None:
    """Makes a run directory that goes on from a trunk's checkpoint.

    Up to its cooldown a branch's schedule is its trunk's, so that it ends with the bits of a run
    of its length from the start. The directory appears whole or not at all: it is made beside and
    renamed, so that a kill leaves nothing that could start from scratch.

    Args:
      trunk, branch: run directories; nothing is done if the branch is there.
      step: of the trunk's checkpoint.
      config: the branch's.

    Raises:
      FileNotFoundError: the trunk has no such checkpoint.
    """
    if branch.exists():
        return
    if not has_step(trunk, step):
        raise FileNotFoundError(f"{trunk} has no checkpoint of step {step}")
    beside = branch.with_name(branch.name + ".fork")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        trunk / "checkpoints" / str(step), beside / "checkpoints" / str(step), copy_function=_link
    )
    write_config(beside, config)
    (beside / "forked.json").write_text(json.dumps({"trunk": trunk.name, "step": step}) + "\n")
    os.rename(beside, branch)
