"""Checkpoints: the one file that talks to Orbax.

    checkpoints/N/params     the parameters
    checkpoints/N/ema        their moving average, where there is one
    checkpoints/N/extra      what the objective keeps untrained, where it keeps anything
    checkpoints/N/rest       step, key, optimizer state
    checkpoints/N/contract   JSON: model, preprocessing, class names, fingerprints

A save is asynchronous and atomic: it is written beside and renamed when whole.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies

from vitjax.errors import DamagedCheckpointError, InputError
from vitjax.fingerprint import fingerprint
from vitjax.state import TrainState, check_same_tree

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that items never have
PyTree = Any
Args = ocp.args


def _verify(tree: PyTree, expected: dict[str, str], where: Path) -> None:
    found = fingerprint(tree)
    bad = [name for name, value in found.items() if expected.get(name) != value]
    if bad:
        raise DamagedCheckpointError(
            f"{where} is damaged: {len(bad)} of {len(found)} arrays differ from what was saved, "
            f"first {bad[0]}; move the step away to go on from the one before"
        )


def _parts(state: TrainState) -> dict[str, PyTree]:
    parts = {
        "params": state.params,
        "rest": {"step": state.step, "key": state.key, "opt_state": state.opt_state},
    }
    if state.ema is not None:
        parts["ema"] = state.ema
    if jax.tree.leaves(state.extra):
        parts["extra"] = state.extra
    return parts


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made if missing.
      keep_last: how many of the newest to keep.
      keep_best: how many of the best by `metric` to keep beside them.
      metric: the name of an evaluation's number, or None.
      mode: "max" or "min".
      at_steps: steps that are never removed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str | None = None,
        mode: str = "max",
        at_steps: tuple[int, ...] = (),
    ):
        if keep_last < 1 or keep_best < 0:
            raise InputError(
                f"checkpoint.keep_last must be 1 or more and keep_best 0 or more, "
                f"got {keep_last} and {keep_best}"
            )
        if mode not in ("max", "min"):
            raise InputError(f"checkpoint.mode must be 'max' or 'min', got {mode!r}")
        kept: list[Any] = [policies.preservation_policy.LatestN(keep_last)]
        if at_steps:
            kept.append(policies.preservation_policy.CustomSteps(at_steps))
        if metric and keep_best:
            kept.append(
                policies.preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[metric],
                    reverse=mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.directory = Path(directory).absolute()
        self._metric = metric
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.preservation_policy.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def newest(self) -> int | None:
        """The newest whole step."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, contract: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Starts a save; returns once the arrays are copied off the device."""
        parts = _parts(state)
        prints = {name: fingerprint(tree) for name, tree in parts.items()}
        items: dict[str, Any] = {name: Args.StandardSave(tree) for name, tree in parts.items()}
        items["contract"] = Args.JsonSave(contract | {"step": step, "fingerprints": prints})
        scored = {self._metric: metrics[self._metric]} if self._metric in metrics else None
        self._manager.save(step, args=Args.Composite(**items), metrics=scored, force=True)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Reads a step into the shapes and shardings of `target`, and checks every array.

        Raises:
          InputError: the step is of another model or optimizer; names the first leaves.
          DamagedCheckpointError: an array is not what was saved.
        """
        where = self.directory / str(step)
        parts = _parts(target)
        for name, tree in parts.items():
            if not (where / name).is_dir():
                raise InputError(f"{where} has no {name}, which this config asks for")
            check_same_tree(tree, read_shapes(where / name), str(where / name))
        items = {name: Args.StandardRestore(tree) for name, tree in parts.items()}
        read = self._manager.restore(step, args=Args.Composite(**items))
        prints = read_contract(where)["fingerprints"]
        for name in parts:
            _verify(read[name], prints[name], where / name)
        return TrainState(
            params=read["params"],
            ema=read.get("ema") if "ema" in parts else None,
            extra=read["extra"] if "extra" in parts else target.extra,
            **read["rest"],
        )

    def wait(self) -> None:
        """Returns when everything started is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def read_contract(step_folder: Path) -> dict[str, Any]:
    """What a step says of itself."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step_folder.absolute() / "contract")


def read_shapes(folder: Path) -> PyTree:
    """The tree of arrays in a checkpoint item, with nothing read."""
    with ocp.StandardCheckpointer() as reader:
        return reader.metadata(folder.absolute()).item_metadata.tree


def read_item(step_folder: Path, name: str, target: PyTree = None) -> PyTree:
    """One item of a step, checked; on one device, or with the shardings of a target."""
    folder = step_folder.absolute() / name
    shapes = read_shapes(folder)
    if target is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
    check_same_tree(target, shapes, str(folder))
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder, target)
    _verify(tree, read_contract(step_folder)["fingerprints"][name], folder)
    return tree


def is_checkpoint(path: Path) -> bool:
    """Whether a path is, or should be, a run, a step or saved parameters of ours."""
    if not path.is_dir():
        return False
    has_steps = any(p.name.isdigit() and p.is_dir() for p in path.iterdir())
    return (path / "contract").is_dir() or (path / "checkpoints").is_dir() or has_steps


def find_step(path: Path, step: int | None = None) -> Path:
    """The step folder that a path means: a run (its newest step, or the one given), or a step.

    Raises:
      InputError: there is no such run or step.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    if (path / "contract").is_dir() and step is None:
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(
        int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "contract").is_dir()
    )
    if not steps:
        raise InputError(f"{path} is no run directory and no checkpoint: it holds no finished step")
    if step is not None and step not in steps:
        raise InputError(f"{path} has no step {step}; it has {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def _params_item(step_folder: Path) -> str:
    return "ema" if (step_folder / "ema").is_dir() else "params"


def read_param_shapes(step_folder: Path) -> PyTree:
    """The shapes of what `read_params` would read."""
    return read_shapes(step_folder / _params_item(step_folder))


def read_params(step_folder: Path, target: PyTree = None) -> PyTree:
    """The parameters to use: their average where the step has one. See `read_item`."""
    return read_item(step_folder, _params_item(step_folder), target)
