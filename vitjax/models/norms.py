"""Layer normalisation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.parallel import platform
from vitjax.precision import Precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(x, scale, bias, eps, dtype):
    return _normalise_forward(x, scale, bias, eps, dtype)[0]


def _statistics(x, eps):
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return mean, jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)


def _normalise_forward(x, scale, bias, eps, dtype):
    mean, inverse = _statistics(x, eps)
    lead = (1,) * (x.ndim - 1)
    y = (x.astype(jnp.float32) - mean) * inverse
    y = y * scale.astype(jnp.float32).reshape(*lead, -1)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape(*lead, -1)
    if platform() == "gpu":  # else their computation joins the gradient's, which then is kept wide
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(eps, dtype, saved, grad):
    x, scale, bias, mean, inverse = saved
    rows, lead = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1)
    grad = grad.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    d_scale = (grad * normal).sum(rows).astype(scale.dtype)
    d_bias = None if bias is None else grad.sum(rows).astype(bias.dtype)
    grad = grad * scale.astype(jnp.float32).reshape(*lead, -1)
    along = (grad * normal).mean(-1, keepdims=True)
    d_x = (grad - grad.mean(-1, keepdims=True) - normal * along) * inverse
    return d_x.astype(x.dtype), d_scale, d_bias


_normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension, computed in float32.

    Its gradient is written out: left to itself the compiler keeps float32 copies of the input.
    """

    def __init__(self, dim: int, *, precision: Precision, eps: float, use_bias: bool):
        self.scale = nnx.Param(jnp.ones((dim,), precision.params))
        self.bias = nnx.Param(jnp.zeros((dim,), precision.params)) if use_bias else None
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        bias = None if self.bias is None else self.bias[...]
        return _normalise(x, self.scale[...], bias, self.eps, self.precision.compute)
