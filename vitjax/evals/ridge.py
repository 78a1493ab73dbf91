"""Linear least squares with an L2 penalty, from sums that devices take.

Array letters: N rows, D features, C targets.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vitjax.errors import InputError

PENALTIES = tuple(10.0**p for p in range(-6, 3))  # of the mean squared error
HELD_OUT = 10  # one in so many chooses the penalty


@dataclasses.dataclass(frozen=True)
class Moments:
    """Weighted rows' means, and sums of products of what is left when the means are taken away.

    Attributes:
      count: the sum of weights.
      x, y: means, [D] and [C].
      xx, xy: sums of products, [D, D] and [D, C].
      yy: the sum of the targets' squares.
    """

    count: Any
    x: Any
    y: Any
    xx: Any
    xy: Any
    yy: Any


def take_moments(
    x: Float[Array, "N D"], y: Float[Array, "N C"], weight: Float[Array, "N"]
) -> dict[str, Array]:
    """The fields of `Moments` of a batch, float32; to be jitted."""
    x, y, w = x.astype(jnp.float32), y.astype(jnp.float32), weight[:, None]
    count = weight.sum()
    least = jnp.maximum(count, 1e-12)
    means = {"x": (w * x).sum(0) / least, "y": (w * y).sum(0) / least}
    x, y = x - means["x"][None], y - means["y"][None]

    def product(a, b):
        return jnp.matmul((w * a).T, b, precision=jax.lax.Precision.HIGHEST)

    sums = {"xx": product(x, x), "xy": product(x, y), "yy": (w * y * y).sum()}
    return {"count": count} | means | sums


def join(parts: Iterable[dict[str, Any] | Moments]) -> Moments:
    """The moments of all batches' rows together, float64.

    Raises:
      ValueError: there is no row in them.
    """
    fields = [p if isinstance(p, dict) else dataclasses.asdict(p) for p in parts]
    exact = [{k: np.asarray(v, np.float64) for k, v in part.items()} for part in fields]
    exact = [part for part in exact if part["count"] > 0]
    if not exact:
        raise ValueError("there is no row to take moments of")
    count = sum(part["count"] for part in exact)
    x = sum(part["count"] * part["x"] for part in exact) / count
    y = sum(part["count"] * part["y"] for part in exact) / count
    xx, xy, yy = 0.0, 0.0, 0.0
    for part in exact:
        off_x, off_y = part["x"] - x, part["y"] - y
        xx = xx + part["xx"] + part["count"] * np.outer(off_x, off_x)
        xy = xy + part["xy"] + part["count"] * np.outer(off_x, off_y)
        yy = yy + part["yy"] + part["count"] * off_y @ off_y
    return Moments(count, x, y, xx, xy, yy)


@dataclasses.dataclass(frozen=True)
class Linear:
    """y = x @ kernel + bias, on features as they are."""

    kernel: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, "C"]

    def __call__(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        return x.astype(np.float32) @ self.kernel.astype(np.float32) + self.bias[None]


def solve(moments: Moments, penalties: Sequence[float]) -> list[Linear]:
    """The ridge regression of each penalty, on features of deviation 1 and without one of the bias.

    It minimises the mean squared error (summed over targets) + penalty x the squared kernel. A
    feature that is always the same counts for nothing.
    """
    if not np.isfinite(moments.xx).all():  # of a model that has diverged: the most frequent class
        nothing = Linear(np.zeros_like(moments.xy), moments.y)
        return [nothing for _ in penalties]
    scale = np.sqrt(np.diag(moments.xx) / moments.count)
    scale = np.where(scale > 1e-6 * (1 + np.abs(moments.x)), scale, np.inf)
    covariance = moments.xx / moments.count / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(covariance)
    cross = vectors.T @ (moments.xy / moments.count / scale[:, None])
    found = []
    for penalty in penalties:
        shrunk = cross / (np.maximum(values, 0) + penalty)[:, None]
        kernel = (vectors @ shrunk) / scale[:, None]
        found.append(Linear(kernel, moments.y - moments.x @ kernel))
    return found


def squared_error(linear: Linear, moments: Moments) -> float:
    """The mean over rows of the squared error, summed over targets."""
    kernel = linear.kernel
    spread = moments.yy - 2 * (kernel * moments.xy).sum() + (kernel * (moments.xx @ kernel)).sum()
    off = moments.x @ kernel + linear.bias - moments.y
    return float(spread / moments.count + off @ off)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The regression on all rows, and how it came about.

    Attributes:
      linear: of all rows.
      on_kept: of the rows that were not held out, with the same penalty.
      penalty: the one with the smallest squared error on the rows held out.
      means: of the targets, over all rows: of one-hot targets the classes' shares.
    """

    linear: Linear
    on_kept: Linear
    penalty: float
    means: Float[np.ndarray, "C"]


def take_both(
    x: Float[Array, "N D"],
    y: Float[Array, "N C"],
    weight: Float[Array, "N"],
    is_held: Bool[Array, "N"],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The moments of the rows that are kept, and of those that are held out."""
    held = is_held.astype(jnp.float32)
    return take_moments(x, y, weight * (1 - held)), take_moments(x, y, weight * held)


def choose(
    parts: Iterable[tuple[dict[str, Any], dict[str, Any]]], penalties: Sequence[float] = PENALTIES
) -> Chosen:
    """The regression on all rows, its penalty chosen on those held out.

    Args:
      parts: what `take_both` gives of each batch.
    """
    kept, held = (join(side) for side in zip(*parts, strict=True))
    tried = solve(kept, penalties)
    best = int(np.argmin([squared_error(linear, held) for linear in tried]))
    whole = join([kept, held])
    return Chosen(solve(whole, [penalties[best]])[0], tried[best], penalties[best], whole.y)


def hold_out(total: int, seed: int = 0) -> Bool[np.ndarray, "N"]:
    """Which of so many examples choose: a fixed random tenth, at least one.

    Raises:
      InputError: there are fewer than two examples.
    """
    if total < 2:
        raise InputError(
            f"train_source has {total} image; a probe needs at least 2, one of them held out"
        )
    held = np.zeros(total, bool)
    held[np.random.default_rng(seed).permutation(total)[: max(1, total // HELD_OUT)]] = True
    return held


def check_penalties(penalties: Sequence[float]) -> None:
    """Looks at them before anything is computed.

    Raises:
      InputError: there is none, or one is not positive.
    """
    if not penalties or not all(p > 0 for p in penalties):
        raise InputError(f"penalties must be positive numbers, got {tuple(penalties)}")
