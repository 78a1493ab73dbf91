"""Matrix products of 8-bit floats, for wide layers on GPUs from Hopper on.

Every operand is scaled by its own largest value as it is now ("current scaling"), to E4M3 for
activations and kernels and to E5M2 for gradients; sums are wide. XLA's GPU compiler turns a product
of scaled 8-bit operands into one call of cuBLASLt; elsewhere wide types hold what was rounded.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


def quantise(x: Float[Array, "R C"], kind: type) -> tuple[Array, Float[Array, ""]]:
    """The array in 8 bits, and the float32 number by which it is to be multiplied.

    Args:
      kind: an 8-bit type; its largest number stands for the array's.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max()
    scale = jnp.where(largest > 0, largest / float(jnp.finfo(kind).max), 1.0)
    # Rounding of the quotient may pass the largest number, which would become infinite or NaN.
    limit = float(jnp.finfo(kind).max)
    return jnp.clip(wide / scale, -limit, limit).astype(kind), scale


def _widened(x: Array, scale: Array, dtype: str) -> Array:
    return x.astype(dtype) * scale.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    rows: Float[Array, "R I"], kernel: Float[Array, "I O"], gradients: str
) -> Float[Array, "R O"]:
    """Rows times a kernel, in the type of the rows; both are kept in 8 bits for the way back.

    Args:
      gradients: type of the kernel's gradient as products sum it up.
    """
    return _forward(rows, kernel, gradients)[0]


def _forward(rows, kernel, gradients):
    kept = (*quantise(rows, FORWARD), *quantise(kernel, FORWARD))
    dtype = rows.dtype.name
    y = _widened(*kept[:2], dtype) @ _widened(*kept[2:], dtype)
    like = jnp.zeros((0,), rows.dtype), jnp.zeros((0,), kernel.dtype)
    return y, (kept, like)


def _backward(gradients, saved, grad):
    (rows, rows_scale, kernel, kernel_scale), (like_rows, like_kernel) = saved
    dtype = like_rows.dtype.name
    wide_grad = _widened(*quantise(grad, BACKWARD), dtype)
    d_rows = wide_grad @ _widened(kernel, kernel_scale, dtype).T
    d_kernel = jax.lax.dot_general(
        _widened(rows, rows_scale, dtype), wide_grad, (((0,), (0,)), ((), ())),
        preferred_element_type=gradients,
    )  # fmt: skip
    return d_rows.astype(dtype), d_kernel.astype(like_kernel.dtype)


product.defvjp(_forward, _backward)
