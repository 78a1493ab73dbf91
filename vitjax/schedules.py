"""Learning-rate schedules, as a fraction of the peak.

Each takes `total_steps` and its own numbers, and returns a function of the number of updates done
so far. Warm-up rises linearly and reaches the peak at its last step; the first update is not wasted
at zero.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vitjax.errors import InputError

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def _check(total_steps: int, **phases: int) -> None:
    for name, steps in phases.items():
        if steps < 0:
            raise InputError(f"{name} must not be negative, got {steps}")
    if sum(phases.values()) > total_steps:
        listed = ", ".join(f"{name}={steps}" for name, steps in phases.items())
        raise InputError(f"{listed} do not fit in total_steps={total_steps}")


def _warmup(count: Int[Array, ""], warmup_steps: int) -> Float[Array, ""]:
    return jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))


def _cooldown(count: Int[Array, ""], total_steps: int, cooldown_steps: int) -> Float[Array, ""]:
    return jnp.clip((total_steps - count) / max(cooldown_steps, 1), 0.0, 1.0)


def constant(*, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Warm-up, then the peak."""
    _check(total_steps, warmup_steps=warmup_steps)
    return lambda count: _warmup(count, warmup_steps)


def cosine(*, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine down to `final_fraction` of the peak (arXiv 1608.03983)."""
    _check(total_steps, warmup_steps=warmup_steps)

    def schedule(count):
        progress = (count - warmup_steps) / max(total_steps - warmup_steps, 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        fall = final_fraction + (1 - final_fraction) * fall
        return _warmup(count, warmup_steps) * fall

    return schedule


def rsqrt(
    *, total_steps: int, warmup_steps: int, cooldown_steps: int, timescale: int = 10_000
) -> Schedule:
    """Warm-up, inverse square root of time, then a linear cooldown to zero.

    One long run serves many durations: branch off a cooldown wherever one is wanted.

    Source: Zhai et al. 2021 (arXiv 2106.04560), section 3.
    """
    _check(total_steps, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    if timescale < 1:
        raise InputError(f"timescale must be at least 1, got {timescale}")

    def schedule(count):
        after = jnp.maximum(count - warmup_steps, 0)
        decay = 1 / jnp.sqrt(1 + after / timescale)
        return _warmup(count, warmup_steps) * decay * _cooldown(count, total_steps, cooldown_steps)

    return schedule


def warmup_stable_decay(*, total_steps: int, warmup_steps: int, cooldown_steps: int) -> Schedule:
    """Warm-up, the peak, then a linear cooldown to zero (arXiv 2404.06395, 2405.18392)."""
    _check(total_steps, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    return lambda count: (
        _warmup(count, warmup_steps) * _cooldown(count, total_steps, cooldown_steps)
    )


def bit_hyper(*, total_steps: int) -> Schedule:
    """A fifth of warm-up, then ten times less at 0.4, 0.6 and 0.8 of the steps.

    Source: BiT-HyperRule (Kolesnikov et al. 2019, arXiv 1912.11370), whose run for small data warms
    up for 100 of 500 steps and falls at 200, 300 and 400.
    """
    marks = [0.2, 0.4, 0.6, 0.8]

    def schedule(count):
        done = count / total_steps
        falls = sum(jnp.asarray(done >= mark, jnp.float32) for mark in marks[1:])
        return _warmup(count, max(1, int(marks[0] * total_steps))) * 0.1**falls

    return schedule
