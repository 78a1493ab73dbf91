"""A module class bound to its arguments, as a pair of pure functions.

Modules only define layers; parameters live outside them as plain nested dicts of arrays, so that
optimizers, EMA, checkpoints and sharding are ordinary tree operations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A module, used functionally.

    Attributes:
      module: an `nnx.Module` class whose constructor takes `**arguments` and `rngs`.
      arguments: name and value pairs of the constructor, hashable.
      description: facts about the model that travel with a checkpoint (patch size, pooling, ...).
      flops_per_image: forward FLOPs (2 x MAC) of one image.
    """

    module: Callable[..., nnx.Module]
    arguments: tuple[tuple[str, Any], ...]
    description: tuple[tuple[str, Any], ...] = ()
    flops_per_image: int = 0

    def _build(self, key: jax.Array) -> nnx.Module:
        return self.module(**dict(self.arguments), rngs=nnx.Rngs(params=key))

    @property
    def _split(self) -> tuple[Any, PyTree]:
        return _split(self)

    @property
    def abstract_params(self) -> PyTree:
        """The parameters' shapes and types, with nothing allocated."""
        return jax.tree.map(lambda leaf: leaf, self._split[1])  # dicts of the caller's own

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))

    @functools.partial(jax.jit, static_argnums=0)  # traced once for all equal models
    def init(self, key: jax.Array) -> PyTree:
        """Draws parameters; pure, so it can be jitted with sharded outputs."""
        return nnx.to_pure_dict(nnx.split(self._build(key))[1])

    def apply(self, params: PyTree, *args, **kwargs) -> Any:
        """Calls the module with the given parameters."""
        return nnx.merge(self._split[0], nnx.State(params))(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _split(model: Model) -> tuple[Any, PyTree]:
    """What equal models share: a search of meshes builds one model hundreds of times."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model._build(jax.random.key(0))))
    return graphdef, nnx.to_pure_dict(state)
