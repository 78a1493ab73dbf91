"""The parametric law of size and data, L = E + A/N^alpha + B/D^beta, with what is known about it.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3; as corrected by Besiroglu et al. 2024
(arXiv 2404.10102): the sum, not the mean, of Huber losses of the logarithm, minimised to the end.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special

from vitjax.errors import InputError
from vitjax.scaling.parametric_problem import NAMES, Problem
from vitjax.scaling.plain import plain
from vitjax.scaling.points import check_positive, num_levels
from vitjax.scaling.resample import check_level, draw_weights, group_codes, percentile_interval

# Not identified: the central 90% of a parameter (of a term in the middle of the data, for A and B)
# spans more than this factor.
MAX_SPAN = 4.0
NEGLIGIBLE = 1e-3  # a term below this share of every loss has left the law
EXPONENT_LIMITS = (1e-3, 10.0)
FAR = 5.0  # robust standard deviations: runs that are named, not dropped


@dataclasses.dataclass(frozen=True)
class Outliers:
    """What was done about runs that do not fit.

    Attributes:
      dropped_rows: left out of the fit, by row of the input.
      far_rows: kept, but further from the law than FAR robust standard deviations. The Huber loss
        limits their pull. Dropping any is the user's decision (`drop_highest`).
    """

    policy: str
    dropped_rows: tuple[int, ...]
    far_rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ParametricLaw:
    """A fitted law. L in the units of the loss, N and D in those of the columns.

    Attributes:
      params, standard_errors: by the keys E, A, B, alpha, beta.
      samples: of the parameters, in that order, [R, 5]; R = 0 without a bootstrap.
      objective: the sum of Huber losses at the minimum.
      num_starts, num_agreeing: how many starts there were, and came within 1e-4 of the minimum.
      bounds_hit: terms and exponents that ran to where they no longer matter.
      not_identified: parameters that the data leave open (`MAX_SPAN`), with those that ran away.
      condition_number: of J'J for ln L by (ln E, ln A, ln B, alpha, beta) in the user's units: 4e6
        for Hoffmann's runs. Why A and B are known so much worse than predictions.
    """

    params: dict[str, float]
    standard_errors: dict[str, float]
    samples: Float[np.ndarray, "resamples 5"]
    objective: float
    num_starts: int
    num_agreeing: int
    bounds_hit: tuple[str, ...]
    not_identified: tuple[str, ...]
    condition_number: float
    outliers: Outliers
    delta: float
    seed: int
    problem: Problem = dataclasses.field(repr=False)
    optimum: Float[np.ndarray, "5"] = dataclasses.field(repr=False)

    @property
    def tie_exponents(self) -> bool:
        return self.problem.is_tied

    @property
    def num_runs(self) -> int:
        return len(self.problem.n)

    @property
    def noise(self) -> float:
        """Robust standard deviation of ln L around the law: seeds, and what the law misses."""
        return self.problem.noise(self.optimum)

    @property
    def exponent(self) -> float:
        """a of N* ~ C^a: beta / (alpha + beta)."""
        return self.params["beta"] / (self.params["alpha"] + self.params["beta"])

    @property
    def num_range(self) -> dict[str, tuple[float, float]]:
        """The smallest and largest N and D that were fitted."""
        n_mean, d_mean, _ = self.problem.centre
        ends = {"num_params": self.problem.n + n_mean, "num_examples": self.problem.d + d_mean}
        return {k: (float(np.exp(v.min())), float(np.exp(v.max()))) for k, v in ends.items()}

    def _check_samples(self) -> None:
        if not len(self.samples):
            raise InputError("the law was fitted with resamples=0; intervals need, say, 1000")

    def exponent_interval(self, level: float = 0.9) -> tuple[float, float]:
        self._check_samples()
        alpha, beta = self.samples[:, 3], self.samples[:, 4]
        low, high = percentile_interval(beta / (alpha + beta), level)
        return float(low), float(high)

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the bootstrap, by parameter."""
        self._check_samples()
        low, high = percentile_interval(self.samples, level)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(NAMES)}

    def profile(self, name: str, level: float = 0.9) -> tuple[float, float]:
        """The values of one parameter for which the objective, minimised over the others, stays
        below a limit: the robust analogue of the likelihood-ratio interval.

        The rise of a Huber sum, times 2 E[psi'] / E[psi^2], is asymptotically chi-square with one
        degree of freedom; an F quantile stands in for few runs. Both moments are those of normal
        noise of the residuals' robust size. A side that never reaches the limit is 0 or infinite.

        Source: Schrader and Hettmansperger 1980, Biometrika 67.
        """
        check_level(level)
        if name not in NAMES:
            raise InputError(f"unknown parameter {name!r}; allowed: {', '.join(NAMES)}")
        square, slope = self.problem.huber_moments(self.optimum)
        quantile = special.stdtrit(self.problem.free_runs(), (1 + level) / 2) ** 2
        relative = self.standard_errors[name] / self.params[name]
        step = float(np.clip(relative if np.isfinite(relative) else 1.0, 1e-4, 1.0))
        low, high = self.problem.profile(
            self.optimum, NAMES.index(name), quantile * square / slope / 2, step
        )
        with np.errstate(over="ignore"):
            return float(np.exp(low)), float(np.exp(high))

    def predict(self, num_params: ArrayLike, num_examples: ArrayLike) -> np.ndarray:
        """L at sizes and examples of any shapes that broadcast."""
        values = np.array([[self.params[name] for name in NAMES]])
        return _evaluate(values, num_params, num_examples)[0, ...]

    def samples_predict(self, num_params: ArrayLike, num_examples: ArrayLike) -> np.ndarray:
        """L by each sample of the parameters, [R, ...]."""
        self._check_samples()
        return _evaluate(self.samples, num_params, num_examples)

    def interval(
        self,
        num_params: ArrayLike,
        num_examples: ArrayLike,
        level: float = 0.9,
        with_noise: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The band for L: of the law, and with_noise of one new run (its seed included).

        The noise is drawn from the fit's own residuals, widened for the parameters fitted, so that
        heavy tails stay heavy.
        """
        predicted = self.samples_predict(num_params, num_examples)
        if with_noise:
            problem, generator = self.problem, np.random.default_rng(self.seed + 1)
            widened = np.sqrt(problem.independent / problem.free_runs())
            chance = problem.weights / problem.weights.sum()
            residuals = problem.residuals(self.optimum)
            drawn = generator.choice(residuals, predicted.shape, p=chance)
            predicted = predicted * np.exp(drawn * widened)
        return percentile_interval(predicted, level)

    def to_dict(self, level: float = 0.9) -> dict[str, Any]:
        """What a report prints; JSON."""
        has_samples = len(self.samples) > 0
        content = {
            "law": "L = E + A/N^alpha + B/D^beta",
            "tie_exponents": self.tie_exponents,
            "params": self.params,
            "standard_errors": self.standard_errors,
            "level": level,
            "intervals": self.intervals(level) if has_samples else None,
            "exponent": self.exponent,
            "exponent_interval": self.exponent_interval(level) if has_samples else None,
            "resamples": len(self.samples),
            "seed": self.seed,
            "num_runs": self.num_runs,
            "num_groups": self.problem.independent,
            "objective": self.objective,
            "delta": self.delta,
            "noise": self.noise,
            "num_starts": self.num_starts,
            "num_agreeing": self.num_agreeing,
            "bounds_hit": list(self.bounds_hit),
            "not_identified": list(self.not_identified),
            "condition_number": self.condition_number,
            "range": self.num_range,
            "outliers": dataclasses.asdict(self.outliers),
        }
        return plain(content)


def _evaluate(values: np.ndarray, num_params: ArrayLike, num_examples: ArrayLike) -> np.ndarray:
    """L for each row of parameters [R, 5]: [R, ...]."""
    n, d = np.broadcast_arrays(
        np.asarray(num_params, np.float64), np.asarray(num_examples, np.float64)
    )
    for name, array in (("num_params", n), ("num_examples", d)):
        if not np.all(array > 0):
            raise InputError(f"{name} must be above 0, got {float(array.min()):g}")
    e, a, b, alpha, beta = values.T.reshape(5, -1, *(1,) * n.ndim)
    with np.errstate(over="ignore"):  # a wild resample may be infinite; it sorts last
        by_size = np.exp(np.log(a) - alpha * np.log(n)[None])
        return e + by_size + np.exp(np.log(b) - beta * np.log(d)[None])


def _check_design(n: np.ndarray, d: np.ndarray, is_tied: bool) -> None:
    """Whether the columns can carry the law.

    Raises:
      InputError: says which runs are missing.
    """
    free, levels = (4, 2) if is_tied else (5, 3)
    for what, logs, other in (("sizes", n, "N"), ("data sizes", d, "D")):
        found = num_levels(logs)
        if found < levels:
            only = f"a single {what[:-1]}" if found == 1 else f"{found} different {what}"
            raise InputError(
                f"the law E + A/N^alpha + B/D^beta needs at least {levels} different {what}, and "
                f"the {len(n)} runs have {only}: add runs at other {other}, or fit a curve of one "
                "variable"
            )
    if len(n) <= free:
        raise InputError(f"{len(n)} runs are too few for {free} parameters: at least {free + 1}")


def fit_parametric(
    num_params: ArrayLike,
    num_examples: ArrayLike,
    loss: ArrayLike,
    *,
    tie_exponents: bool = False,
    drop_highest: int = 0,
    delta: float = 1e-3,
    groups: Any = None,
    weights: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ParametricLaw:
    """Fits E + A/N^alpha + B/D^beta.

    Args:
      num_params, num_examples, loss: N, D and L of each run; D in images or tokens.
      tie_exponents: alpha = beta, which extrapolates better from few runs (Gadre et al. 2024,
        arXiv 2403.08540).
      drop_highest: how many runs with the highest loss to leave out. None by default: which runs
        are left out decides the exponents, so it is stated, and reported.
      delta: of the Huber loss of ln L.
      groups: a label a run; runs of one trunk share it, and are drawn together.
      weights: of each run in the objective.
      resamples: of the bootstrap; 0 for none, standard errors are then those of first-order theory.

    Raises:
      InputError: columns that are not positive or differ in length; too few runs, sizes or data
        sizes.
    """
    columns = check_positive(num_params=num_params, num_examples=num_examples, loss=loss)
    n, d, v = (np.log(columns[key]) for key in ("num_params", "num_examples", "loss"))
    total = len(v)
    weight = np.ones(total) if weights is None else check_positive(weights=weights)["weights"]
    if len(weight) != total:
        raise InputError(f"weights has {len(weight)} rows, the runs are {total}")
    codes = group_codes(groups, total)
    if not 0 <= drop_highest < max(total, 1):
        raise InputError(f"drop_highest={drop_highest} of {total} runs: 0 to {total - 1}")
    if delta <= 0:
        raise InputError(f"delta={delta:g} must be above 0; 0.001 is usual")
    if resamples and resamples < 50:
        raise InputError(f"resamples={resamples} are too few for an interval: 0, or at least 50")
    kept = np.sort(np.argsort(v, kind="stable")[: total - drop_highest])
    dropped = np.setdiff1d(np.arange(total), kept)
    n, d, v, weight = n[kept], d[kept], v[kept], weight[kept]
    codes = np.unique(codes[kept], return_inverse=True)[1]
    _check_design(n, d, tie_exponents)

    centre = (float(n.mean()), float(d.mean()), float(v.mean()))
    problem = Problem(
        n=n - centre[0], d=d - centre[1], v=v - centre[2], weights=weight, centre=centre,
        delta=float(delta), is_tied=tie_exponents, independent=int(codes.max()) + 1,
    )  # fmt: skip
    found = problem.solve()
    z = found.best
    many = np.empty((0, 5))
    if resamples:
        many = problem.solve_each(draw_weights(codes, resamples, seed) * weight, z)
        many = z + problem.shrinkage() * (many - z)
    return _describe(problem, found, many, kept, dropped, drop_highest, seed)


def _describe(
    problem: Problem, found: Any, many: np.ndarray, kept: np.ndarray, dropped: np.ndarray,
    drop_highest: int, seed: int,
) -> ParametricLaw:  # fmt: skip
    """From the minima (of the runs, and of the resamples [R, 5]) to what is reported."""
    z = found.best
    values, samples = problem.to_user(z), problem.to_user(many)
    covariance = problem.covariance(z)
    if problem.is_tied:
        covariance = covariance[np.ix_([0, 1, 2, 3, 3], [0, 1, 2, 3, 3])]
    if len(samples):
        with np.errstate(invalid="ignore", over="ignore"):
            spread = samples.std(0, ddof=1)
        errors = np.where(np.isnan(spread), np.inf, spread)  # A or B of a resample overflowed
        low, high = percentile_interval(many, 0.9)
        spans = high - low
    else:
        # A and B at one parameter and one example move with the exponents.
        to_logs = np.eye(5)
        to_logs[1, 3], to_logs[2, 4] = values[3:] * problem.centre[:2]
        errors = values * np.sqrt(np.maximum(np.diag(to_logs @ covariance @ to_logs.T), 0.0))
        spans = 2 * 1.645 * np.sqrt(np.maximum(np.diag(covariance), 0.0))
    terms = np.exp(problem.log_terms(z, problem.n, problem.d) - problem.v[:, None])
    lowest, highest = EXPONENT_LIMITS
    ran_away = (values[3:] < lowest) | (values[3:] > highest)
    is_gone = np.concatenate([terms.max(0) < NEGLIGIBLE, ran_away])
    is_open = is_gone | (spans > np.log(MAX_SPAN))
    is_open[3:] |= is_gone[1:3]  # an exponent of a term that is not there
    # Where the law fits exactly, the minima are rounding errors of different sizes.
    negligible = 1e-9 * problem.delta**2 * problem.weights.sum()
    residuals = problem.residuals(z)
    far = kept[np.abs(residuals) > FAR * problem.noise(z)]
    policy = f"the {drop_highest} runs with the highest loss left out" if drop_highest else "none"
    return ParametricLaw(
        params=dict(zip(NAMES, values.tolist(), strict=True)),
        standard_errors=dict(zip(NAMES, errors.tolist(), strict=True)),
        samples=samples,
        objective=float(found.values[0]),
        num_starts=len(found.values),
        num_agreeing=int((found.values <= found.values[0] * (1 + 1e-4) + negligible).sum()),
        bounds_hit=tuple(np.array(NAMES)[is_gone].tolist()),
        not_identified=tuple(np.array(NAMES)[is_open].tolist()),
        condition_number=problem.condition_number(z),
        outliers=Outliers(policy, tuple(dropped.tolist()), tuple(far.tolist())),
        delta=problem.delta,
        seed=seed,
        problem=problem,
        optimum=z,
    )
