"""Starting a run from the weights of another (`init.checkpoint`)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from vitjax import parallel
from vitjax.checkpoint import find_step, read_param_shapes, read_params
from vitjax.experiment import Experiment
from vitjax.optim import match
from vitjax.state import TrainState, check_same_tree


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_init(exp: Experiment) -> None:
    """Compares the model with `init.checkpoint`, apart from what `init.skip` matches.

    Raises:
      InputError: there is no checkpoint, or it is of another model; names the first leaves.
    """
    settings, params = exp.config.init, exp.abstract_state.params
    where = find_step(Path(settings.checkpoint))
    match(settings.skip, params, "init.skip")

    def kept(tree):
        named = {parallel.path_name(p): x for p, x in jax.tree.leaves_with_path(tree)}
        return {n: x for n, x in named.items() if not _matches(settings.skip, n)}

    check_same_tree(kept(params), kept(read_param_shapes(where)), str(where))


def load_init(exp: Experiment, fresh: TrainState) -> TrainState:
    """Puts the parameters of `init.checkpoint` into a fresh state, apart from `init.skip`."""
    settings = exp.config.init
    loaded = read_params(find_step(Path(settings.checkpoint)))
    by_name = {parallel.path_name(p): x for p, x in jax.tree.leaves_with_path(loaded)}

    def pick(path, fresh_leaf, sharding):
        name = parallel.path_name(path)
        is_kept = _matches(settings.skip, name)
        return fresh_leaf if is_kept else jax.device_put(by_name[name], sharding)

    params = jax.tree.map_with_path(pick, fresh.params, exp.state_shardings.params)
    ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), params)
    return dataclasses.replace(fresh, params=params, ema=ema)
