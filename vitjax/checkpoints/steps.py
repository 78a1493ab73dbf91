"""The steps in a folder: which are whole, which are left over, which were set aside.

N              a step; it counts once it holds its marker
N.saving       being written, or left over from a save that was killed
N.removing     being removed, or left over from that
N.corrupt      set aside: it could not be restored (N.corrupt.2 and so on where that exists)
N.unfinished   set aside: it had no marker
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from vitjax.checkpoints import store
from vitjax.errors import DamagedCheckpointError, InputError
from vitjax.objectives.objective import at

log = logging.getLogger("vitjax")
PyTree = Any
SAVING, REMOVING, CORRUPT, UNFINISHED = "saving", "removing", "corrupt", "unfinished"


def whole_steps(folder: Path) -> list[int]:
    """The steps that were written to their end, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if _is_step(p) and store.is_finished(p))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def aside(folder: Path) -> list[Path]:
    """What was set aside, in the order of the steps."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        number, _, word = path.name.partition(".")
        if number.isdecimal() and word.split(".")[0] in (CORRUPT, UNFINISHED):
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def saving_folder(folder: Path, step: int) -> Path:
    """Where a step is written before it is whole."""
    return folder / f"{step}.{SAVING}"


def set_aside(folder: Path, step: int, why: str = CORRUPT) -> Path:
    """Renames a step so that it does not count; returns its new name."""
    target, number = folder / f"{step}.{why}", 1
    while target.exists():
        number += 1
        target = folder / f"{step}.{why}.{number}"
    os.rename(folder / str(step), target)
    return target


def remove(step: Path) -> None:
    """Removes a step. It stops to count first, so that half of one is never taken for a whole."""
    gone = step.with_name(f"{step.name}.{REMOVING}")
    os.rename(step, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean(folder: Path) -> list[str]:
    """Removes what killed saves and removals left, and sets unfinished steps aside.

    For one process, while no other writes here. Returns what was done, a line each.
    """
    done = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        number, _, word = path.name.partition(".")
        if number.isdecimal() and word.split(".")[-1] in (SAVING, REMOVING):
            shutil.rmtree(path, ignore_errors=True)
            done.append(f"removed {path}, left over from a killed launch")
        elif _is_step(path) and not store.is_finished(path):
            kept = set_aside(folder, int(path.name), UNFINISHED)
            done.append(f"{path} was never finished: set aside as {kept.name}")
    return done


def is_checkpoint(path: Path) -> bool:
    """Whether a path is, or should be, a run or a step of ours."""
    if not path.is_dir():
        return False
    has_steps = any(_is_step(p) for p in path.iterdir())
    return (path / store.CONTRACT).is_file() or (path / "checkpoints").is_dir() or has_steps


def steps_folder(path: Path) -> Path:
    """The folder with the steps of a run directory, or the path itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def find_step(path: Path, step: int | None = None) -> Path:
    """The step folder that a path means: of a run its newest whole step, or the one given.

    Raises:
      InputError: there is no such run or step.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    if (path / store.CONTRACT).is_file() and step is None:
        return path
    folder = steps_folder(path)
    found = whole_steps(folder)
    if not found:
        raise InputError(f"{path} is no run directory and no checkpoint: it holds no finished step")
    if step is not None and step not in found:
        raise InputError(f"{path} has no step {step}; it has {', '.join(map(str, found))}")
    return folder / str(found[-1] if step is None else step)


def open_newest(path: Path, step: int | None = None) -> tuple[Path, store.Contract, PyTree]:
    """A step's folder, contract and parameters to use (their average where the step has one).

    Of a run the newest step that verifies: a damaged one is named in a warning and passed over.
    A step that was asked for is never replaced.

    Raises:
      InputError: there is none.
      DamagedCheckpointError: the step asked for is damaged, or all are.
    """
    folder = find_step(path, step)
    while True:
        try:
            contract = store.read_contract(folder)
            return folder, contract, model_weights(folder, contract)
        except DamagedCheckpointError as error:
            if step is not None or folder == Path(path):
                raise
            older = [s for s in whole_steps(folder.parent) if s < int(folder.name)]
            if not older:
                raise
            log.warning("%s; step %d is used", error, older[-1])
            folder = folder.parent / str(older[-1])


def model_place(contract: store.Contract) -> tuple[str, tuple[str, ...]]:
    """The part that holds the model's parameters to use, and where in it they lie."""
    part, *keys = contract.get("weights", ["params"])
    return weights(contract) if part == "params" else part, tuple(keys)


def model_weights(folder: Path, contract: store.Contract) -> PyTree:
    """The model's parameters of a step, read and verified."""
    part, place = model_place(contract)
    return at(store.read_verified(folder, part, None, contract), place)


def weights(contract: store.Contract) -> str:
    """The part with the parameters to use: their average where the step has one."""
    return "ema" if "ema" in contract["arrays"] else "params"
