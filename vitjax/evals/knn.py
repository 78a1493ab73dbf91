"""Accuracy of the nearest training images' vote. Nothing is trained.

Array letters: Q queries, N training images, D width, K numbers of neighbours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals.features import Features, check_classes
from vitjax.evals.passes import round_up
from vitjax.parallel import (
    DATA_AXES,
    batch_sharding,
    batch_shards,
    process_rows,
    replicated,
    to_global,
    to_host,
)

FAR = -jnp.inf


def unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows of length one, float32; zeros stay zeros."""
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def make_vote(
    mesh: Mesh, neighbours: Sequence[int], temperature: float, num_classes: int
) -> Callable[[Any, Array, Array], Int[Array, "K Q"]]:
    """A jitted function of unit queries [Q, D], unit training features [N, D] and labels [N].

    The training features lie over the data axes, and labels of -1 are padding. Each device looks
    for the nearest of its own part; only those are then compared with the other devices'. Of
    equally near ones the first in order counts.

    Returns:
      The class that most neighbours, weighted by exp(cosine / temperature), have, for each number
      of neighbours.
    """
    largest = max(neighbours)

    def local(queries, train, labels):
        similar = jnp.matmul(queries, train.T, precision=jax.lax.Precision.HIGHEST)
        similar = jnp.where((labels >= 0)[None], similar, FAR)
        values, places = jax.lax.top_k(similar, min(largest, train.shape[0]))
        found = labels[places]
        values, found = (
            jax.lax.all_gather(part, DATA_AXES, axis=1, tiled=True) for part in (values, found)
        )
        values, places = jax.lax.top_k(values, largest)
        found = jnp.take_along_axis(found, places, axis=1)
        weights = jnp.exp((values - 1) / temperature)

        def votes(weights, found):
            return jnp.zeros(num_classes).at[found].add(weights)

        return jnp.stack(
            [jax.vmap(votes)(weights[:, :k], found[:, :k]).argmax(1) for k in neighbours]
        )

    split, whole = batch_sharding(mesh).spec, replicated(mesh).spec
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, split, split), out_specs=whole, check_vma=False
    )
    return jax.jit(run)


class KNN:
    """Exact nearest neighbours by cosine, weighted by exp(cosine / temperature).

    No device holds more than `block_size` rows of similarities to its own part of the training set.

    Args:
      objective: with `embed`.
      loader: of the set that is scored.
      train_loader: of the set whose images vote, its images as at evaluation.
      mesh: where it runs.
      batch_size: of the images, global; rounded up to what the devices divide.
      neighbours: how many vote; each gives a result.
      temperature: of the weights.
      block_size: images that are scored at a time.

    Raises:
      InputError: more neighbours than training images, or a number that is not positive.

    Source: Wu et al. 2018 (arXiv 1805.01978); numbers and temperature as DINO's (Caron et al. 2021,
    arXiv 2104.14294, github.com/facebookresearch/dino, eval_knn.py). As there, the best number of
    neighbours is that of the set which is scored.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        train_loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        neighbours: Sequence[int] = (10, 20),
        temperature: float = 0.07,
        block_size: int = 256,
    ):
        total = len(train_loader.source)
        if not neighbours or not all(1 <= k <= total for k in neighbours):
            raise InputError(
                f"neighbours must be in 1 to {total}, the number of training images, got "
                f"{tuple(neighbours)}"
            )
        if not temperature > 0:
            raise InputError(f"temperature must be positive, got {temperature}")
        num_classes = check_classes(loader, train_loader)
        self._neighbours, self._mesh, self._loader = tuple(neighbours), mesh, loader
        self._block_size = round_up(block_size, mesh, "block_size")
        self._features = Features(objective, loader, mesh, batch_size)
        self._train_features = Features(objective, train_loader, mesh, batch_size)
        self._vote = make_vote(mesh, self._neighbours, temperature, num_classes)

    def __call__(self, state: Any) -> dict[str, float]:
        """`accuracy_kN` of each number of neighbours; the best as `accuracy`, and its `best_k`."""
        train, scored = self._train_features(state), self._features(state)
        memory = self._spread(train.features, train.labels)
        queries, right = unit(scored.features), np.zeros(len(self._neighbours), np.int64)
        for start in range(0, len(queries), self._block_size):
            self._loader.between()
            block = queries[start : start + self._block_size]
            missing = self._block_size - len(block)
            padded = np.pad(block, ((0, missing), (0, 0)))
            found = to_host(self._vote(padded, *memory))[:, : len(block)]
            right += (found == scored.labels[None, start : start + len(block)]).sum(1)
        shares = right / len(queries)
        best = int(shares.argmax())
        named = zip(self._neighbours, shares, strict=True)
        return {f"accuracy_k{k}": float(share) for k, share in named} | {
            "accuracy": float(shares[best]),
            "best_k": self._neighbours[best],
            "examples": len(queries),
        }

    def _spread(
        self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"]
    ) -> tuple[Array, Array]:
        """The training set over the data axes, padded with labels of -1."""
        shards = batch_shards(self._mesh)
        part = max(-(-len(labels) // shards), -(-max(self._neighbours) // shards))
        size = shards * part
        missing = size - len(labels)
        rows = process_rows(self._mesh, size)
        whole = {
            "features": np.pad(unit(features), ((0, missing), (0, 0))),
            "labels": np.pad(labels, (0, missing), constant_values=-1),
        }
        placed = to_global({k: v[rows] for k, v in whole.items()}, self._mesh, size)
        return placed["features"], placed["labels"]
