"""One evaluation: every evaluator on one state, what they share, and their pictures."""

import contextlib
import contextvars
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitjax import config as config_lib
from vitjax.errors import InputError, suggest

log = logging.getLogger("vitjax")
_kept: contextvars.ContextVar[dict[Hashable, Any] | None] = contextvars.ContextVar(
    "kept", default=None
)


@contextlib.contextmanager
def one_evaluation() -> Iterator[None]:
    """Inside it, what `once` computes is kept until the end. All of it is of one state."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(key: Hashable, compute: Callable[[], Any]) -> Any:
    """What `compute` gives; in one evaluation it is called the first time only."""
    kept = _kept.get()
    if kept is None:
        return compute()
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def loader_name(key: str) -> str:
    """The argument that takes a block's source: `train_loader` for `train_source`."""
    return key.removesuffix("source") + "loader"


def take_sources(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes the keys that end with "source", unless they are None, out of an evaluator's block.

    Args:
      name: of the block, for messages.

    Raises:
      InputError: one is missing that the evaluator needs, or there is one that it does not take.
    """
    keys = [key for key in spec if key.endswith("source")]
    sources = {key: source for key in keys if (source := spec.pop(key)) is not None}
    if not sources:
        raise InputError(f"{name} has no source")
    target = spec.get("target", "")
    parameters = inspect.signature(config_lib.resolve(target)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return sources
    takes = {p.removesuffix("loader") + "source": parameters[p].default is inspect.Parameter.empty
             for p in parameters if p.endswith("loader")}  # fmt: skip
    for key in sources:
        if key not in takes:
            raise InputError(f"{name}: {target} takes no {key}; {suggest(key, takes)}")
    for key, is_needed in takes.items():
        if is_needed and key not in sources:
            raise InputError(f"{name} has no {key}, which {target} needs")
    return sources


def run(evaluators: Mapping[str, Any], state: Any) -> tuple[dict[str, float], dict[str, bytes]]:
    """Runs them all, in every process alike.

    Returns:
      "eval/NAME/METRIC" and its number; "NAME/PICTURE" and a PNG, of evaluators with `pictures`.
    """
    results: dict[str, float] = {}
    pictures: dict[str, bytes] = {}
    with one_evaluation():
        for name, evaluator in evaluators.items():
            results |= {f"eval/{name}/{k}": v for k, v in evaluator(state).items()}
            if hasattr(evaluator, "pictures"):
                pictures |= {f"{name}/{k}": png for k, png in evaluator.pictures(state).items()}
    return results, pictures


def write_pictures(workdir: Path, pictures: Mapping[str, bytes], step: int) -> None:
    """Writes `workdir/pictures/NAME/PICTURE-STEP.png`. One that cannot be written, as on a full
    disk, is left out with a warning: the numbers are worth more."""
    for name, png in pictures.items():
        path = workdir / "pictures" / f"{name}-{step}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror)
