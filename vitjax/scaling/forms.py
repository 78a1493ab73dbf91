"""Laws of one variable: how a loss or an error y falls with a scale x (examples, FLOPs, size).

Every form is written in logarithms of normalised data, u = ln(x / x_ref) and v = ln(y / y_ref),
with parameters inside bounds that hold for any such data. `describe` gives them in the data's
own units.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitjax.errors import InputError, suggest

TINY = 1e-12  # of a floor, whose logarithm is taken


@dataclasses.dataclass(frozen=True)
class Form:
    """A law of one variable.

    Attributes:
      formula: as people write it, with the names of `describe`.
      names: of the internal parameters, in their order.
      bounds: (u_min, u_max, v_min, v_max) -> [P, 2].
      predict: (u [N], parameters [P]) -> v [N]; in JAX.
      describe: (parameters, x_ref, y_ref) -> the parameters in the data's units, by name.
      floor: the index of the parameter that is the floor, or None.
    """

    name: str
    formula: str
    names: tuple[str, ...]
    bounds: Callable[[float, float, float, float], np.ndarray]
    predict: Callable[[Any, Any], Any]
    describe: Callable[[np.ndarray, float, float], dict[str, float]]
    floor: int | None
    source: str

    @property
    def num_params(self) -> int:
        return len(self.names)


def _log_floor(e: Any) -> Any:
    return jnp.log(e + TINY)


# The ranges that bounds are made of. Exponents: measured laws of vision and language lie below 1.
EXPONENT = (0.0, 3.0)


def _level(u_min: float, u_max: float, v_min: float, v_max: float) -> tuple[float, float]:
    """ln of a coefficient: where the steepest power law through the data would put it."""
    reach = EXPONENT[1] * max(abs(u_min), abs(u_max), 1.0)
    return v_min - 5.0 - reach, v_max + 5.0 + reach


def _floor(v_max: float) -> tuple[float, float]:
    return 0.0, float(np.exp(v_max))


def _power(u, p):
    log_b, c = p
    return log_b - c * u


def _power_floor(u, p):
    log_b, c, e = p
    return jnp.logaddexp(log_b - c * u, _log_floor(e))


def _zhai(u, p):
    log_a, b, c, log_d = p
    return jnp.logaddexp(log_a - b * jnp.logaddexp(u, log_d), _log_floor(c))


def _bnsl(u, p):
    a, log_b, c_first, c_last, log_d, log_f = p
    f = jnp.exp(log_f)
    bend = f * jax.nn.softplus((u - log_d) / f)
    return jnp.logaddexp(log_b - c_first * u - (c_last - c_first) * bend, _log_floor(a))


def _m4(u, p):
    """Solves (y - e_inf) / (e_0 - y)^a = b x^-c for y.

    With y = e_inf + (e_0 - e_inf) sigmoid(s) the left side is monotone in s with slopes between 1
    and a, so that Newton's method from the nearer asymptote converges for any parameters.
    """
    log_b, c, e_inf, log_gap, a = p
    e_0 = e_inf + jnp.exp(log_gap)
    right = log_b - c * u - (1 - a) * log_gap

    # ln sigmoid(s) - a ln sigmoid(-s) = right; a straight line of slope 1 left, of slope a right.
    def closer(s, right, a):
        residual = -jax.nn.softplus(-s) + a * jax.nn.softplus(s) - right
        return s - residual / (jax.nn.sigmoid(-s) + a * jax.nn.sigmoid(s))

    fixed, power = jax.lax.stop_gradient(right), jax.lax.stop_gradient(a)
    first = jnp.where(fixed < 0, fixed, fixed / power)
    s = jax.lax.fori_loop(0, 10, lambda _, s: closer(s, fixed, power), first)
    # From the solution, two more steps carry the first and second derivatives exactly.
    s = closer(closer(jax.lax.stop_gradient(s), right, a), right, a)
    return jnp.logaddexp(_log_floor(e_inf) - jax.nn.softplus(s), jnp.log(e_0) - jax.nn.softplus(-s))


def _describe_power(p, x_ref, y_ref):
    return {"b": float(np.exp(p[0]) * y_ref * x_ref ** p[1]), "c": float(p[1])}


def _describe_power_floor(p, x_ref, y_ref):
    return _describe_power(p[:2], x_ref, y_ref) | {"e_inf": float(p[2] * y_ref)}


def _describe_zhai(p, x_ref, y_ref):
    log_a, b, c, log_d = p
    return {
        "a": float(np.exp(log_a) * y_ref * x_ref**b),
        "b": float(b),
        "c": float(c * y_ref),
        "d": float(np.exp(log_d) * x_ref),
    }


def _describe_bnsl(p, x_ref, y_ref):
    a, log_b, c_first, c_last, log_d, log_f = p
    return {
        "a": float(a * y_ref),
        "b": float(np.exp(log_b) * y_ref * x_ref**c_first),
        "c0": float(c_first),
        "c1": float(c_last - c_first),
        "d1": float(np.exp(log_d) * x_ref),
        "f1": float(np.exp(log_f)),
    }


def _describe_m4(p, x_ref, y_ref):
    log_b, c, e_inf, log_gap, a = p
    return {
        "a": float(a),
        "b": float(np.exp(log_b) * y_ref ** (1 - a) * x_ref**c),
        "c": float(c),
        "e_inf": float(e_inf * y_ref),
        "e_0": float((e_inf + np.exp(log_gap)) * y_ref),
    }


FORMS = {
    form.name: form
    for form in (
        Form(
            "power", "y = b x^-c", ("log_b", "c"),
            lambda u0, u1, v0, v1: np.array([_level(u0, u1, v0, v1), EXPONENT]),
            _power, _describe_power, None, "Hestness et al. 2017 (arXiv 1712.00409)",
        ),
        Form(
            "power_floor", "y = b x^-c + e_inf", ("log_b", "c", "e_inf"),
            lambda u0, u1, v0, v1: np.array([_level(u0, u1, v0, v1), EXPONENT, _floor(v1)]),
            _power_floor, _describe_power_floor, 2, "Hestness et al. 2017 (arXiv 1712.00409)",
        ),
        Form(
            "zhai", "y = a (x + d)^-b + c", ("log_a", "b", "c", "log_d"),
            lambda u0, u1, v0, v1: np.array(
                [_level(u0, u1, v0, v1), EXPONENT, _floor(v1), (u0 - 5.0, u1 + 2.0)]
            ),
            _zhai, _describe_zhai, 2, "Zhai et al. 2021 (arXiv 2106.04560)",
        ),
        Form(
            "m4", "(y - e_inf) / (e_0 - y)^a = b x^-c", ("log_b", "c", "e_inf", "log_gap", "a"),
            lambda u0, u1, v0, v1: np.array(
                [_level(u0, u1, v0, v1), EXPONENT, _floor(v1), (v0 - 2.0, v1 + 3.0), (0.02, 8.0)]
            ),
            _m4, _describe_m4, 2, "Alabdulmohsin et al. 2022 (arXiv 2209.06640)",
        ),
        Form(
            "bnsl", "y = a + b x^-c0 (1 + (x / d1)^(1 / f1))^(-c1 f1)",
            ("a", "log_b", "c_first", "c_last", "log_d", "log_f"),
            lambda u0, u1, v0, v1: np.array(
                [_floor(v1), _level(u0, u1, v0, v1), EXPONENT, EXPONENT, (u0, u1),
                 (np.log(0.05), np.log(5.0))]
            ),
            _bnsl, _describe_bnsl, 0, "Caballero et al. 2022 (arXiv 2210.14891), one break",
        ),
    )
}  # fmt: skip


def get_form(name: str) -> Form:
    if name not in FORMS:
        raise InputError(f"unknown form {name!r}; {suggest(name, [*FORMS, 'auto'])}")
    return FORMS[name]
