"""Whether a run may use a run directory: nobody else does, and it holds no other experiment."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from vitjax import config as config_lib
from vitjax import lock
from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.processes import Messages
from vitjax.telemetry import read_config, read_metrics

# What may change when a run goes on: nothing that the numbers of the run depend on, but for what
# is to happen to a run that goes wrong.
MAY_CHANGE = (
    "eval_every", "log_every", "checkpoint_every", "checkpoint.", "mesh", "evals.", "faults.",
    "monitor.", "data.num_threads", "data.num_ahead", "data.max_unreadable_fraction",
    "model.scan", "model.remat", "model.attention", "optimizer.accumulation_steps",
)  # fmt: skip


def check(workdir: Path, config: Config) -> None:
    """Raises InputError if the directory holds the run of another experiment; changes nothing."""
    old = read_config(workdir)
    if old is None:
        if (workdir / "checkpoints").exists():
            raise InputError(
                f"{workdir} holds checkpoints but no config.json; choose another workdir"
            )
        return
    if _is_empty(workdir):
        return
    old = config_lib.with_defaults(old, config_lib.plain(config_lib.base_config()))
    changed = config_lib.differences(old, config_lib.plain(config))
    changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if changed:
        shown = "\n  ".join(changed[:10])
        raise InputError(
            f"{workdir} holds the run of another experiment; choose another --workdir. "
            f"{len(changed)} keys differ:\n  {shown}"
        )


def _is_empty(workdir: Path) -> bool:
    """Whether a start got nowhere: nothing was saved, nothing measured."""
    return not any((workdir / "checkpoints").glob("[0-9]*")) and not read_metrics(workdir)


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """Makes the directory if need be, and holds it for this run while inside.

    Raises:
      InputError: it cannot be written, another run holds it, or it holds another experiment.
    """
    problem: str | None = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                (workdir / "train.log").open("a").close()
                problem = stack.enter_context(lock.on_run(workdir))
                if problem is None:
                    check(workdir, config)
                    if _is_empty(workdir):
                        (workdir / "config.json").unlink(missing_ok=True)
            except OSError as error:
                problem = f"cannot write to --workdir={workdir}: {error.strerror}"
            except InputError as error:
                problem = str(error)
        if problem := Messages("workdir").from_first(problem):
            raise InputError(problem)
        yield
