"""The optimisation behind E + A/N^alpha + B/D^beta: the robust objective, its minima, its theory.

Parameters z = (ln E, ln A, ln B, ln alpha, ln beta), where E, A and B are those of the centred
problem: n, d, v are ln N, ln D, ln L less their means, so that A and B are the two terms in the
middle of the data and not at one parameter and one example.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import special

from vitjax.scaling.projection import projected_starts
from vitjax.scaling.solve import Solutions, minimise, minimise_each

NAMES: tuple[str, ...] = ("E", "A", "B", "alpha", "beta")
ROWS = (
    32  # runs are filled up to a multiple, with weight 0: one compiled program serves many tables
)
CONTINUATION = (30.0, 5.0, 1.0)  # the Huber thresholds on the way, in units of the last
BEST_STARTS, SPREAD_STARTS = 32, 32
PROFILE_STEPS = 14


def objective(z: Any, data: Any) -> Any:
    """The sum over runs of weight x Huber(ln prediction - ln loss), in JAX.

    One parameter may be held at a value in the user's units, and beta may be tied to alpha.
    """
    e, a, b, log_alpha, log_beta = z
    log_alpha = jnp.where(data["is_held"][3] > 0, data["held"], log_alpha)
    log_beta = jnp.where(data["is_held"][4] > 0, data["held"], log_beta)
    log_beta = jnp.where(data["is_tied"] > 0, log_alpha, log_beta)
    alpha, beta = jnp.exp(log_alpha), jnp.exp(log_beta)
    n_mean, d_mean, v_mean = data["centre"]
    e = jnp.where(data["is_held"][0] > 0, data["held"] - v_mean, e)
    a = jnp.where(data["is_held"][1] > 0, data["held"] - v_mean - alpha * n_mean, a)
    b = jnp.where(data["is_held"][2] > 0, data["held"] - v_mean - beta * d_mean, b)
    predicted = jnp.logaddexp(jnp.logaddexp(a - alpha * data["n"], b - beta * data["d"]), e)
    size, delta = jnp.abs(predicted - data["v"]), data["delta"]
    huber = jnp.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
    return jnp.sum(data["weights"] * huber)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The runs of a fit, centred.

    Attributes:
      n, d, v: logarithms less their means, [runs]. weights: [runs].
      centre: the means of ln N, ln D, ln L.
      delta: the Huber threshold.
      independent: how many groups of runs; what degrees of freedom are counted from.
    """

    n: np.ndarray
    d: np.ndarray
    v: np.ndarray
    weights: np.ndarray
    centre: tuple[float, float, float]
    delta: float
    is_tied: bool
    independent: int

    @property
    def num_free(self) -> int:
        return 4 if self.is_tied else 5

    def data(self, rows: int, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The same problem `rows` times, each with weights of its own, [rows, runs], if given."""
        missing = -len(self.n) % ROWS

        def each(values):
            return np.broadcast_to(np.pad(values, (0, missing)), (rows, len(values) + missing))

        weights = np.broadcast_to(self.weights if weights is None else weights, (rows, len(self.n)))
        return {
            "n": each(self.n),
            "d": each(self.d),
            "v": each(self.v),
            "weights": np.pad(weights, [(0, 0), (0, missing)]),
            "centre": np.broadcast_to(self.centre, (rows, 3)),
            "delta": np.full(rows, self.delta),
            "is_tied": np.full(rows, float(self.is_tied)),
            "is_held": np.zeros((rows, len(NAMES))),
            "held": np.zeros(rows),
        }

    def solve(self) -> Solutions:
        """From BEST_STARTS cells of the grid and SPREAD_STARTS of the others, through wider Huber
        thresholds.

        The objective is nearly a sum of absolute values, whose curvature sits in the few runs
        inside the threshold; a wide threshold first is a smooth problem with the same valley.
        """
        starts = projected_starts(self.n, self.d, self.v, self.weights[None], self.is_tied)[0]
        others = np.linspace(BEST_STARTS, len(starts) - 1, SPREAD_STARTS).astype(int)
        if len(starts) > BEST_STARTS + SPREAD_STARTS:
            starts = starts[np.r_[:BEST_STARTS, others]]
        data = {key: value[0] for key, value in self.data(1).items()}
        found = minimise(objective, starts, data | {"delta": CONTINUATION[0] * self.delta})
        for factor in CONTINUATION[1:]:
            found = minimise(objective, found.params, data | {"delta": factor * self.delta})
        return dataclasses.replace(found, params=self.tie(found.params))

    def solve_each(
        self, weights: Float[np.ndarray, "resamples runs"], near: Float[np.ndarray, "5"]
    ) -> Float[np.ndarray, "resamples 5"]:
        """The minimum for each weighting: from the whole data's, and from its own best cell."""
        own = projected_starts(self.n, self.d, self.v, weights, self.is_tied, count=1)
        starts = np.concatenate([np.broadcast_to(near, own.shape), own], 1)
        data = self.data(len(weights), weights)
        for factor in CONTINUATION[1:]:
            found, _ = minimise_each(objective, starts, data | {"delta": factor * data["delta"]})
            starts = found[:, None]
        return self.tie(starts[:, 0])

    def tie(self, z: Float[np.ndarray, "*batch 5"]) -> Float[np.ndarray, "*batch 5"]:
        if self.is_tied:
            z = np.concatenate([z[..., :4], z[..., 3:4]], -1)
        return z

    def log_terms(
        self, z: Float[np.ndarray, "*batch 5"], n: np.ndarray, d: np.ndarray
    ) -> Float[np.ndarray, "*batch points 3"]:
        """ln of the three terms at centred n, d [points]."""
        e, a, b, log_alpha, log_beta = np.moveaxis(z[..., None], -2, 0)
        by_size = a - np.exp(log_alpha) * n
        return np.stack([e + 0 * by_size, by_size, b - np.exp(log_beta) * d], -1)

    def log_predict(
        self, z: Float[np.ndarray, "*batch 5"], n: np.ndarray, d: np.ndarray
    ) -> Float[np.ndarray, "*batch points"]:
        return np.logaddexp.reduce(self.log_terms(z, n, d), axis=-1)

    def jacobian(
        self, z: Float[np.ndarray, "5"], n: np.ndarray, d: np.ndarray
    ) -> Float[np.ndarray, "points free"]:
        """Of ln prediction by z; four columns where the exponents are tied."""
        terms = self.log_terms(z, n, d)
        share = np.exp(terms - np.logaddexp.reduce(terms, axis=-1)[:, None])
        by_alpha = -share[:, 1] * np.exp(z[3]) * n
        by_beta = -share[:, 2] * np.exp(z[4]) * d
        exponents = [by_alpha + by_beta] if self.is_tied else [by_alpha, by_beta]
        return np.column_stack([share, *exponents])

    def residuals(self, z: Float[np.ndarray, "5"]) -> Float[np.ndarray, " runs"]:
        """ln loss - ln prediction."""
        return self.v - self.log_predict(z, self.n, self.d)

    def free_runs(self) -> int:
        """Degrees of freedom of the noise."""
        return max(self.independent - self.num_free, 1)

    def shrinkage(self) -> float:
        """What to multiply the spread of resamples by, about the fit: sqrt(1 - parameters/groups).

        Reweighted runs leave fewer of them to hold the law than the data do, so the spread of
        resamples is too wide, the more so the fewer runs there are for a parameter. Without this,
        90% intervals of 30 to 60 runs cover 93 to 97%.

        Source: El Karoui and Purdom 2018, Journal of Machine Learning Research 19 (the bias; the
        first-order factor is ours, checked in benchmarks/scaling_coverage.py).
        """
        return float(np.sqrt(max(1 - self.num_free / self.independent, 0.5)))

    def noise(self, z: Float[np.ndarray, "5"]) -> float:
        """A robust standard deviation of ln loss around the law: 1.4826 x the median size of the
        residuals, widened for the parameters that were fitted."""
        spread = 1.4826 * np.median(np.abs(self.residuals(z)))
        return max(float(spread * np.sqrt(self.independent / self.free_runs())), 1e-9)

    def huber_moments(self, z: Float[np.ndarray, "5"]) -> tuple[float, float]:
        """E[psi^2] and E[psi'] of the Huber function under normal noise of the robust size.

        Counting the runs inside a threshold of 1e-3 would rest on a handful of runs.
        """
        sigma = self.noise(z)
        k = self.delta / sigma
        inside = float(special.erf(k / np.sqrt(2)))
        within = inside - k * np.sqrt(2 / np.pi) * np.exp(-(k**2) / 2)
        return sigma**2 * within + self.delta**2 * (1 - inside), inside

    def run_variance(self, z: Float[np.ndarray, "5"]) -> float:
        """Of ln loss, as one run of weight 1 counts in this objective: that of a Gaussian fit with
        the same precision."""
        square, slope = self.huber_moments(z)
        return square / slope**2

    def covariance(self, z: Float[np.ndarray, "5"]) -> Float[np.ndarray, "free free"]:
        """Of z, to first order; huge, not infinite, in directions without information.

        Source: Huber 1981, section 7.6 (regression M-estimates).
        """
        jacobian = self.jacobian(z, self.n, self.d)
        information = jacobian.T @ (self.weights[:, None] * jacobian)
        spread = jacobian.T @ (self.weights[:, None] ** 2 * jacobian)
        ridge = 1e-14 * np.trace(information) * np.eye(len(information))
        inverse = np.linalg.inv(information + ridge)
        return self.run_variance(z) * inverse @ spread @ inverse

    def condition_number(self, z: Float[np.ndarray, "5"]) -> float:
        """Of J'J, for ln prediction by ln E, ln A, ln B, alpha, beta in the user's units."""
        share = self.jacobian(z, self.n, self.d)[:, :3]
        by_alpha = -share[:, 1] * (self.n + self.centre[0])
        by_beta = -share[:, 2] * (self.d + self.centre[1])
        exponents = [by_alpha + by_beta] if self.is_tied else [by_alpha, by_beta]
        return float(np.linalg.cond(np.column_stack([share, *exponents])) ** 2)

    def to_user(self, z: Float[np.ndarray, "*batch 5"]) -> Float[np.ndarray, "*batch 5"]:
        """E, A, B, alpha, beta in the units of the runs; A and B that overflow are infinite."""
        n_mean, d_mean, v_mean = self.centre
        alpha, beta = np.exp(z[..., 3]), np.exp(z[..., 4])
        logs = [z[..., 0], z[..., 1] + alpha * n_mean, z[..., 2] + beta * d_mean]
        with np.errstate(over="ignore"):
            return np.stack([*np.exp(np.stack(logs) + v_mean), alpha, beta], -1)

    def profile(
        self, z: Float[np.ndarray, "5"], which: int, allowed: float, step: float
    ) -> tuple[float, float]:
        """How far ln of a parameter (in the user's units) moves before the objective, minimised
        over the others, rises by more than `allowed`; infinite where it never does.

        Args:
          step: the first step, about a standard error of the logarithm.
        """
        with np.errstate(divide="ignore"):
            best = np.log(self.to_user(z)[which])
        data = {key: value[0] for key, value in self.data(1).items()}
        data["is_held"] = np.eye(len(NAMES))[which]
        lowest = minimise(objective, z[None], data | {"held": np.asarray(best)}, chunk=1).values[0]

        def end(direction: float) -> float:
            inside, outside, size, near = 0.0, None, step, z
            for _ in range(PROFILE_STEPS):
                offset = inside + size if outside is None else (inside + outside) / 2
                held = {"held": np.asarray(best + direction * offset)}
                found = minimise(objective, near[None], data | held, chunk=1)
                if found.values[0] <= lowest + allowed:
                    inside, near, size = offset, found.best, size * 2
                else:
                    outside = offset
            return direction * (np.inf if outside is None else (inside + outside) / 2)

        return best + end(-1.0), best + end(1.0)
