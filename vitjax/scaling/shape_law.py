"""How one dimension of a ViT's shape (width, depth or MLP width) should grow with compute.

Source: Alabdulmohsin et al. 2023, "Getting ViT in Shape" (arXiv 2305.13035).
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.models.shapes import Shape
from vitjax.scaling.plain import plain
from vitjax.scaling.points import check_positive
from vitjax.scaling.projection import SMALLEST, nonnegative_least_squares
from vitjax.scaling.resample import draw_weights, group_codes, percentile_interval
from vitjax.scaling.solve import minimise, minimise_each

NAMES = ("alpha", "a", "beta", "b", "xi", "c", "eps")
GRID = np.geomspace(0.1, 2.5, 7)  # of each exponent, for the starts
NUM_STARTS = 48
MAX_SPAN = 4.0  # not identified: the central 90% of the exponent spans more than this factor
MIN_RUNS = len(NAMES) + 1
# The exponents of the paper, for image classification: dimension ~ t^s.
PUBLISHED = {"depth": 0.45, "width": 0.22, "mlp_dim": 0.60}


def _log_terms(z: Any, u: Any, w: Any, stack: Any) -> Any:
    """ln of the four terms, on a new last dimension; u = ln x, w = ln t, both centred."""
    alpha, a, beta, b, xi, c, eps = z
    a, b, c = stack.exp(a), stack.exp(b), stack.exp(c)
    flat = 0 * (u + w)
    return stack.stack(
        [alpha - a * u + flat, beta + b * u - c * w, xi - c * w + flat, eps + flat], -1
    )


def _objective(z: Any, data: Any) -> Any:
    """The weighted sum of squared relative errors of f against the loss, in JAX."""
    terms = jnp.exp(_log_terms(z, data["u"], data["w"], jnp) - data["v"][:, None])
    return jnp.sum(data["weights"] * (jnp.sum(terms, -1) - 1) ** 2) / 2


def _starts(
    u: np.ndarray, w: np.ndarray, v: np.ndarray, weights: np.ndarray, count: int
) -> Float[np.ndarray, "problems count 7"]:
    """The best cells of a grid over the exponents, by variable projection."""
    cells = np.array(list(itertools.product(GRID, repeat=3)))  # a, b, c
    terms = [np.exp(_log_terms(np.array([0, *np.log(cell[:1]), 0, *np.log(cell[1:2]), 0,
                                         *np.log(cell[2:]), 0]), u, w, np) - v[:, None])
             for cell in cells]  # fmt: skip
    columns = np.stack(terms)  # [cells, runs, 4]
    gram = np.einsum("pr,cri,crj->pcij", weights, columns, columns, optimize=True)
    right = np.einsum("pr,cri->pci", weights, columns, optimize=True)
    coefficients, value = nonnegative_least_squares(gram, right)
    order = np.argsort(value, axis=1, kind="stable")[:, :count]
    logs = np.log(np.maximum(np.take_along_axis(coefficients, order[..., None], 1), SMALLEST))
    exponents = np.log(cells)[order]
    ordered = [logs[..., 0], exponents[..., 0], logs[..., 1], exponents[..., 1], logs[..., 2],
               exponents[..., 2], logs[..., 3]]  # fmt: skip
    return np.stack(ordered, -1)


@dataclasses.dataclass(frozen=True)
class ShapeLaw:
    """f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + eps, and x*(t) ~ t^s with s = c / (a + b).

    Attributes:
      params: in the units of the columns.
      objective: half the sum of squared relative errors.
      not_identified: "exponent", or terms that left the law.
      flags: why the optimum should be read with care.
      centre: means of ln x, ln t, ln loss. samples: centred parameters, [R, 7].
    """

    params: dict[str, float]
    exponent: float
    objective: float
    num_runs: int
    num_starts: int
    num_agreeing: int
    not_identified: tuple[str, ...]
    flags: tuple[str, ...]
    seed: int
    centre: tuple[float, float, float] = dataclasses.field(repr=False)
    best: Float[np.ndarray, "7"] = dataclasses.field(repr=False)
    samples: Float[np.ndarray, "resamples 7"] = dataclasses.field(repr=False)

    def _check_samples(self) -> None:
        if not len(self.samples):
            raise InputError("the law was fitted with resamples=0; intervals need, say, 500")

    def predict(self, x: ArrayLike, t: ArrayLike) -> np.ndarray:
        u = np.log(np.asarray(x, np.float64)) - self.centre[0]
        w = np.log(np.asarray(t, np.float64)) - self.centre[1]
        terms = np.exp(_log_terms(self.best, u, w, np))
        return np.asarray(terms.sum(-1) * np.exp(self.centre[2]))

    def exponent_interval(self, level: float = 0.9) -> tuple[float, float]:
        self._check_samples()
        low, high = percentile_interval(_exponents(self.samples), level)
        return float(low), float(high)

    def optimum(self, t: ArrayLike) -> np.ndarray:
        """x*(t) = (alpha a t^c / (beta b))^(1 / (a + b)), at any t."""
        w = np.log(np.asarray(t, np.float64)) - self.centre[1]
        return np.asarray(np.exp(_log_optimum(self.best[None], w)[0] + self.centre[0]))

    def interval(self, t: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Of x*(t), by the bootstrap."""
        self._check_samples()
        w = np.log(np.asarray(t, np.float64)) - self.centre[1]
        with np.errstate(over="ignore"):  # a resample whose exponents nearly vanish
            return percentile_interval(
                np.exp(_log_optimum(self.samples, w) + self.centre[0]), level
            )

    def to_dict(self, level: float = 0.9) -> dict[str, Any]:
        content = {
            "law": "f = alpha x^-a + (beta x^b + xi) t^-c + eps; x* ~ t^s, s = c / (a + b)",
            "params": self.params,
            "exponent": self.exponent,
            "exponent_interval": self.exponent_interval(level) if len(self.samples) else None,
            "level": level,
            "objective": self.objective,
            "num_runs": self.num_runs,
            "num_starts": self.num_starts,
            "num_agreeing": self.num_agreeing,
            "not_identified": list(self.not_identified),
            "flags": list(self.flags),
            "resamples": len(self.samples),
            "seed": self.seed,
        }
        return plain(content)


def _exponents(z: np.ndarray) -> np.ndarray:
    a, b, c = np.exp(z[:, 1]), np.exp(z[:, 3]), np.exp(z[:, 5])
    return c / (a + b)


def _log_optimum(z: np.ndarray, w: Any) -> np.ndarray:
    """Centred ln x* by sample: [R, ...]."""
    z = z.T.reshape(len(NAMES), -1, *(1,) * np.ndim(w))
    a, b, c = np.exp(z[1]), np.exp(z[3]), np.exp(z[5])
    return (z[0] + z[1] - z[2] - z[3] + c * np.asarray(w)[None]) / (a + b)


def _check_design(x: np.ndarray, t: np.ndarray) -> None:
    shapes, scales = len(np.unique(x)), len(np.unique(t))
    if shapes < 3:
        raise InputError(
            f"an optimum of the shape needs at least 3 different values, got {shapes}: "
            f"{', '.join(f'{v:g}' for v in np.unique(x))}"
        )
    if scales < 3:
        raise InputError(
            "how the optimum moves needs at least 3 different scales of compute or examples, got "
            f"{scales}: {', '.join(f'{v:g}' for v in np.unique(t))}"
        )
    if len(x) < MIN_RUNS:
        raise InputError(f"{len(x)} runs are too few for {len(NAMES)} parameters: at least "
                         f"{MIN_RUNS}")  # fmt: skip


def fit_shape(
    shape_values: ArrayLike,
    scale: ArrayLike,
    loss: ArrayLike,
    *,
    groups: Any = None,
    resamples: int = 500,
    seed: int = 0,
) -> ShapeLaw:
    """Fits the law of one dimension, the others held at the centre of a star sweep.

    Args:
      shape_values: width, depth or MLP width of each run.
      scale: t, its compute or its examples.
      loss: its error or loss.
      groups: a label a run; runs of one trunk share it, and are drawn together.

    Raises:
      InputError: columns that are not positive or differ in length; fewer than 3 shapes or scales.

    Source: section 3.3; relative errors are minimised there too, from one start.
    """
    columns = check_positive(shape_values=shape_values, scale=scale, loss=loss)
    x, t = columns["shape_values"], columns["scale"]
    codes = group_codes(groups, len(x))
    _check_design(x, t)
    logs = [np.log(column) for column in columns.values()]
    centre = (float(logs[0].mean()), float(logs[1].mean()), float(logs[2].mean()))
    u, w, v = (column - mean for column, mean in zip(logs, centre, strict=True))
    ones = np.ones((1, len(x)))
    data = {"u": u, "w": w, "v": v, "weights": ones[0]}
    found = minimise(_objective, _starts(u, w, v, ones, NUM_STARTS)[0], data)
    z = found.best
    many = np.empty((0, len(NAMES)))
    if resamples:
        weights = draw_weights(codes, resamples, seed)
        own = _starts(u, w, v, weights, 1)
        starts = np.concatenate([np.broadcast_to(z, own.shape), own], 1)
        each = {k: np.broadcast_to(data[k], (resamples, len(x))) for k in ("u", "w", "v")}
        many, _ = minimise_each(_objective, starts, each | {"weights": weights})

    terms = np.exp(_log_terms(z, u, w, np) - v[:, None]).max(0)
    gone = [name for name, share in zip(("alpha", "beta", "xi", "eps"), terms, strict=True)
            if share < SMALLEST]  # fmt: skip
    if len(many):
        low, high = percentile_interval(_exponents(many), 0.9)
        if high > MAX_SPAN * low:
            gone.append("exponent")
    optima = np.exp(_log_optimum(z[None], w)[0] + centre[0])
    outside = (optima < x.min()) | (optima > x.max())
    flags = []
    if "alpha" in gone or "beta" in gone:
        flags.append("the loss only rises or only falls with the shape: no optimum")
    elif outside.any():
        flags.append(
            f"the optimum lies outside the shapes that were run at {len(np.unique(t[outside]))} of "
            f"{len(np.unique(t))} scales"
        )
    return ShapeLaw(
        params=_in_units(z, centre),
        exponent=float(_exponents(z[None])[0]),
        objective=float(found.values[0]),
        num_runs=len(x),
        num_starts=len(found.values),
        num_agreeing=found.num_agreeing(1e-3),
        not_identified=tuple(gone),
        flags=tuple(flags),
        seed=seed,
        centre=centre,
        best=z,
        samples=many,
    )


def _in_units(z: np.ndarray, centre: tuple[float, float, float]) -> dict[str, float]:
    u, w, v = centre
    a, b, c = np.exp(z[1]), np.exp(z[3]), np.exp(z[5])
    logs = {"alpha": z[0] + a * u, "beta": z[2] - b * u + c * w, "xi": z[4] + c * w, "eps": z[6]}
    with np.errstate(over="ignore"):
        params = {name: float(np.exp(value + v)) for name, value in logs.items()}
    params |= {"a": float(a), "b": float(b), "c": float(c)}
    return {name: params[name] for name in NAMES}


def scale_shape(
    width: float,
    depth: float,
    mlp_dim: float,
    factor: float,
    *,
    exponents: dict[str, float] | None = None,
    head_dim: int = 64,
    multiple: int = 16,
) -> Shape:
    """A starting shape that is best for its compute, scaled to `factor` times the compute.

    Each dimension k grows by factor^(s_k / 3): all three grow together, and each pays a third.

    Args:
      factor: tau, new compute over old.
      exponents: s_k by depth, width, mlp_dim, as `fit_shape` finds them; the published ones by
        default.
      head_dim: the width snaps to a multiple, so that heads divide it.
      multiple: the MLP width snaps to one.

    Source: section 4; w_k = 1/3.
    """
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim}
    exponents = PUBLISHED if exponents is None else exponents
    if set(exponents) != set(sizes):
        raise InputError(f"exponents for {sorted(exponents)}; needed: {sorted(sizes)}")
    steps = {"width": head_dim, "depth": 1, "mlp_dim": multiple}
    for name, value in {**sizes, **steps, "factor": factor}.items():
        if not value > 0:
            raise InputError(f"{name} must be above 0, got {value}")
    scaled = {name: size * factor ** (exponents[name] / 3) for name, size in sizes.items()}
    legal = {name: max(round(scaled[name] / step), 1) * step for name, step in steps.items()}
    return Shape(**legal, num_heads=legal["width"] // head_dim)
