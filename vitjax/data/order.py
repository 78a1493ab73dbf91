"""The order in which examples are seen, as a pure function of (seed, position)."""

from typing import Any

import numpy as np
from jaxtyping import Int

ROUNDS = 6


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser: a bijection of 64-bit words that spreads every bit over all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(positions: Int[np.ndarray, "P"], num_examples: int, seed: int) -> Int[np.ndarray, "P"]:
    """The example at each position of an endless sequence of shuffled epochs.

    Position p lies in epoch p // num_examples; every epoch holds each example once, in an order of
    its own. Nothing is stored for an example and nothing is replayed: any position costs the same.

    Args:
      positions: 0 or more; any integers, in any order.
      num_examples: the length of an epoch.
      seed: another seed gives another order.

    Source: a Feistel network over the next power of four, with cycle walking (Black and Rogaway
    2002). Grain shuffles with the same idea one index at a time; on arrays it costs a hundredth.
    """
    positions = np.asarray(positions, np.uint64)
    epoch = positions // np.uint64(num_examples)
    index = positions % np.uint64(num_examples)
    half = np.uint64(max(1, -(-max(num_examples - 1, 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15)) + epoch)
        keys = [_mix(key + np.uint64(i + 1)) for i in range(ROUNDS)]
        outside = np.ones(index.shape, bool)
        while outside.any():
            left, right = index[outside] >> half, index[outside] & mask
            for k in keys:
                left, right = right, left ^ (_mix(right + k[outside]) & mask)
            index[outside] = (left << half) | right
            outside = index >= np.uint64(num_examples)
    return index.astype(np.int64)
