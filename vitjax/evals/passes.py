"""A pass over a set: a jitted function of each of its batches, with the results on the host."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

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

PyTree = Any


def round_up(size: int, mesh: Mesh, name: str = "the evaluation's batch_size") -> int:
    """A batch size that the devices divide.

    Raises:
      InputError: it is not positive.
    """
    if size < 1:
        raise InputError(f"{name} must be at least 1, got {size}")
    shards = batch_shards(mesh)
    return -(-size // shards) * shards


class Pass:
    """Every example of a set exactly once, in order, the same results in all processes.

    Args:
      function: pure, `(params, extra, batch, *given) -> tree of arrays`, jitted here. The batch has
        what the loader gives, sharded over the data axes, and: `images`, normalised; `pixels`, the
        images as uint8; `index` int32 [B], which example it is; `mask` [B], False for padding and
        for what cannot be read.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
    """

    def __init__(
        self, function: Callable[..., PyTree], loader: Loader, mesh: Mesh, batch_size: int
    ):
        self.batch_size = round_up(batch_size, mesh)
        self._loader, self._mesh = loader, mesh

        def run(params, extra, batch, *given):
            images = prepare(batch["images"], loader.preprocess)
            batch = batch | {"images": images, "pixels": batch["images"]}
            return function(params, extra, batch, *given)

        self._run = jax.jit(on_mesh(run, mesh), out_shardings=replicated(mesh))

    def __call__(
        self, state: Any, *given: PyTree, num_images: int | None = None
    ) -> Iterator[PyTree]:
        """The function's results, batch by batch.

        Args:
          given: handed to the function after the batch, whole on every device.
          num_images: the first so many examples; all by default.
        """
        total = len(self._loader.source)
        total = total if num_images is None else min(total, num_images)
        rows, ahead = process_rows(self._mesh, self.batch_size), steps_ahead(self._mesh)
        waiting: collections.deque = collections.deque()
        batches: Any = self._loader.eval_batches(self.batch_size, rows=rows)
        with contextlib.closing(batches):
            starts = range(0, total, self.batch_size)
            for start, batch in zip(starts, batches, strict=False):
                index = (start + rows).astype(np.int32)
                batch = batch | {"index": index, "mask": batch["mask"] & (index < total)}
                batch = to_global(batch, self._mesh, self.batch_size)
                waiting.append(self._run(state.eval_params, state.extra, batch, *given))
                if len(waiting) > ahead:
                    yield to_host(waiting.popleft())
        while waiting:
            yield to_host(waiting.popleft())
