"""Numbers that warn of a run that is about to diverge, cheap enough to leave on.

Array letters: L layers, G groups of parameters (each layer, and each part outside the layers).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.parallel import on_mesh, path_name, replicated, to_host

PyTree = Any
NORMS = ("grad_norm", "param_norm", "update_norm")


def _models(params: PyTree) -> set[tuple[str, ...]]:
    """Where the models in the tree begin: in front of stacked blocks, and at its root."""
    paths = [path_name(path).split("/") for path, _ in jax.tree.leaves_with_path(params)]
    return {()} | {tuple(parts[: parts.index("blocks")]) for parts in paths if "blocks" in parts}


def _part(path: tuple, models: set[tuple[str, ...]]) -> str:
    """The part of its model that a leaf belongs to, such as "head" or "encoder/blocks"."""
    parts = path_name(path).split("/")
    start = max(len(model) for model in models if tuple(parts[: len(model)]) == model)
    return "/".join(parts[: start + 1])


def _is_stacked(part: str) -> bool:
    return part.split("/")[-1] == "blocks"


def layer_names(params: PyTree) -> tuple[str, ...]:
    """The names of the groups that `layer_norms` tells apart, in its order.

    Args:
      params: arrays or their shapes. Leaves under "blocks" are stacked over layers.

    Returns:
      "blocks/00", "blocks/01", ... for the layers, and the first part of the path ("head") for
      all else; with several models in one tree "encoder/blocks/00", "encoder/patch_embed".
    """
    models, depths = _models(params), {}
    for path, leaf in jax.tree.leaves_with_path(params):
        part = _part(path, models)
        depths[part] = leaf.shape[0] if _is_stacked(part) else None
    names = []
    for part, depth in depths.items():
        names += [part] if depth is None else [f"{part}/{i}" for i in _numbers(depth)]
    return tuple(names)


def _numbers(depth: int) -> list[str]:
    """The layers' numbers, of one width, so that they sort."""
    width = max(2, len(str(depth - 1)))
    return [f"{index:0{width}d}" for index in range(depth)]


def _norms(tree: PyTree) -> Float[Array, "G"]:
    models, sums = _models(tree), {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        part = _part(path, models)
        dims = tuple(range(_is_stacked(part), leaf.ndim))
        # One expression, which the compiler fuses: no copy of the leaf, wide or squared.
        squares = jnp.square(leaf.astype(jnp.float32)).sum(dims).reshape(-1)
        sums[part] = sums[part] + squares if part in sums else squares
    return jnp.sqrt(jnp.concatenate(list(sums.values())))


def layer_norms(params: PyTree, grads: PyTree, updates: PyTree) -> Float[Array, "3 G"]:
    """L2 norms of gradients, parameters and updates, of each group of `layer_names`.

    Pure, for the jitted training step, under any mesh; in float32 whatever the leaves are.

    Args:
      params, grads, updates: trees of one structure.
    """
    return jnp.stack([_norms(tree) for tree in (grads, params, updates)])


def named_norms(names: Sequence[str], values: Float[np.ndarray, "3 G"]) -> dict[str, float]:
    """The result of `layer_norms` as metrics: "layers/grad_norm/blocks/00" and so on."""
    return {
        f"layers/{kind}/{name}": float(value)
        for kind, row in zip(NORMS, values, strict=True)
        for name, value in zip(names, row, strict=True)
    }


class AttentionLogits:
    """The largest attention logit of every layer, on a few images.

    Logits that keep growing warn of a loss that diverges; QK-norm (model.qk_norm) bounds them.

    Args:
      experiment: a `vitjax.experiment.Experiment`; its objective has a `model`.
      num_images: at most; a smaller batch is taken as a whole.

    Raises:
      InputError: the model has no attention blocks, or num_images is not positive.

    Source: Dehghani et al. 2023 (ViT-22B, arXiv 2302.05442), section 2; Wortsman et al. 2023
    (arXiv 2309.14322), section 3.1.
    """

    def __init__(self, experiment: Any, num_images: int = 8):
        from vitjax.state import prepare  # whose training step may compute the norms above

        if num_images < 1:
            raise InputError(f"num_images must be at least 1, got {num_images}")
        objective, preprocess = experiment.objective, experiment.preprocess

        def max_logits(params, images):
            images = prepare(images[:num_images], preprocess)
            trained = objective.trained(params)
            seen = objective.model.apply(trained, images, intermediates=True)
            return seen.get("blocks", {}).get("max_logit")

        params, images = experiment.abstract_state.params, experiment.abstract_batch["images"]
        if jax.eval_shape(max_logits, params, images) is None:
            raise InputError(
                "monitor.attention_logits needs a Vision Transformer; "
                f"{experiment.config.model.target} has no attention blocks"
            )
        mesh = experiment.mesh
        self._max_logits = jax.jit(on_mesh(max_logits, mesh), out_shardings=replicated(mesh))

    def __call__(self, state: Any, batch: dict[str, Array]) -> dict[str, float]:
        """Runs the parameters in training (not their average) on a batch as the step gets it.

        Returns:
          "attention/max_logit/00" and so on, |q k| / sqrt(K) as it enters the softmax, over all
          heads, queries and keys; and "attention/max_logit", the largest of all layers.
        """
        values = to_host(self._max_logits(state.params, batch["images"]))
        named = zip(_numbers(len(values)), values, strict=True)
        layers = {f"attention/max_logit/{number}": float(value) for number, value in named}
        return layers | {"attention/max_logit": float(values.max())}


class GrowthAlarm:
    """Says when a value is too large, and again only when it has doubled since.

    Raises:
      InputError: the limit is not positive.
    """

    def __init__(self, limit: float):
        if not limit > 0:
            raise InputError(f"the limit of an alarm must be positive, got {limit}")
        self._limit, self._last = limit, 0.0

    def __call__(self, value: float) -> bool:
        """Whether to raise the alarm. A value that is not finite is larger than all others."""
        size = value if math.isfinite(value) else math.inf
        is_large = size == math.inf or (size > self._limit and size >= 2 * self._last)
        if not is_large or self._last == math.inf:
            return False
        self._last = size
        return True
