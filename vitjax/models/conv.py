"""The layers of convolutional networks.

Array letters: B batch, Y X image, C channels, O channels out.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.models import layers
from vitjax.parallel import Precision

# How a kernel is standardised: what is added where to the deviation (None: not at all).
STANDARDISATIONS = ("none", "variance", "deviation")


def standardise(kernel: Float[Array, "Y X C O"], how: str) -> Float[Array, "Y X C O"]:
    """Gives every output channel's weights mean 0 and deviation 1.

    Args:
      how: "variance" divides by sqrt(variance + 1e-8), as BiT; "deviation" by deviation + 1e-5, as
        the hybrid Vision Transformers.

    Source: Qiao et al. 2019 (arXiv 1903.10520).
    """
    centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
    variance = (centred * centred).mean((0, 1, 2), keepdims=True)
    if how == "variance":
        return centred * jax.lax.rsqrt(variance + 1e-8)
    return centred / (jnp.sqrt(variance) + 1e-5)


class Conv(nnx.Module):
    """A convolution, channels last; kernel `[ky, kx, in / groups, out]`, drawn as He et al. 2015.

    `padding` is "SAME" as XLA has it, or the number of zeros on every side.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: str | int = 0,
        groups: int = 1,
        use_bias: bool = False,
        standardisation: str = "none",
    ):
        shape = (size, size, channels_in // groups, channels_out)
        deviation = (2.0 / (size * size * channels_in // groups)) ** 0.5
        drawn = jax.random.normal(rngs.params(), shape, precision.params)
        self.kernel = nnx.Param(drawn * deviation)
        zeros = jnp.zeros((channels_out,), precision.params)
        self.bias = nnx.Param(zeros) if use_bias else None
        self.stride, self.groups = stride, groups
        self.padding = padding if isinstance(padding, str) else ((padding, padding),) * 2
        self.standardisation = standardisation
        self.precision = precision

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 O"]:
        p = self.precision
        kernel = self.kernel[...]
        if self.standardisation != "none":
            kernel = standardise(p.full_cast(kernel), self.standardisation)
        y = jax.lax.conv_general_dilated(
            p.compute_cast(x), p.compute_cast(kernel), (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups,
        )  # fmt: skip
        return y if self.bias is None else y + p.compute_cast(self.bias[...])[None, None, None]


class GroupNorm(nnx.Module):
    """Normalisation over the image and a group of channels, in float32 (arXiv 1803.08494)."""

    def __init__(self, channels: int, *, precision: Precision, eps: float, groups: int = 32):
        self.scale = nnx.Param(jnp.ones((channels,), precision.params))
        self.bias = nnx.Param(jnp.zeros((channels,), precision.params))
        self.groups, self.eps, self.precision = groups, eps, precision

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        p = self.precision
        grouped = p.full_cast(x).reshape(*x.shape[:3], self.groups, x.shape[3] // self.groups)
        centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
        variance = (centred * centred).mean((1, 2, 4), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        scale, bias = (p.full_cast(v[...])[None, None, None] for v in (self.scale, self.bias))
        return p.compute_cast(normed * scale + bias)


def max_pool(x: Float[Array, "B Y X C"], padding: str) -> Float[Array, "B Y2 X2 C"]:
    """3 x 3, stride 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def outputs(
    features: Float[Array, "B Y X C"],
    embedding: Float[Array, "B C"],
    head: layers.Linear | None,
    precision: Precision,
) -> dict[str, Array]:
    """What a convolutional model returns: the same as a ViT."""
    b, rows, cols, channels = features.shape
    out = {"tokens": features.reshape(b, rows * cols, channels), "embedding": embedding}
    if head is not None:
        out["logits"] = precision.full_cast(head(embedding))
    return out
