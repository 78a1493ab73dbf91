"""Loss and accuracy over every example of a set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vitjax.data.loader import Loader
from vitjax.evals.passes import Pass
from vitjax.objectives.supervised import one_hot


class Classification:
    """Mean loss, and the share of examples whose top class is (among) the right one(s).

    Args:
      objective: with `logits` and `example_losses`.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, batch_size: int = 256):
        def sums(params, extra, batch):
            logits = objective.logits(params, extra, batch)
            mask = batch["mask"].astype(jnp.float32)
            top = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
            right = (top * one_hot(batch["labels"], logits.shape[-1])).sum(-1)
            losses = objective.example_losses(logits, batch)
            return jnp.stack([(losses * mask).sum(), (right * mask).sum(), mask.sum()])

        self._sums = Pass(sums, loader, mesh, batch_size)

    def __call__(self, state: Any) -> dict[str, float]:
        """Runs over the whole set."""
        loss, right, count = np.sum(list(self._sums(state)), axis=0)
        return {
            "loss": float(loss / count),
            "accuracy": float(right / count),
            "examples": int(count),
        }
