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

from vitjax import cpu
from vitjax.data.images import decode, size_of
from vitjax.data.order import Order, make_order
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources import Source
from vitjax.data.text import Tokenizer
from vitjax.errors import InputError, UnreadableImage

log = logging.getLogger("vitjax")
CHUNK = 4  # examples that a thread takes at a time
HostBatch = dict[str, np.ndarray]


class Faults:
    """Counts unreadable examples and stops the run when there are too many.

    Args:
      total: how many examples there are.
      max_fraction: of the examples met so far, or of `min_examples` before that; with three
        standard deviations of leave, so that a set with fewer is never stopped by an unlucky start.
    """

    def __init__(self, total: int, max_fraction: float = 0.01, min_examples: int = 100):
        self.total, self.max_fraction, self.min_examples = total, max_fraction, min_examples
        self.num_read = 0
        self.reasons: dict[str, str] = {}
        self._num_told = 0
        self._lock = threading.Lock()

    def metrics(self) -> dict[str, Any]:
        """How many there are, and the ids of those that this has not told yet, if any."""
        with self._lock:
            ids, told = list(self.reasons), self._num_told
            self._num_told = len(ids)
        row: dict[str, Any] = {"data/unreadable": len(ids)}
        return row | ({"data/unreadable_ids": ids[told:]} if ids[told:] else {})

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
            num_read = min(max(self.num_read, self.min_examples), self.total)
            count, allowed = len(self.reasons), self.max_fraction * num_read
        if is_new:
            log.warning(
                "unreadable example %s (%s): in training its neighbour takes its place, an "
                "evaluation leaves it out", example_id, reason,
            )  # fmt: skip
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
        an image goes through the contract's evaluation path. Of the first that has `region` and
        `resize` (see RandomResizedCrop) these are called, and only the region is decoded.
      num_threads: that decode; one a core by default; 0 decodes where batches are read.
      sampling, repeats: see `make_order`.
      max_labels: labels of a multi-label example are padded to this many with -1; None for
        single-label data. Of a source with `num_targets` a label is so many numbers, NaN where
        unknown; with `num_inputs` its records have "inputs" beside the image.
      tokenizer: of a source that `has_captions`, whose batches have "texts" then. In training one
        of an example's captions is drawn for each position, at evaluation the first is taken.
      between: called before each batch of an evaluation, which it leaves by raising.

    Of a source with `num_mask_classes` evaluations have "masks" uint8 [B, Y, X] too, as its
    `fitted_mask(record, preprocess)` gives them.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        transforms: Sequence[Any] = (),
        num_threads: int | None = None,
        max_labels: int | None = None,
        tokenizer: Tokenizer | None = None,
        max_unreadable_fraction: float = 0.01,
        sampling: str = "examples",
        repeats: int = 1,
        between: Callable[[], None] = lambda: None,
    ):
        if num_threads is None:
            num_threads = cpu.usable_cores()
        if num_threads < 0:
            raise InputError(f"data.num_threads must be 0 or more, got {num_threads}")
        self.source, self.preprocess, self.transforms = source, preprocess, tuple(transforms)
        self.max_labels, self.tokenizer = max_labels, tokenizer
        self.between = between
        self.faults = Faults(len(source), max_unreadable_fraction)
        self._sampling, self._repeats = sampling, repeats
        self._orders: dict[int, Order] = {}
        self._pool = None
        if num_threads:
            self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, "vitjax-decode")

    def order(self, seed: int) -> Order:
        """Which example stands where in training."""
        if seed not in self._orders:
            order = make_order(self.source, self._sampling, self._repeats, seed)
            self._orders = {seed: order}
        return self._orders[seed]

    def _one(self, index: int, position: int | None, seed: int, out: np.ndarray) -> Any:
        """Reads one example's image into `out`; returns its record, or None if it cannot be
        read."""
        example_id = f"example {index}"
        try:
            record = self.source[index]
            example_id = record["id"]
            self._image(record["image"], position, seed, out)
            return record
        except UnreadableImage as error:
            self.faults.add(example_id, str(error))
            return None

    def _example(self, index: int, position: int, seed: int, out: np.ndarray) -> Any:
        """One example for training; for an unreadable one the next that can be read."""
        total = len(self.source)
        for offset in range(total):
            record = self._one((index + offset) % total, position, seed, out)
            if record is not None:
                return record
        raise InputError("no example of the source can be read")

    def _image(self, image: Any, position: int | None, seed: int, out: np.ndarray) -> None:
        channels = self.preprocess.channels
        if position is None or not self.transforms:
            out[...] = self.preprocess.fit(decode(image, channels))
            return
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, position]))
        first, *others = self.transforms
        if hasattr(first, "region"):  # then no more than that is decoded
            height, width = size_of(image)
            region = first.region(height, width, generator)
            part = decode(image, channels, region, least=(out.shape[0], out.shape[1]))
            if not others:
                first.resize(part, out)
                return
            fitted = first.resize(part)
        else:
            fitted = first(decode(image, channels), generator)
        for transform in others:
            fitted = transform(fitted, generator)
        out[...] = fitted

    def _text(self, captions: Sequence[str], position: int | None, seed: int) -> np.ndarray:
        assert self.tokenizer is not None
        if position is None or len(captions) == 1:
            return self.tokenizer(captions[0])
        # Another stream than the transforms' at this position, so that they have nothing in common.
        stream = np.random.Philox(key=[seed % 2**64, position], counter=[0, 0, 0, 1])
        drawn = int(np.random.Generator(stream).integers(len(captions)))
        return self.tokenizer(captions[drawn])

    def _labels(self, labels: list) -> np.ndarray:
        if getattr(self.source, "num_targets", None) is not None:
            return np.stack(labels).astype(np.float32)
        if self.max_labels is None:
            found = np.asarray(labels, np.int32)
            least = 0
        else:
            found, least = np.full((len(labels), self.max_labels), -1, np.int32), -1
            for row, values in zip(found, labels, strict=True):
                if len(values) > self.max_labels:
                    raise InputError(
                        f"an example has {len(values)} labels, more than data.max_labels="
                        f"{self.max_labels}"
                    )
                row[: len(values)] = values
        if found.size and not least <= found.min() <= found.max() < self.source.num_classes:
            wrong = found.max() if found.max() >= self.source.num_classes else found.min()
            raise InputError(
                f"an example has the label {wrong}, but the source has classes 0 to "
                f"{self.source.num_classes - 1}"
            )
        return found

    def _read(
        self, indices: np.ndarray, positions: np.ndarray | None = None, seed: int = 0
    ) -> HostBatch:
        """A batch: as a training run sees it at these positions, or for an evaluation, where what
        cannot be read is black, with a False in `mask`."""
        size, channels = self.preprocess.image_size, self.preprocess.channels
        images = np.empty((len(indices), size, size, channels), np.uint8)
        width = getattr(self.source, "num_targets", None)
        no_label: Any = 0 if self.max_labels is None else []
        no_label = no_label if width is None else np.full(width, np.nan)
        labels: list[Any] = [no_label] * len(indices)
        num_inputs = getattr(self.source, "num_inputs", 0)
        inputs = np.full((len(indices), num_inputs), np.nan, np.float32)
        mask = np.ones(len(indices), bool)
        texts = None
        if self.tokenizer is not None and getattr(self.source, "has_captions", False):
            texts = np.zeros((len(indices), self.tokenizer.length), np.int32)
        source: Any = self.source
        has_masks = positions is None and hasattr(source, "num_mask_classes")
        masks = np.zeros(images.shape[:3] if has_masks else 0, np.uint8)

        def work(start: int) -> None:
            for row in range(start, min(start + CHUNK, len(indices))):
                index = int(indices[row])
                position = None if positions is None else int(positions[row])
                if position is not None:
                    record = self._example(index, position, seed, images[row])
                else:
                    record = self._one(index, None, seed, images[row])
                if record is None:
                    images[row], mask[row] = 0, False
                    continue
                labels[row] = record["label"]
                if num_inputs:
                    inputs[row] = record["inputs"]
                if texts is not None:
                    texts[row] = self._text(record["captions"], position, seed)
                if has_masks:
                    masks[row] = source.fitted_mask(record, self.preprocess)

        starts = range(0, len(indices), CHUNK)
        for _ in map(work, starts) if self._pool is None else self._pool.map(work, starts):
            pass
        self.faults.seen(len(indices))
        batch = {"images": images, "labels": self._labels(labels)}
        if num_inputs:
            batch["inputs"] = inputs
        if texts is not None:
            batch["texts"] = texts
        if has_masks:
            batch["masks"] = masks
        return batch if positions is not None else batch | {"mask": mask}

    def train_batch(
        self, step: int, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> HostBatch:
        """The given rows of the global batch of a step; all of them by default."""
        rows = np.arange(batch_size) if rows is None else rows
        positions = step * batch_size + rows
        return self._read(self.order(seed)(positions), positions, seed)

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
        ahead = max(1, num_ahead)
        options = grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
        return iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def eval_batches(
        self, batch_size: int, num_ahead: int = 2, rows: np.ndarray | None = None
    ) -> Iterator[HostBatch]:
        """Every example exactly once, in order; `mask` is False for padding and for examples that
        cannot be read.

        Of each global batch the given rows; all of them by default.
        """
        rows = np.arange(batch_size) if rows is None else rows
        total = len(self.source)

        def read(step: int) -> HostBatch:
            positions = step * batch_size + rows
            batch = self._read(np.minimum(positions, total - 1))
            return batch | {"mask": batch["mask"] & (positions < total)}

        steps = range(-(-total // batch_size))
        with concurrent.futures.ThreadPoolExecutor(1, "vitjax-eval") as ahead:
            waiting: collections.deque = collections.deque()
            for step in steps:
                waiting.append(ahead.submit(read, step))
                if len(waiting) > num_ahead:
                    self.between()
                    yield waiting.popleft().result()
            while waiting:
                self.between()
                yield waiting.popleft().result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Steps(Sequence):
    """A function of the step as a random-access source, for Grain."""

    def __init__(self, read):
        self._read = read

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, step):
        return self._read(step)
