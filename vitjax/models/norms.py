"""Layer and group normalisation, computed in float32, their gradients written out."""

import functools
from typing import Any

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
    """Layer normalisation over the last dimension.

    Were its gradient not written out, the compiler would keep float32 copies of the input.
    """

    def __init__(self, dim: int, *, precision: Precision, eps: float, use_bias: bool):
        self.scale = nnx.Param(jnp.ones((dim,), precision.params))
        self.bias = nnx.Param(jnp.zeros((dim,), precision.params)) if use_bias else None
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        bias = None if self.bias is None else self.bias[...]
        return _normalise(x, self.scale[...], bias, self.eps, self.precision.compute)


def _group_means(sums: Float[Array, "B C"], groups: int, size: int) -> Float[Array, "B 1 C"]:
    """The mean over a group and `size` places, at each of its channels."""
    batch, channels = sums.shape
    means = sums.reshape(batch, groups, -1).mean(2, keepdims=True) / size
    return jnp.broadcast_to(means, (batch, groups, channels // groups)).reshape(batch, 1, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalise_groups(x, scale, bias, groups, eps, dtype):
    return _groups_forward(x, scale, bias, groups, eps, dtype)[0]


def _groups_forward(x, scale, bias, groups, eps, dtype):
    wide, size = x.astype(jnp.float32), x.shape[1]
    mean = _group_means(wide.sum(1), groups, size)
    centred = wide - mean
    inverse = jax.lax.rsqrt(_group_means((centred * centred).sum(1), groups, size) + eps)
    wide_scale, wide_bias = (v.astype(jnp.float32)[None, None] for v in (scale, bias))
    y = centred * (inverse * wide_scale) + wide_bias
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _groups_backward(groups, eps, dtype, saved, grad):
    x, scale, bias, mean, inverse = saved
    size, wide_scale = x.shape[1], scale.astype(jnp.float32)[None]
    grad = grad.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    of_bias, of_scale = grad.sum(1), (grad * normal).sum(1)
    along = _group_means(of_scale * wide_scale, groups, size)
    level = _group_means(of_bias * wide_scale, groups, size)
    d_x = (grad * wide_scale[:, None] - level - normal * along) * inverse
    d_scale, d_bias = of_scale.sum(0).astype(scale.dtype), of_bias.sum(0).astype(bias.dtype)
    return d_x.astype(x.dtype), d_scale, d_bias


_normalise_groups.defvjp(_groups_forward, _groups_backward)


class GroupNorm(nnx.Module):
    """Normalisation over the image and a group of channels (arXiv 1803.08494).

    Sums run over places first and over a group's channels then: in one sum over both XLA's programs
    for CPUs take 4 to 7 times as long.
    """

    def __init__(self, channels: int, *, precision: Precision, eps: float, groups: int = 32):
        self.scale = nnx.Param(jnp.ones((channels,), precision.params))
        self.bias = nnx.Param(jnp.zeros((channels,), precision.params))
        self.groups, self.eps, self.precision = groups, eps, precision

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        places = x.reshape(x.shape[0], -1, x.shape[3])
        y: Any = _normalise_groups(
            places, self.scale[...], self.bias[...], self.groups, self.eps, self.precision.compute
        )
        return y.reshape(x.shape)
