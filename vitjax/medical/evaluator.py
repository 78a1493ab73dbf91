"""An evaluator of cohorts: the scores of every image, and how well they rank the units."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.medical.scoring import mean_auroc, probabilities, to_units
from vitjax.parallel import (
    batch_shards,
    on_mesh,
    process_rows,
    replicated,
    steps_ahead,
    to_global,
    to_host,
)
from vitjax.state import prepare


class Scores:
    """The logits of each example, the same in all processes.

    As an evaluator it gives the loss over the images and the mean AUROC over the units: what early
    stopping looks at.

    Args:
      objective: `objectives.label_sets:LabelSets`.
      loader: of a `CohortSource`.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, batch_size: int = 256):
        if batch_size < 1:
            raise InputError(f"the evaluation's batch_size must be at least 1, got {batch_size}")
        shards = batch_shards(mesh)
        self._batch_size = -(-batch_size // shards) * shards
        self._loader, self._mesh, self._objective = loader, mesh, objective

        def logits(params, extra, batch):
            batch = batch | {"images": prepare(batch["images"], loader.preprocess)}
            found = objective.logits(params, extra, batch)
            return found, batch["labels"], batch["mask"]

        self._logits = jax.jit(on_mesh(logits, mesh), out_shardings=replicated(mesh))

    def all(
        self, params: Any, extra: Any
    ) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N W"]]:
        """Logits and labels of every example, in order; NaN where an image cannot be read."""
        found: list[Any] = []
        waiting: collections.deque = collections.deque()
        ahead = steps_ahead(self._mesh)
        rows = process_rows(self._mesh, self._batch_size)
        for batch in self._loader.eval_batches(self._batch_size, rows=rows):
            batch = to_global(batch, self._mesh, self._batch_size)
            waiting.append(self._logits(params, extra, batch))
            if len(waiting) > ahead:
                found.append(to_host(waiting.popleft()))
        found += [to_host(f) for f in waiting]
        logits, labels, mask = (np.concatenate(parts) for parts in zip(*found, strict=True))
        total = len(self._loader.source)
        logits = np.where(mask[:, None], logits.astype(np.float64), np.nan)
        return logits[:total], labels[:total]

    def __call__(self, state: Any) -> dict[str, float]:
        """The loss and the mean AUROC of the sets, over the examples that can be read."""
        logits, labels = self.all(state.eval_params, state.extra)
        is_read = np.isfinite(logits).all(1)
        logits, labels = logits[is_read], labels[is_read]
        targets, known = self._objective.targets(jnp.asarray(labels))
        losses = self._objective.losses(jnp.asarray(logits, jnp.float32), targets, known)
        source: Any = self._loader.source
        cohort = source.cohort
        scored = to_units(cohort, source.rows[is_read], probabilities(cohort.label_sets, logits))
        return {"loss": float(sum(losses)), "auroc": mean_auroc(scored), "examples": len(labels)}
