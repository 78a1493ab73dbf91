"""What the columns say about their own units: FLOPs a parameter and example."""

import numpy as np
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.scaling.points import check_positive

# FLOPs a parameter and token, by what may have been counted: 2 x MAC forward, twice that backward.
COUNTS = {"training FLOPs": 6.0, "training MACs": 3.0, "forward FLOPs": 2.0, "forward MACs": 1.0}
PREFIXES = {"": 1.0, "mega": 1e-6, "giga": 1e-9, "tera": 1e-12, "peta": 1e-15, "exa": 1e-18}
MAX_SPREAD = 2.0  # between the largest and the smallest ratio of the runs
MAX_TOKENS = 1e5  # an example, where their number is not given


def _likely_unit(ratio: float) -> str:
    """The count and prefix whose ratio is nearest, for one token an example."""
    distance = {
        (prefix, count): abs(np.log(ratio / (scale * factor)))
        for prefix, scale in PREFIXES.items()
        for count, factor in COUNTS.items()
    }
    prefix, count = min(distance, key=lambda key: distance[key])
    return f"{prefix}{count}" if not prefix else f"{prefix} {count}"


def flops_factor(
    num_params: ArrayLike,
    num_examples: ArrayLike,
    flops: ArrayLike,
    *,
    tokens_per_example: float | None = None,
    max_spread: float = MAX_SPREAD,
) -> float:
    """k of C = k N D: the median over the runs, in training FLOPs (2 x MAC, 3 x forward).

    Args:
      tokens_per_example: 1 where D counts tokens; patches and prefix tokens of an image. Given, k
        must be near 6 of them; without it, only what no number of tokens explains is refused.
      max_spread: largest over smallest ratio of the runs. It is above 1 since embeddings and
        attention are a different share of each size.

    Raises:
      InputError: the ratio differs too much between runs, or belongs to another unit; names the
        likely one.
    """
    columns = check_positive(num_params=num_params, num_examples=num_examples, flops=flops)
    ratio = columns["flops"] / columns["num_params"] / columns["num_examples"]
    if not len(ratio):
        raise InputError("no runs to take FLOPs / (N D) from")
    low, high = int(np.argmin(ratio)), int(np.argmax(ratio))
    if ratio[high] > max_spread * ratio[low]:
        raise InputError(
            f"flops / (num_params x num_examples) is {ratio[low]:.4g} in row {low} and "
            f"{ratio[high]:.4g} in row {high} (counted from 0), more than {max_spread:g} times "
            "apart: the columns do not share a unit, or FLOPs are not proportional to N D here"
        )
    k = float(np.median(ratio))
    tokens = 1.0 if tokens_per_example is None else tokens_per_example
    per_token = k / tokens
    # Halfway, in logarithms, to training MACs; and up to three times 6, for attention.
    if per_token < np.sqrt(COUNTS["training FLOPs"] * COUNTS["training MACs"]):
        raise InputError(
            f"flops / (num_params x num_examples x {tokens:g} tokens) is {per_token:.3g}, but "
            f"training takes about 6: the column looks like {_likely_unit(per_token)}. Convert it "
            "to training FLOPs (2 x MAC, forward and backward = 3 x forward)"
        )
    if per_token > (MAX_TOKENS * 6 if tokens_per_example is None else 18):
        raise InputError(
            f"flops / (num_params x num_examples x {tokens:g} tokens) is {per_token:.3g}, but "
            "training takes about 6: num_params or num_examples look like thousands or millions, "
            "or an example holds more tokens"
        )
    return k
