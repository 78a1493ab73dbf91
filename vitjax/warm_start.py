"""Starting a run from other weights (`init.checkpoint`), ours or in any format that is read."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitjax import experiment
from vitjax import precision as precision_lib
from vitjax.checkpoints import steps, store
from vitjax.data.preprocess import Preprocess
from vitjax.experiment import Experiment
from vitjax.interop.layout import named_leaves, nested
from vitjax.interop.merge import Merge, plan_merge
from vitjax.models.functional import Model
from vitjax.objectives.objective import at, put
from vitjax.optim import match
from vitjax.state import TrainState

log = logging.getLogger("vitjax")
# What the input must share for weights to mean the same; another is said, not refused.
CONTRACT = ("mean", "std", "value_range")


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights to start from: their shapes, their model, their contract, and how to read them."""

    shapes: dict[str, Any]
    model: Model | None
    contract: dict[str, Any]
    read: Any


def _open(path: Path) -> _Weights:
    if steps.is_checkpoint(path):
        step = steps.find_step(path)
        contract = store.read_contract(step)
        part, place = steps.model_place(contract)
        shapes = named_leaves(at(store.shapes_in(contract, part), place))
        preprocess = Preprocess.from_dict(contract["preprocess"])
        model = experiment.make_model(contract["model"], preprocess, precision_lib.Precision())
        return _Weights(shapes, model, contract, lambda: steps.model_weights(step, contract))
    from vitjax.interop import read  # slow to import, and seldom needed

    imported = read.open_model(path)
    shapes = named_leaves(imported.model.abstract_params)
    return _Weights(shapes, imported.model, imported.contract, imported.read)


def _warn_of_input(exp: Experiment, contract: dict[str, Any]) -> None:
    for name in CONTRACT:
        theirs, ours = contract["preprocess"].get(name), getattr(exp.preprocess, name)
        channels = max(len(theirs), len(ours)) if name != "value_range" else 2

        def spread(values, channels=channels):
            return list(values) * (channels if len(values) == 1 else 1)

        a, b = spread(theirs), spread(ours)
        if len(a) != len(b) or not np.allclose(a, b):
            log.warning(
                "init.checkpoint was trained on images with data.%s=%s, this run has %s",
                name, tuple(theirs), tuple(ours),
            )  # fmt: skip


def _plan(exp: Experiment, weights: _Weights) -> Merge:
    settings = exp.config.init
    whole = _parts(exp.abstract_state, exp.objective.PLACES[0])
    match(settings.skip, whole, "init.skip")
    params = named_leaves(whole)
    return plan_merge(
        weights.shapes,
        weights.model,
        params,
        exp.model,
        skip=settings.skip,
        drop=settings.drop,
        where=str(settings.checkpoint),
    )


def check_init(exp: Experiment, tell: bool = True) -> None:
    """Compares the model with `init.checkpoint`, and tells what would become of every array.

    Raises:
      InputError: there are no weights, or arrays differ that are not listed; names the first.
    """
    weights = _open(Path(exp.config.init.checkpoint))
    report = _plan(exp, weights).report
    if not tell:
        return
    _warn_of_input(exp, weights.contract)
    log.info("starting from %s\n%s", exp.config.init.checkpoint, report)


def load_init(exp: Experiment, fresh: TrainState) -> TrainState:
    """Puts the weights of `init.checkpoint` into a fresh state, apart from `init.skip`, wherever
    the objective keeps parameters of the model."""
    weights = _open(Path(exp.config.init.checkpoint))
    merge, read = _plan(exp, weights), named_leaves(weights.read())
    state = fresh
    for place in exp.objective.PLACES:
        wanted = named_leaves(_parts(fresh, place))
        taken = merge.apply(read, wanted)
        shardings = named_leaves(_parts(exp.state_shardings, place))

        def put_on_devices(name: str, taken=taken, wanted=wanted, shardings=shardings) -> Any:
            value = taken[name]
            if value is wanted[name]:
                return value
            return jax.device_put(np.asarray(value, wanted[name].dtype), shardings[name])

        part, *keys = place
        filled = nested({name: put_on_devices(name) for name in wanted})
        whole = put(getattr(state, part), tuple(keys), filled)
        state = dataclasses.replace(state, **{part: whole})
    if state.ema is not None:
        ema = jax.tree.map(lambda x: x.copy(), state.params)
        state = dataclasses.replace(state, ema=ema)
    return state


def _parts(state: TrainState, place: tuple[str, ...]) -> Any:
    return at(getattr(state, place[0]), place[1:])


def first_state(exp: Experiment) -> TrainState:
    """The state that a run begins with: drawn, and then filled from `init.checkpoint`."""
    state = exp.fresh_state()
    if hasattr(exp.objective, "first_extra"):
        extra = exp.objective.first_extra(exp.state_shardings.extra)
        state = dataclasses.replace(state, extra=extra)
    if not exp.config.init.checkpoint:
        return state
    state = load_init(exp, state)
    log.info("parameters from %s", exp.config.init.checkpoint)
    return state
