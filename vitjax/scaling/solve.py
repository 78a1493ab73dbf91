"""Minimises small smooth functions from many starts at once: damped Newton on JAX's derivatives.

Everything that the fits of this package minimise has at most a handful of parameters, so an exact
Hessian is cheap, and thousands of problems (starts, resamples) run as one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Objective = Callable[[Any, PyTree], Any]  # (parameters [P], data) -> scalar

MAX_STEPS = 150
CHUNK = 32  # problems that one call of the program takes
TOLERANCE = 1e-10  # of the Newton decrement, relative to the value


@dataclasses.dataclass(frozen=True)
class Solutions:
    """Where each start ended, best first.

    Attributes:
      params: [S, P]. values: [S].
    """

    params: np.ndarray
    values: np.ndarray

    @property
    def best(self) -> np.ndarray:
        return self.params[0]

    def num_agreeing(self, relative: float = 1e-4) -> int:
        """How many starts came to the best value, up to a relative difference."""
        scale = max(abs(float(self.values[0])), 1e-300)
        return int((self.values - self.values[0] <= relative * scale).sum())


def _newton(objective: Objective, start: Any, data: PyTree, max_steps: Any) -> tuple:
    """One problem from one start. Returns parameters and value.

    The damping is Levenberg's, on the exact Hessian: raised until a step lowers the value, lowered
    after each step that does. Where the Hessian is indefinite a rejected step raises it above the
    negative curvature. The first round moves nowhere and finds the derivatives at the start, so
    that they stand in the program once.
    """
    gradient, hessian = jax.grad(objective), jax.hessian(objective)

    def derivatives(x):
        return objective(x, data), gradient(x, data), hessian(x, data)

    def is_open(carry):
        step, _, _, _, _, damping, is_done = carry
        return (step < max_steps) & ~is_done & (damping < 1e14)

    def body(carry):
        step, x, f, g, h, damping, _ = carry
        scale = jnp.maximum(jnp.abs(jnp.diagonal(h)), 1e-8 * jnp.max(jnp.abs(h)) + 1e-30)
        move = -jnp.linalg.solve(h + jnp.diag(damping * scale), g)
        move = jnp.where(jnp.isfinite(move), move, 0.0)
        slope = g @ move
        new = derivatives(x + move)
        is_first = step == 0
        is_better = (new[0] < f) & (slope < 0) & jnp.all(jnp.isfinite(new[1]))
        is_better = (is_better & jnp.all(jnp.isfinite(new[2]))) | is_first
        decrement = jnp.abs(slope)
        # A full Newton step that promises nothing more is the end.
        is_done = (decrement <= TOLERANCE * (jnp.abs(f) + 1e-12)) & (damping < 1e-3) & (slope <= 0)
        is_done &= ~is_first
        pick = lambda a, b: jnp.where(is_better, a, b)  # noqa: E731
        return (
            step + 1,
            pick(x + move, x),
            pick(new[0], f),
            pick(new[1], g),
            pick(new[2], h),
            jnp.where(
                is_better, jnp.maximum(damping / jnp.where(is_first, 1, 5), 1e-12), damping * 4
            ),
            is_done,
        )

    size = start.shape[0]
    first = (jnp.full((), jnp.inf), jnp.zeros(size), jnp.eye(size))
    carry = (0, start, *first, jnp.asarray(1e-2), jnp.asarray(False))
    _, x, f, *_ = jax.lax.while_loop(is_open, body, carry)
    return x, f


@functools.cache
def _solver(objective: Objective) -> Callable:
    """Compiled once for an objective and the shapes of its data: over a chunk of problems."""
    return jax.jit(jax.vmap(functools.partial(_newton, objective), in_axes=(0, 0, None)))


def _solve_all(
    objective: Objective, starts: np.ndarray, data: PyTree, max_steps: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Problem by problem, a chunk at a time, so that one program serves any number of them.

    Args:
      starts: [K, P]. data: leaves with a leading dimension K.
    """
    total, found = len(starts), []
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        for first in range(0, total, chunk):
            rows = np.minimum(np.arange(first, first + chunk), total - 1)  # the last is filled up
            part = jax.tree.map(lambda x, r=rows: jnp.asarray(x[r], jnp.float64), data)
            here = jnp.asarray(starts[rows], jnp.float64)
            found.append(jax.device_get(_solver(objective)(here, part, max_steps)))
    params, values = (np.concatenate(parts)[:total] for parts in zip(*found, strict=True))
    return params, np.where(np.isfinite(values), values, np.inf)


def minimise(
    objective: Objective,
    starts: np.ndarray,
    data: PyTree,
    max_steps: int = MAX_STEPS,
    chunk: int = CHUNK,
) -> Solutions:
    """Minimises one function from every start, in float64.

    Args:
      objective: (parameters [P], data) -> scalar; a module-level function, since its compiled
        solver is kept for its identity.
      starts: [S, P].
      data: arrays.
    """
    starts = np.asarray(starts)
    repeated = jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x), (len(starts), *np.shape(x))), data
    )
    x, f = _solve_all(objective, starts, repeated, max_steps, chunk)
    order = np.argsort(f, kind="stable")
    return Solutions(x[order], f[order])


def minimise_each(
    objective: Objective,
    starts: np.ndarray,
    data: PyTree,
    max_steps: int = MAX_STEPS,
    chunk: int = CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """Many problems of one kind, each from its own starts; the best of each.

    Args:
      starts: [R, S, P]. data: arrays with a leading dimension R.

    Returns:
      Parameters [R, P] and values [R].
    """
    starts = np.asarray(starts)
    problems, per_problem, num_params = starts.shape
    repeated = jax.tree.map(lambda x: np.repeat(np.asarray(x), per_problem, 0), data)
    flat = starts.reshape(-1, num_params)
    x, f = _solve_all(objective, flat, repeated, max_steps, chunk)
    x, f = x.reshape(problems, per_problem, -1), f.reshape(problems, per_problem)
    best = f.argmin(1)[:, None]
    return np.take_along_axis(x, best[..., None], 1)[:, 0], np.take_along_axis(f, best, 1)[:, 0]


def halton(count: int, dims: int) -> np.ndarray:
    """Points spread evenly over the open unit cube, [count, dims]; the same ones always.

    Source: Halton 1960; leaped to break the correlation of neighbouring bases.
    """
    primes = (2, 3, 5, 7, 11, 13, 17, 19)[:dims]
    points = np.empty((count, dims))
    for column, base in enumerate(primes):
        for row in range(count):
            value, fraction, index = 0.0, 1.0, (row + 1) * 31
            while index:
                fraction /= base
                index, digit = divmod(index, base)
                value += fraction * digit
            points[row, column] = value
    return np.clip(points, 1e-6, 1 - 1e-6)
