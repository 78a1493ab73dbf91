"""Whether features still tell images apart.

Array letters: N images, D width.
"""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals.features import Features
from vitjax.objectives.health import feature_std

log = logging.getLogger("vitjax")
EPS = 1e-7


def effective_rank(x: Float[np.ndarray, "N D"]) -> float:
    """RankMe: exp of the entropy of the singular values, which are scaled to sum to 1.

    Source: Garrido et al. 2023 (arXiv 2210.02885), equations 1 and 2, with their 1e-7; of features
    as they are, not centred.
    """
    x = x.astype(np.float64)
    product = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))
    shares = values / max(values.sum(), 1e-30) + EPS
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(x: Float[np.ndarray, "N D"]) -> float:
    """The mean over all pairs of different images."""
    x = x.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    count, total = len(x), x.sum(0)
    return float((total @ total - (x * x).sum()) / max(count * (count - 1), 1))


class Health:
    """Numbers that fall to nothing when a self-supervised run collapses.

    A run counts as collapsed if its features are not finite, if their effective rank is below
    `min_rank` (all lie on a line), or if the mean cosine between images is above `max_cosine` (all
    point the same way).

    Args:
      objective: with `embed`.
      loader: of the set; at least two images.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
      num_images: evenly spread over the set, at most; as many as RankMe's.
      min_rank, max_cosine: see above.

    Raises:
      InputError: fewer than two images.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        num_images: int = 25600,
        min_rank: float = 2.0,
        max_cosine: float = 0.999,
    ):
        if min(num_images, len(loader.source)) < 2:
            raise InputError(
                "the health of features needs at least 2 images, got num_images="
                f"{num_images} of {len(loader.source)}"
            )
        self._num_images, self._min_rank, self._max_cosine = num_images, min_rank, max_cosine
        self._features = Features(objective, loader, mesh, batch_size)

    def __call__(self, state: Any) -> dict[str, float]:
        """`effective_rank`; `mean_cosine`; `std`, of features of length 1, times sqrt(D), about 1
        where they point anywhere; `collapsed`, 0 or 1. Features that are not finite have zeros."""
        found = self._features(state)
        step = -(-len(found) // self._num_images)
        x = found.features[::step]
        is_finite = bool(np.isfinite(x).all())
        x = x if is_finite else np.zeros_like(x)
        numbers = {
            "effective_rank": effective_rank(x),
            "mean_cosine": mean_cosine(x),
            "std": float(feature_std(jnp.asarray(x))),
        }
        is_low = numbers["effective_rank"] < self._min_rank
        is_one_way = numbers["mean_cosine"] > self._max_cosine
        if not is_finite or is_low or is_one_way:
            log.warning(
                "the features have collapsed: %seffective rank %.3g of %d, mean cosine %.5f",
                "" if is_finite else "they are not finite, ",
                numbers["effective_rank"],
                min(x.shape),
                numbers["mean_cosine"],
            )
        collapsed = float(not is_finite or is_low or is_one_way)
        return numbers | {"collapsed": collapsed, "examples": len(x)}
