"""From a fitted law to a choice: which size, how much data, at what price, and what to run next.

Every answer is computed for each bootstrap sample of the law as well, so that it has an interval.
FLOPs are k x N x D, with k = `flops_per_param_example`: 6 where an example is a token; 6 x tokens
an image for ViTs; or what the runs themselves give (`flops_factor`).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.scaling.crossing import Crossing, crossing
from vitjax.scaling.flops_factor import flops_factor
from vitjax.scaling.parametric import NAMES, ParametricLaw
from vitjax.scaling.plain import plain
from vitjax.scaling.resample import percentile_interval

__all__ = [
    "Choice", "Crossing", "Estimate", "ExamplesNeeded", "Frontier", "NextRun", "crossing",
    "data_limited", "examples_needed", "flops_factor", "frontier", "inference_limited", "next_run",
    "penalty",
]  # fmt: skip

# A wild resample may hold infinite terms or exponents of zero; what follows from them is infinite
# or undefined, and sorts last in an interval.
_wild = np.errstate(over="ignore", divide="ignore", invalid="ignore")

REPEATS = "data seen more than once is not modelled: repeats are worth less than new images"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its central interval; arrays where several budgets were asked for."""

    value: Any
    low: Any
    high: Any

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


def _estimate(values: np.ndarray, level: float) -> Estimate:
    """From values whose first row is the fit itself and the others the resamples."""
    if len(values) == 1:
        raise InputError("the law was fitted with resamples=0; decisions need, say, 1000")
    low, high = percentile_interval(values[1:], level)
    pick = (lambda v: v) if values.ndim > 1 else float
    return Estimate(pick(values[0]), pick(low), pick(high))


def _rows(law: ParametricLaw, dims: int = 0) -> tuple[np.ndarray, ...]:
    """E, A, B, alpha, beta, each [1 + R] with `dims` more dimensions of one; the fit first."""
    fit = np.array([[law.params[name] for name in NAMES]])
    values = np.concatenate([fit, law.samples])
    return tuple(values.T.reshape(5, -1, *(1,) * dims))


def _check_positive(**values: ArrayLike) -> list[np.ndarray]:
    arrays = []
    for name, value in values.items():
        array = np.asarray(value, np.float64)
        if not (np.all(np.isfinite(array)) and np.all(array > 0)):
            raise InputError(f"{name} must be finite and above 0, got {value}")
        arrays.append(array)
    return arrays


def _optimum(parts: tuple[np.ndarray, ...], product: ArrayLike) -> np.ndarray:
    """ln N* for a product N D, from d/dN of the law along N D = const.

    Source: Hoffmann et al. 2022, equation 4.
    """
    _, a, b, alpha, beta = parts
    log_g = (np.log(alpha) + np.log(a) - np.log(beta) - np.log(b)) / (alpha + beta)
    return log_g + beta / (alpha + beta) * np.log(product)


def _loss(parts: tuple[np.ndarray, ...], log_n: Any, log_d: Any) -> np.ndarray:
    e, a, b, alpha, beta = parts
    return e + np.exp(np.log(a) - alpha * log_n) + np.exp(np.log(b) - beta * log_d)


def _reach(law: ParametricLaw, product: ArrayLike) -> np.ndarray:
    """How many times beyond the largest fitted run, in N D."""
    n_mean, d_mean, _ = law.problem.centre
    largest = np.exp((law.problem.n + law.problem.d).max() + n_mean + d_mean)
    return np.asarray(np.maximum(np.asarray(product) / largest, 1.0))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best size at each budget, [budgets].

    Attributes:
      reach: how many times the largest fitted run's N D; 1 inside.
    """

    flops: np.ndarray
    num_params: Estimate
    num_examples: Estimate
    loss: Estimate
    exponent: float
    reach: np.ndarray
    level: float

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


@_wild
def frontier(
    law: ParametricLaw, flops: ArrayLike, flops_per_param_example: float, level: float = 0.9
) -> Frontier:
    """N*(C), D*(C) and the loss there, with the law's intervals (not a new run's noise)."""
    c, k = _check_positive(flops=flops, flops_per_param_example=flops_per_param_example)
    c = np.atleast_1d(c)
    parts = _rows(law, dims=1)
    product = (c / k)[None]
    log_n = _optimum(parts, product)
    log_d = np.log(product) - log_n
    return Frontier(
        flops=c,
        num_params=_estimate(np.exp(log_n), level),
        num_examples=_estimate(np.exp(log_d), level),
        loss=_estimate(_loss(parts, log_n, log_d), level),
        exponent=law.exponent,
        reach=_reach(law, product[0]),
        level=level,
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A size at a budget, beside the best one.

    Attributes:
      loss, best_loss: predicted at the chosen and at the best size.
      penalty: their difference, in units of the loss; never negative.
      wasted: the fraction of the FLOPs that the best size would not need for the same loss.
      is_limited: whether the limit asked for excludes the best size.
    """

    flops: float
    num_params: float
    num_examples: float
    best_params: Estimate
    loss: Estimate
    best_loss: Estimate
    penalty: Estimate
    wasted: Estimate
    is_limited: bool
    reach: float
    level: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


@_wild
def penalty(
    law: ParametricLaw,
    flops: float,
    num_params: float,
    flops_per_param_example: float,
    level: float = 0.9,
) -> Choice:
    """What it costs to train `num_params` instead of the best size at the same FLOPs."""
    c, n, k = _check_positive(
        flops=flops, num_params=num_params, flops_per_param_example=flops_per_param_example
    )
    product, log_n = c / k, np.log(n)
    parts = _rows(law)
    best_n = _optimum(parts, product)
    loss = _loss(parts, log_n, np.log(product) - log_n)
    best = _loss(parts, best_n, np.log(product) - best_n)
    # At the optimum both terms fall as C^-gamma: the FLOPs for a loss follow directly.
    e, _, _, alpha, beta = parts
    gamma = alpha * beta / (alpha + beta)
    wasted = 1 - ((best - e) / (loss - e)) ** (1 / gamma)
    return Choice(
        flops=float(c),
        num_params=float(n),
        num_examples=float(product / n),
        best_params=_estimate(np.exp(best_n), level),
        loss=_estimate(loss, level),
        best_loss=_estimate(best, level),
        penalty=_estimate(np.maximum(loss - best, 0.0), level),
        wasted=_estimate(np.clip(wasted, 0.0, 1.0), level),
        is_limited=False,
        reach=float(_reach(law, product)),
        level=level,
        note="",
    )


def inference_limited(
    law: ParametricLaw,
    flops: float,
    max_params: float,
    flops_per_param_example: float,
    level: float = 0.9,
) -> Choice:
    """The best choice where a model may have at most `max_params`: smaller, trained for longer."""
    free = frontier(law, flops, flops_per_param_example, level)
    best = float(free.num_params.value[0])
    is_limited = best > max_params
    choice = penalty(law, flops, min(best, max_params), flops_per_param_example, level)
    note = f"at {choice.num_examples:.4g} examples; {REPEATS}" if is_limited else "no limit here"
    return dataclasses.replace(choice, is_limited=is_limited, note=note)


def data_limited(
    law: ParametricLaw,
    flops: float,
    max_examples: float,
    flops_per_param_example: float,
    level: float = 0.9,
) -> Choice:
    """The best choice where at most `max_examples` are seen: larger, trained for shorter."""
    _check_positive(max_examples=max_examples)
    free = frontier(law, flops, flops_per_param_example, level)
    best = float(free.num_examples.value[0])
    is_limited = best > max_examples
    num_params = flops / flops_per_param_example / min(best, max_examples)
    choice = penalty(law, flops, num_params, flops_per_param_example, level)
    return dataclasses.replace(
        choice, is_limited=is_limited, note=REPEATS if is_limited else "no limit here"
    )


@dataclasses.dataclass(frozen=True)
class ExamplesNeeded:
    """Examples until a loss, for one size.

    Attributes:
      examples: infinite where the law's floor for this size, E + A/N^alpha, is above the loss.
      floor: that floor. share_unreachable: of the resamples.
    """

    num_params: float
    loss: float
    examples: Estimate
    floor: Estimate
    share_unreachable: float
    reach: float
    level: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


@_wild
def examples_needed(
    law: ParametricLaw, loss: float, num_params: float, level: float = 0.9
) -> ExamplesNeeded:
    """D at which a model of `num_params` is predicted to reach `loss`."""
    wanted, n = _check_positive(loss=loss, num_params=num_params)
    e, a, b, alpha, beta = _rows(law)
    floor = e + np.exp(np.log(a) - alpha * np.log(n))
    gap = wanted - floor
    needed = np.exp((np.log(b) - np.log(np.maximum(gap, 0.0))) / beta)  # no gap: infinitely many
    note = ""
    if not np.isfinite(needed[0]):
        note = (
            f"unreachable: {float(wanted):.4g} is not above the law's floor for this size, "
            f"{floor[0]:.4g}"
        )
    return ExamplesNeeded(
        num_params=float(n),
        loss=float(wanted),
        examples=_estimate(needed, level),
        floor=_estimate(floor, level),
        share_unreachable=float(np.mean(~np.isfinite(needed[1:]))),
        reach=float(_reach(law, n * needed[0])),
        level=level,
        note=note,
    )


@dataclasses.dataclass(frozen=True)
class NextRun:
    """Which candidate to run next.

    Attributes:
      index: of the candidate that lowers the variance at the target the most per FLOP.
      largest: of the one that lowers it the most, whatever it costs.
      reductions: the fraction of the variance that each candidate removes.
      deviation, deviation_after: standard deviation of the predicted ln loss at the target, now
        and after the chosen run.
    """

    index: int
    largest: int
    num_params: float
    num_examples: float
    reductions: np.ndarray
    deviation: float
    deviation_after: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


def next_run(
    law: ParametricLaw,
    num_params: ArrayLike,
    num_examples: ArrayLike,
    target_params: float,
    target_examples: float,
    flops: ArrayLike | None = None,
) -> NextRun:
    """Chooses among candidate runs the one that says most about the target's loss for its price.

    A run adds the information x x' / tau^2 about the parameters, x the gradient of ln L there and
    tau^2 the noise of a run as the fit sees it; the variance of the target's ln L, c' V c, then
    falls by (c' V x)^2 / (tau^2 + x' V x).

    Args:
      num_params, num_examples: N and D of the candidates, [K].
      flops: what each costs, in any unit; N D without it.

    Source: c-optimal design, Pukelsheim 2006; one step, to first order around the fit.
    """
    columns = _check_positive(num_params=num_params, num_examples=num_examples)
    n, d = (np.atleast_1d(column) for column in columns)
    target_n, target_d = _check_positive(
        target_params=target_params, target_examples=target_examples
    )
    if n.shape != d.shape:
        raise InputError(f"candidates differ in length: {len(n)} sizes, {len(d)} examples")
    (cost,) = _check_positive(flops=n * d if flops is None else flops)
    if cost.shape != n.shape:
        raise InputError(f"flops differ in length: {cost.size} for {len(n)} candidates")
    problem, z = law.problem, law.optimum
    covariance = problem.covariance(z)
    n_mean, d_mean, _ = problem.centre
    # The last row is the target.
    logs_n = np.log(np.append(n, target_n)) - n_mean
    logs_d = np.log(np.append(d, target_d)) - d_mean
    gradients = problem.jacobian(z, logs_n, logs_d)
    x, c = gradients[:-1], gradients[-1]
    now = float(c @ covariance @ c)
    own = np.einsum("ki,ij,kj->k", x, covariance, x)
    reductions = (x @ covariance @ c) ** 2 / (problem.run_variance(z) + own) / now
    index = int(np.argmax(reductions / cost))
    open_ones = ", ".join(law.not_identified)
    return NextRun(
        index=index,
        largest=int(np.argmax(reductions)),
        num_params=float(n[index]),
        num_examples=float(d[index]),
        reductions=reductions,
        deviation=math.sqrt(now),
        deviation_after=math.sqrt(now * (1 - reductions[index])),
        note=f"rough: {open_ones} not identified by the runs so far" if open_ones else "",
    )
