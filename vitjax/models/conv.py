"""The layers of convolutional networks.

Array letters: B batch, Y X image, C channels, O channels out.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.models import layers
from vitjax.precision import Precision

# How a kernel is standardised: what is added where to the deviation ("none": not at all).
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


def _convolve(x: Array, kernel: Array, stride: int, padding, groups: int) -> Array:
    is_pointwise = kernel.shape[:2] == (1, 1) and groups == 1
    if is_pointwise and (padding == "SAME" or not any(map(any, padding))):
        # One product: on CPUs its gradients take a quarter of a convolution's time.
        x = jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))
        rows = x.reshape(-1, x.shape[3]) @ kernel[0, 0]
        return rows.reshape(*x.shape[:3], -1)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _wide(x, kernel, stride, padding, groups, precision):
    return _convolve(x, precision.compute_cast(kernel), stride, padding, groups)


def _wide_forward(x, kernel, stride, padding, groups, precision):
    return _wide(x, kernel, stride, padding, groups, precision), (x, kernel)


def _wide_backward(stride, padding, groups, precision, saved, grad):
    x, kernel = saved
    narrow = precision.compute_cast(kernel)
    (d_x,) = jax.vjp(lambda v: _convolve(v, narrow, stride, padding, groups), x)[1](grad)
    wide = [v.astype(precision.gradients) for v in (x, kernel, grad)]
    pull = jax.vjp(lambda k: _convolve(wide[0], k, stride, padding, groups), wide[1])[1]
    (d_kernel,) = pull(wide[2])
    return d_x, d_kernel.astype(kernel.dtype)


_wide.defvjp(_wide_forward, _wide_backward)


def convolve(
    x: Float[Array, "B Y X C"],
    kernel: Float[Array, "H W I O"],
    stride: int,
    padding: str | tuple[tuple[int, int], ...],
    groups: int,
    precision: Precision,
) -> Float[Array, "B Y2 X2 O"]:
    """Convolves in the type of compute; the kernel's gradient has the type of gradients.

    Where that is the wider one, the kernel's gradient is computed in it whole, which costs time.
    """
    x = precision.compute_cast(x)
    if precision.gradients == precision.compute:
        return _convolve(x, precision.compute_cast(kernel), stride, padding, groups)
    return _wide(x, kernel, stride, padding, groups, precision)


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
        y = convolve(x, kernel, self.stride, self.padding, self.groups, p)
        return y if self.bias is None else y + p.compute_cast(self.bias[...])[None, None, None]


def max_pool(x: Float[Array, "B Y X C"], padding: str) -> Float[Array, "B Y2 X2 C"]:
    """The largest value of every 3 x 3 window, stride 2.

    Along one axis and then along the other, by slices: XLA's gradient of a window's maximum is a
    scatter, 8 times as slow on CPUs. Values that tie share the gradient.
    """
    pads = jax.lax.padtype_to_pads(x.shape, (1, 3, 3, 1), (1, 2, 2, 1), padding)
    for axis in (1, 2):
        config = [(*pads[axis], 0) if i == axis else (0, 0, 0) for i in range(4)]
        x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), config)
        last = (x.shape[axis] - 3) // 2 * 2  # the last window's start
        first, second, third = (jax.lax.slice_in_dim(x, i, i + last + 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def check_images(images: Float[Array, "B Y X C"], channels: int, smallest: int) -> None:
    """Raises InputError for images that the network does not take."""
    if images.shape[3] != channels:
        raise InputError(f"the model takes images of {channels} channels, got {images.shape[3]}")
    if min(images.shape[1:3]) < smallest:
        raise InputError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels are too small; "
            f"at least {smallest} along each side are needed"
        )


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
