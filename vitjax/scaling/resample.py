"""The bootstrap over whole groups of runs, never checkpoints, and intervals from its samples."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vitjax.errors import InputError


def group_codes(groups: Any, count: int) -> Int[np.ndarray, " runs"]:
    """A number from 0 for each run's group; without groups every run is one by itself.

    Args:
      groups: None, or a label a run. Runs that share a trunk (checkpoints or cooldown branches of
        one training) share a label: they are drawn together.
    """
    if groups is None:
        return np.arange(count)
    labels = np.asarray(groups)
    if labels.shape != (count,):
        raise InputError(
            f"groups has shape {labels.shape}; it needs one label for each of {count} runs"
        )
    return np.unique(labels, return_inverse=True)[1]


def draw_weights(
    codes: Int[np.ndarray, " runs"], resamples: int, seed: int
) -> Float[np.ndarray, "resamples runs"]:
    """Random weights of the runs: exponential by group, with a mean of one in each resample.

    To first order the same as drawing groups with replacement, and smoother: no resample loses a
    size or a budget altogether, which few groups would make common.

    Source: the Bayesian bootstrap, Rubin 1981, by cluster.
    """
    num_groups = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).exponential(size=(resamples, num_groups))
    return (drawn / drawn.mean(1, keepdims=True))[:, codes]


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level {level:g} is not between 0 and 1, such as 0.9")


def percentile_interval(
    samples: Float[np.ndarray, "resamples *shape"], level: float
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """The central interval over the first dimension; infinite samples are as good as others.

    Source: Efron and Tibshirani 1993, section 13.3. By nearest rank: an average of a finite number
    and infinity would say nothing.
    """
    check_level(level)
    ordered = np.sort(np.where(np.isnan(samples), np.inf, samples), axis=0)
    last, tail = len(ordered) - 1, (1 - level) / 2
    return ordered[round(tail * last), ...], ordered[round((1 - tail) * last), ...]
