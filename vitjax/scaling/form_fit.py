"""One form on one set of points: the best parameters, resamples of them, profiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from vitjax.scaling.forms import Form
from vitjax.scaling.points import Points, noise_scale
from vitjax.scaling.solve import halton, minimise, minimise_each

NUM_STARTS, PART_STARTS = 32, 8
RESAMPLE_STEPS = 300  # a resample that is not fitted to the end stays too near to where it began
# A weak normal prior on the unbounded parameters: a parameter that the data say nothing about
# stays inside its bounds instead of drifting along a flat valley.
PRIOR_SD = 30.0
KEEP, HUBER = 1e6, 3.0  # where the loss turns linear, in units of the noise
PROFILE_STEPS, FARTHEST = 28, 12.0  # of a profile, and how far it goes in the unbounded scale


def _to_bounded(theta: Any, bounds: Any) -> Any:
    low, high = bounds[..., 0], bounds[..., 1]
    return low + (high - low) * jax.nn.sigmoid(theta)


def _bounded(theta: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The same on the host, for [..., P]; clipped, where exp would overflow."""
    low, high = bounds[..., 0], bounds[..., 1]
    return low + (high - low) / (1 + np.exp(-np.clip(theta, -500, 500)))


@functools.cache
def _objective(form: Form) -> Any:
    """Half the sum of squared residuals of ln y in units of the noise; parameters may be held."""

    def objective(theta, data):
        theta = jnp.where(data["is_held"] > 0, data["held"], theta)
        residual = form.predict(data["u"], _to_bounded(theta, data["bounds"])) - data["v"]
        size = jnp.abs(residual / data["scale"])
        delta = data["delta"]
        loss = jnp.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
        prior = 0.5 * jnp.sum((theta / PRIOR_SD) ** 2)
        return jnp.sum(data["weight"] * loss) + prior

    return objective


@functools.cache
def _predictor(form: Form) -> Any:
    return jax.jit(jax.vmap(form.predict, in_axes=(None, 0)))


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(length - len(values))])


def _padded_length(n: int) -> int:
    """Few different lengths, so that few programs are compiled."""
    return 16 if n <= 16 else 32 if n <= 32 else -(-n // 64) * 64


@dataclasses.dataclass(frozen=True)
class FormFit:
    """A form fitted to points.

    Attributes:
      theta: unbounded parameters [P]. bounds: [P, 2].
      num_agreeing: of NUM_STARTS starts, how many came to the same value.
      delta: see HUBER.
      scale: the noise in v that residuals are measured in.
    """

    form: Form
    points: Points
    theta: np.ndarray
    bounds: np.ndarray
    num_agreeing: int
    delta: float
    scale: float

    @property
    def internal(self) -> np.ndarray:
        return _bounded(self.theta, self.bounds)

    @property
    def params(self) -> dict[str, float]:
        """In the data's units, by the names of the form's formula."""
        return self.form.describe(self.internal, self.points.x_ref, self.points.y_ref)

    def log_predict(self, x: np.ndarray, internal: np.ndarray | None = None) -> np.ndarray:
        """ln y at x [N]: [N], or [R, N] for other bounded parameters [R, P]."""
        many = self.internal[None] if internal is None else internal
        u = np.log(np.asarray(x, np.float64) / self.points.x_ref)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            # Padded as the fit is, so that another number of x does not compile again.
            padded = _padded(u, _padded_length(len(u)))
            v = np.asarray(_predictor(self.form)(jnp.asarray(padded), jnp.asarray(many)))
        v = v[:, : len(u)] + np.log(self.points.y_ref)
        return v[0] if internal is None else v

    @functools.cached_property
    def residuals(self) -> np.ndarray:
        """ln y - ln prediction at the points, [N]."""
        return np.log(self.points.y) - self.log_predict(self.points.x)

    @property
    def free(self) -> int:
        """Degrees of freedom left for the noise."""
        return max(len(self.points) - self.form.num_params, 1)

    @property
    def noise(self) -> float:
        """Standard deviation of ln y around the law."""
        return max(float(np.sqrt((self.residuals**2).sum() / self.free)), 1e-12)

    @property
    def bounds_hit(self) -> tuple[str, ...]:
        """Parameters that ended within a thousandth of their range from a bound."""
        share = (self.internal - self.bounds[:, 0]) / (self.bounds[:, 1] - self.bounds[:, 0])
        hit = (share < 1e-3) | (share > 1 - 1e-3)
        return tuple(np.array(self.form.names)[hit])

    def _data(
        self,
        v: np.ndarray,
        weight: np.ndarray,
        rows: int,
        bounds: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """One problem repeated: [rows, ...]; the arguments may have the rows already."""
        bounds = self.bounds if bounds is None else bounds
        scale = np.full(rows, self.scale) if scale is None else scale
        length = _padded_length(len(self.points))
        pad = [(0, 0), (0, length - len(self.points))]
        num_params = self.form.num_params

        def each(values):
            return np.pad(np.broadcast_to(values, (rows, len(self.points))), pad)

        return {
            "u": each(self.points.u),
            "v": each(v),
            "weight": each(weight),
            "bounds": np.broadcast_to(bounds, (rows, *self.bounds.shape)),
            "scale": scale,
            "delta": np.full(rows, self.delta),
            "is_held": np.zeros((rows, num_params)),
            "held": np.zeros((rows, num_params)),
        }

    def resample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Bounded parameters [R, P] fitted to made-up data, and the noise [R] each was made with.

        Without groups, residuals are drawn with replacement; with groups (runs, or trunks with
        their branches) each group keeps its residuals, all multiplied by one normal number, so that
        what one run shares counts once: the wild cluster bootstrap. Residuals are widened for the
        degrees of freedom that the fit took, and the noise itself is drawn from its distribution,
        so that few points give wide intervals.

        Source: Efron and Tibshirani 1993; Cameron, Gelbach and Miller 2008.
        """
        generator = np.random.default_rng(seed)
        n, p, points = len(self.points), self.form.num_params, self.points
        independent = points.num_groups
        spread = independent / max(independent - p, 1)
        free = max(independent - p, 1)
        factor = np.sqrt(free / generator.chisquare(free, count))
        if points.is_grouped:
            signs = generator.standard_normal((count, independent))[:, points.groups]
            drawn = signs * self.residuals
        else:
            drawn = self.residuals[generator.integers(0, n, (count, n))]
        drawn = drawn * np.sqrt(spread) * factor[:, None]
        data = self._data(points.v - self.residuals + drawn, np.ones(n), count)
        starts = np.repeat(self.theta[None, None], count, 0)
        thetas, _ = minimise_each(_objective(self.form), starts, data, max_steps=RESAMPLE_STEPS)
        return _bounded(thetas, self.bounds), self.noise * factor

    def profile(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Intervals of the internal parameters by the likelihood ratio, by name.

        A parameter is moved away and all others fitted again; values stay in while the sum of
        squares rises by less than an F quantile allows. An interval that reaches a bound is
        reported as reaching it: the data do not limit that side.

        Source: Bates and Watts 1988, section 6.1.
        """
        p = self.form.num_params
        steps = np.geomspace(1e-5, FARTHEST, PROFILE_STEPS)
        offsets = np.concatenate([-steps, steps])
        rows = p * len(offsets)
        data = self._data(self.points.v, np.ones(len(self.points)), rows)
        index = np.repeat(np.arange(p), len(offsets))
        values = self.theta[index] + np.tile(offsets, p)
        data["is_held"][np.arange(rows), index] = 1.0
        data["held"][np.arange(rows), index] = values
        starts = np.repeat(self.theta[None, None], rows, 0)
        thetas, _ = minimise_each(_objective(self.form), starts, data, max_steps=RESAMPLE_STEPS)
        thetas[np.arange(rows), index] = values
        predicted = self.log_predict(self.points.x, _bounded(thetas, self.bounds))
        sums = ((np.log(self.points.y) - predicted) ** 2).sum(1).reshape(p, 2, len(steps))
        # The root of the rise grows about linearly with the distance, so that between the last
        # step inside and the first outside the limit is found by a straight line.
        rise = np.sqrt(np.maximum(sums - (self.residuals**2).sum(), 0.0)) / self.noise
        limit = np.sqrt(stats.f.ppf(level, 1, self.free))
        intervals = {}
        for i, name in enumerate(self.form.names):
            ends = []
            for side, sign in enumerate((-1.0, 1.0)):
                outside = np.flatnonzero(rise[i, side] > limit)
                if not len(outside):  # as good as the bound itself
                    ends.append(float(self.bounds[i, side]))
                    continue
                at = outside[0]
                inner, low = (steps[at - 1], rise[i, side, at - 1]) if at else (0.0, 0.0)
                part = (limit - low) / max(rise[i, side, at] - low, 1e-300)
                reach = inner + min(part, 1.0) * (steps[at] - inner)
                ends.append(float(_bounded(self.theta + sign * reach, self.bounds)[i]))
            intervals[name] = (ends[0], ends[1])
        return intervals

    @functools.cached_property
    def condition_number(self) -> float:
        """Of the Jacobian's normal matrix, with columns scaled to one: large means that the data
        cannot tell some combination of parameters apart."""
        step = 1e-4
        shifts = np.concatenate([np.eye(len(self.theta)), -np.eye(len(self.theta))]) * step
        moved = self.log_predict(self.points.x, _bounded(self.theta + shifts, self.bounds))
        half = len(self.theta)
        jacobian = (moved[:half] - moved[half:]).T / (2 * step)
        norms = np.linalg.norm(jacobian, axis=0)
        if not np.all(norms > 0):
            return float("inf")
        return float(np.linalg.cond(jacobian / norms) ** 2)


def _bounds(form: Form, points: Points, mask: np.ndarray | None = None) -> np.ndarray:
    u, v = points.u, points.v
    if mask is not None:
        u, v = u[mask], v[mask]
    return np.asarray(form.bounds(u.min(), u.max(), v.min(), v.max()), np.float64)


def _starts(form: Form, count: int) -> np.ndarray:
    cube = halton(count, form.num_params)
    return np.log(cube / (1 - cube))


def fit_form(form: Form, points: Points, *, delta: float = KEEP) -> FormFit:
    """Least squares of ln y, from NUM_STARTS starts spread over the bounds.

    With the Huber loss twice: outliers have widened the first estimate of the noise, and the second
    is the median size of the first fit's residuals.
    """
    bounds, scale = _bounds(form, points), points.scale
    fit = FormFit(form, points, np.zeros(form.num_params), bounds, 0, delta, scale)
    for _ in range(2 if delta < KEEP else 1):
        data = {k: v[0] for k, v in fit._data(points.v, np.ones(len(points)), 1).items()}
        found = minimise(_objective(form), _starts(form, NUM_STARTS), data)
        agreeing = found.num_agreeing(1e-3)
        fit = FormFit(form, points, found.best, bounds, agreeing, delta, scale)
        scale = max(1.4826 * float(np.median(np.abs(fit.residuals))), 1e-6)
        if delta < KEEP:
            fit = dataclasses.replace(fit, scale=scale)
    return fit


def fit_parts(fit: FormFit, masks: np.ndarray, num_starts: int = PART_STARTS) -> np.ndarray:
    """The same form on parts of the points, given by masks [R, N]: bounded parameters [R, P].

    Starts, bounds and the scale of the noise are those of each part; the optimum of the whole is no
    start, since it has seen what a part must not.
    """
    points = fit.points
    bounds = np.stack([_bounds(fit.form, fit.points, mask) for mask in masks])
    starts = np.repeat(_starts(fit.form, num_starts)[None], len(masks), 0)
    scales = np.full(len(masks), fit.scale)
    if fit.delta >= KEEP:
        scales = np.array([noise_scale(points.u[mask], points.v[mask]) for mask in masks])
    data = fit._data(points.v, masks.astype(float), len(masks), bounds, scales)
    thetas = minimise_each(_objective(fit.form), starts, data, max_steps=80)[0]
    return _bounded(thetas, bounds)
