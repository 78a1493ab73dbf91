"""The order in which examples are seen, as a pure function of (seed, position)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from vitjax.data.sources import Source
from vitjax.errors import InputError, suggest

ROUNDS = 6
SAMPLINGS = ("examples", "classes", "groups")
Positions = Int[np.ndarray, "P"]


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser: a bijection of 64-bit words that spreads every bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(
    positions: Positions,
    num_examples: int | Positions,
    seed: int,
    sequence: int | Positions = 0,
) -> Positions:
    """The example at each position of an endless sequence of shuffled epochs.

    Position p lies in epoch p // num_examples; every epoch holds each example once, in an order of
    its own. Nothing is stored for an example and nothing is replayed: any position costs the same.

    Args:
      positions: 0 or more; any integers, in any order.
      num_examples: the length of an epoch, or one for each position.
      seed: another seed gives another order.
      sequence: numbers of sequences with orders of their own, one for each position.

    Source: a Feistel network over the next power of four, with cycle walking (Black and Rogaway
    2002). Grain shuffles with the same idea one index at a time; on arrays it costs a hundredth.
    """
    positions = np.asarray(positions, np.uint64)
    length = np.broadcast_to(np.asarray(num_examples, np.uint64), positions.shape)
    epoch, index = positions // length, positions % length
    # The exponent of n - 1 is its number of bits.
    bits = np.maximum(np.frexp((np.maximum(length, 2) - np.uint64(1)).astype(np.float64))[1], 1)
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15))
        key = _mix(key + np.asarray(sequence, np.uint64) * np.uint64(0xD1342543DE82EF95) + epoch)
        keys = [_mix(key + np.uint64(i + 1)) for i in range(ROUNDS)]
        outside = np.ones(index.shape, bool)
        while outside.any():
            here, low = half[outside], mask[outside]
            left, right = index[outside] >> here, index[outside] & low
            for k in keys:
                left, right = right, left ^ (_mix(right + k[outside]) & low)
            index[outside] = (left << here) | right
            outside = index >= length
    return index.astype(np.int64)


@runtime_checkable
class Order(Protocol):
    """Which example stands at each position of a training run."""

    @property
    def epoch(self) -> int:
        """How many positions make an epoch."""
        ...

    def __call__(self, positions: Positions) -> Positions: ...


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every example once an epoch."""

    epoch: int
    seed: int

    def __call__(self, positions: Positions) -> Positions:
        return shuffled(positions, self.epoch, self.seed)


class Balanced:
    """Every class, or group, equally often, whatever its size.

    Each run of G positions, G the number of groups, holds every group once, in a shuffled order;
    of a group the examples take turns, each once before any comes again. An epoch has as many
    positions as there are examples: of small groups it repeats examples, of large ones some wait
    for the next epoch.

    Args:
      groups: a number or a name for each example.
    """

    def __init__(self, groups: Sequence | np.ndarray, seed: int):
        numbers = _numbered(np.asarray(groups))
        if not len(numbers):
            raise InputError("there are no examples to draw from")
        self.epoch, self._seed = len(numbers), seed
        members = np.argsort(numbers, kind="stable")
        self._members = members.astype(np.int32) if len(members) < 2**31 else members
        self._sizes = np.bincount(numbers)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    def __call__(self, positions: Positions) -> Positions:
        count = len(self._sizes)
        group = shuffled(positions, count, self._seed)
        turn = shuffled(positions // count, self._sizes[group], self._seed, group + 1)
        return self._members[self._starts[group] + turn].astype(np.int64)


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Numbers without gaps from 0 on, in the order of the values; narrow ones are sorted fast."""
    if not np.issubdtype(groups.dtype, np.integer) or not len(groups) or groups.min() < 0:
        numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
    else:
        is_there = np.bincount(groups) > 0
        numbers = groups if is_there.all() else (np.cumsum(is_there) - 1)[groups]
    return numbers.astype(np.uint16) if len(groups) and numbers.max() < 2**16 else numbers


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Every example several times in a row, each time with other random transforms.

    Source: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335), as DeiT trains.
    """

    order: Order
    repeats: int

    @property
    def epoch(self) -> int:
        return self.order.epoch * self.repeats

    def __call__(self, positions: Positions) -> Positions:
        return self.order(positions // self.repeats)


def make_order(source: Source, sampling: str, repeats: int, seed: int) -> Order:
    """The order that a config's data block asks for.

    Args:
      source: for "classes" it must tell `all_labels()`, for "groups" `all_groups()`.
      sampling: "examples", "classes" or "groups": what comes equally often.

    Raises:
      InputError: the source does not tell, or has several labels an example.
    """
    if sampling not in SAMPLINGS:
        raise InputError(f"unknown data.sampling {sampling!r}; {suggest(sampling, SAMPLINGS)}")
    if repeats < 1:
        raise InputError(f"data.repeats must be at least 1, got {repeats}")
    order: Order = Shuffled(len(source), seed)
    if sampling != "examples":
        tell = getattr(source, "all_labels" if sampling == "classes" else "all_groups", None)
        of_each = None if tell is None else tell()
        if of_each is None:
            raise InputError(
                f'data.sampling="{sampling}" needs a source that tells the {sampling} of its '
                f"examples beforehand; {type(source).__name__} does not"
            )
        if sampling == "classes" and len(of_each) and not np.isscalar(of_each[0]):
            raise InputError('data.sampling="classes" needs one label an example')
        order = Balanced(of_each, seed)
    return Repeated(order, repeats) if repeats > 1 else order
