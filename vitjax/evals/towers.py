"""Embeddings of an image-text model over a whole set, on the host, the same in all processes."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from vitjax.data.loader import Loader
from vitjax.errors import InputError
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


class Towers:
    """Embeds images and texts in batches.

    Args:
      objective: with `embed_images` and `embed_texts`, such as `objectives.contrastive`'s.
      loader: of the images; it has the run's tokenizer.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.

    Raises:
      InputError: the objective has no text tower, or the run no tokenizer.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, batch_size: int):
        if batch_size < 1:
            raise InputError(f"the evaluation's batch_size must be at least 1, got {batch_size}")
        if not hasattr(objective, "embed_texts"):
            raise InputError(
                f"the objective {type(objective).__name__} has no text tower, which this "
                "evaluation needs"
            )
        if loader.tokenizer is None:
            raise InputError("this evaluation needs data.tokenizer")
        shards = batch_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.loader, self.mesh, self._tokenizer = loader, mesh, loader.tokenizer

        def images(params, batch):
            found = objective.embed_images(params, prepare(batch["images"], loader.preprocess))
            return found, batch["labels"], batch["mask"]

        whole = replicated(mesh)
        self._images = jax.jit(on_mesh(images, mesh), out_shardings=whole)
        texts = on_mesh(lambda params, batch: objective.embed_texts(params, batch["texts"]), mesh)
        self._texts = jax.jit(texts, out_shardings=whole)

    def _all(self, function: Any, params: Any, batches: Iterator[Any]) -> list[Any]:
        """Results of all batches, with no more of them in flight than the mesh bears."""
        found: list[Any] = []
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append(function(params, to_global(batch, self.mesh, self.batch_size)))
            if len(waiting) > steps_ahead(self.mesh):
                found.append(to_host(waiting.popleft()))
        return found + [to_host(f) for f in waiting]

    def images(
        self, params: Any
    ) -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, "N ..."], Bool[np.ndarray, "N"]]:
        """Embeddings and labels of every example, in order, and which of them could be read."""
        rows = process_rows(self.mesh, self.batch_size)
        batches = self.loader.eval_batches(self.batch_size, rows=rows)
        found = self._all(self._images, params, batches)
        embeddings, labels, mask = (np.concatenate(parts) for parts in zip(*found, strict=True))
        total = len(self.loader.source)
        return embeddings[:total], labels[:total], mask[:total]

    def texts(self, params: Any, texts: Sequence[str]) -> Float[np.ndarray, "M D"]:
        """Embeddings of texts, of length one."""
        rows = process_rows(self.mesh, self.batch_size)

        def batches():
            for start in range(0, len(texts), self.batch_size):
                places = np.minimum(start + rows, len(texts) - 1)
                yield {"texts": np.stack([self._tokenizer(texts[int(i)]) for i in places])}

        return np.concatenate(self._all(self._texts, params, batches()))[: len(texts)]
