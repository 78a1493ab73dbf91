"""Loss and accuracy over every example of a set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.objectives.supervised import one_hot
from vitjax.parallel import batch_shards, on_mesh, process_rows, replicated, steps_ahead, to_global
from vitjax.state import prepare


class Classification:
    """Mean loss, and the share of examples whose top class is (among) the right one(s).

    Args:
      objective: with `logits` and `example_losses`.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, batch_size: int = 256):
        if batch_size < 1:
            raise InputError(f"the evaluation's batch_size must be at least 1, got {batch_size}")
        shards = batch_shards(mesh)
        self._batch_size = -(-batch_size // shards) * shards
        self._loader, self._mesh = loader, mesh

        def sums(params, extra, batch):
            batch = batch | {"images": prepare(batch["images"], loader.preprocess)}
            logits = objective.logits(params, extra, batch)
            mask = batch["mask"].astype(jnp.float32)
            top = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
            right = (top * one_hot(batch["labels"], logits.shape[-1])).sum(-1)
            losses = objective.example_losses(logits, batch)
            return jnp.stack([(losses * mask).sum(), (right * mask).sum(), mask.sum()])

        self._sums = jax.jit(on_mesh(sums, mesh), out_shardings=replicated(mesh))

    def __call__(self, state: Any) -> dict[str, float]:
        """Runs over the whole set."""
        totals: list[jax.Array] = []
        ahead = steps_ahead(self._mesh)
        rows = process_rows(self._mesh, self._batch_size)
        for batch in self._loader.eval_batches(self._batch_size, rows=rows):
            batch = to_global(batch, self._mesh, self._batch_size)
            totals.append(self._sums(state.eval_params, state.extra, batch))
            if len(totals) > ahead:
                totals[-1 - ahead].block_until_ready()
        loss, right, count = np.sum(jax.device_get(totals), axis=0)
        return {
            "loss": float(loss / count),
            "accuracy": float(right / count),
            "examples": int(count),
        }
