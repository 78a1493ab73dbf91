"""Batches on the host: order, shards, decoding, faults, and reading ahead.

The training batch of step s is a pure function of (seed, s): it holds positions
[s * batch_size, (s + 1) * batch_size) of the shuffled order; each process reads the rows that its
devices hold.
So resuming needs no saved iterator, and any number of processes and threads gives the same batch.
"""

import collections
import concurrent.futures
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from vitjax.data.images import UnreadableImage, decode
from vitjax.data.order import shuffled
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources import Source
from vitjax.errors import InputError

log = logging.getLogger("vitjax")
HostBatch = dict[str, np.ndarray]


class Faults:
    """Counts unreadable examples and stops the run when there are too many.

    Attributes:
      max_fraction: of the examples read so far, once `min_examples` have been read; with three
        standard deviations of leave, so that a set with fewer is never stopped by an unlucky start.
    """

    def __init__(self, max_fraction: float = 0.01, min_examples: int = 100):
        self.max_fraction, self.min_examples = max_fraction, min_examples
        self.num_read = 0
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def seen(self, num_read: int) -> None:
        with self._lock:
            self.num_read += num_read

    def add(self, example_id: str, reason: str) -> None:
        """Records a fault; each example is reported once.

        Raises:
          InputError: the share of unreadable examples is above the limit.
        """
        with self._lock:
            is_new = example_id not in self.reasons
            self.reasons[example_id] = reason
            num_read = max(self.num_read, self.min_examples)
            count, allowed = len(self.reasons), self.max_fraction * num_read
        if is_new:
            log.warning(
                "unreadable example %s (%s): its neighbour takes its place", example_id, reason
            )
        if count > allowed + 3 * math.sqrt(allowed):  # more than chance makes of so many
            listed = "\n  ".join(f"{k}: {v}" for k, v in list(self.reasons.items())[:20])
            raise InputError(
                f"{count} of {num_read} examples read are unreadable, more than "
                f"{self.max_fraction:.1%} (data.max_unreadable_fraction):\n  {listed}"
            )


class Loader:
    """Reads, decodes and transforms examples of one source on a pool of threads.

    Args:
      transforms: for training, applied in order, each (image, generator) -> image; without them
        an image goes through the contract's evaluation path.
      max_labels: labels of a multi-label example are padded to this many with -1; None for
        single-label data.
      between: called before each batch of an evaluation, which it leaves by raising.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        transforms: Sequence[Any] = (),
        num_threads: int = 2,
        max_labels: int | None = None,
        max_unreadable_fraction: float = 0.01,
        between: Callable[[], None] = lambda: None,
    ):
        if num_threads < 1:
            raise InputError(f"data.num_threads must be at least 1, got {num_threads}")
        self.source, self.preprocess, self.transforms = source, preprocess, tuple(transforms)
        self.max_labels = max_labels
        self._between = between
        self.faults = Faults(max_unreadable_fraction)
        self._num_threads = num_threads
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, "vitjax-decode")

    def _example(self, index: int, generator: np.random.Generator | None) -> tuple[np.ndarray, Any]:
        """One example; an unreadable one is replaced by the next that can be read."""
        for offset in range(len(self.source)):
            record = self.source[(index + offset) % len(self.source)]
            try:
                image = decode(record["image"], self.preprocess.channels)
            except UnreadableImage as error:
                self.faults.add(record["id"], str(error))
                continue
            if generator is None or not self.transforms:
                return self.preprocess.fit(image), record["label"]
            for transform in self.transforms:
                image = transform(image, generator)
            return image, record["label"]
        raise InputError("no example of the source can be read")

    def _labels(self, labels: list) -> np.ndarray:
        if self.max_labels is None:
            return np.asarray(labels, np.int32)
        padded = np.full((len(labels), self.max_labels), -1, np.int32)
        for row, values in zip(padded, labels, strict=True):
            kept = values[: self.max_labels]
            row[: len(kept)] = kept
        return padded

    def _read(self, indices: np.ndarray, generators: Sequence) -> HostBatch:
        chunk = -(-len(indices) // self._num_threads)

        def work(start: int) -> list:
            rows = range(start, min(start + chunk, len(indices)))
            return [self._example(int(indices[i]), generators[i]) for i in rows]

        parts = self._pool.map(work, range(0, len(indices), max(chunk, 1)))
        examples = [example for part in parts for example in part]
        self.faults.seen(len(indices))
        size, channels = self.preprocess.image_size, self.preprocess.channels
        images = np.empty((len(examples), size, size, channels), np.uint8)
        for row, (image, _) in zip(images, examples, strict=True):
            row[...] = image
        return {"images": images, "labels": self._labels([label for _, label in examples])}

    def train_batch(
        self, step: int, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> HostBatch:
        """The given rows of the global batch of a step; all of them by default."""
        rows = np.arange(batch_size) if rows is None else rows
        positions, local = step * batch_size + rows, len(rows)
        indices = shuffled(positions, len(self.source), seed)
        if not self.transforms:
            return self._read(indices, [None] * local)
        keys = [np.random.Philox(key=[seed % 2**64, int(p)]) for p in positions]
        return self._read(indices, [np.random.Generator(key) for key in keys])

    def train_batches(
        self,
        first_step: int,
        batch_size: int,
        seed: int,
        num_ahead: int = 2,
        rows: np.ndarray | None = None,
    ) -> Iterator[HostBatch]:
        """Endless training batches from a step on, read `num_ahead` ahead by Grain."""
        steps = _Steps(lambda step: self.train_batch(first_step + step, batch_size, seed, rows))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=num_ahead)
        return iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def eval_batches(
        self, batch_size: int, num_ahead: int = 2, rows: np.ndarray | None = None
    ) -> Iterator[HostBatch]:
        """Every example exactly once, in order; `mask` is False for padding.

        Of each global batch the given rows; all of them by default.
        """
        rows = np.arange(batch_size) if rows is None else rows
        total, local = len(self.source), len(rows)

        def read(step: int) -> HostBatch:
            positions = step * batch_size + rows
            batch = self._read(np.minimum(positions, total - 1), [None] * local)
            return batch | {"mask": positions < total}

        steps = range(-(-total // batch_size))
        with concurrent.futures.ThreadPoolExecutor(1, "vitjax-eval") as ahead:
            waiting: collections.deque = collections.deque()
            for step in steps:
                waiting.append(ahead.submit(read, step))
                if len(waiting) > num_ahead:
                    self._between()
                    yield waiting.popleft().result()
            while waiting:
                self._between()
                yield waiting.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Steps(Sequence):
    """A function of the step as a random-access source, for Grain."""

    def __init__(self, read):
        self._read = read

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, step):
        return self._read(step)
