"""Products of 8-bit floats: exact where they can be, off where they are not asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.models import fp8
from vitjax.models.vit import vit
from vitjax.precision import Precision, make_precision

SIZES = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "patch_size": 8}


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def backward(rows, kernel, grad):
    y, pull = jax.vjp(lambda r, k: fp8.product(r, k, "float32"), rows, kernel)
    return y, *pull(grad)


def test_numbers_of_eight_bits_are_multiplied_exactly():
    """The largest is a power of two times the type's largest number, so that scales are exact."""
    rng = np.random.default_rng(0)
    rows, kernel = rng.integers(-7, 8, (16, 32)), rng.integers(-7, 8, (32, 8))
    rows[0, 0] = kernel[0, 0] = 7  # 448 / 64
    grad = rng.integers(-3, 4, (16, 8))
    grad[0, 0] = 7  # 57344 / 8192
    y, d_rows, d_kernel = backward(*(jnp.asarray(x, jnp.float32) for x in (rows, kernel, grad)))
    np.testing.assert_array_equal(y, rows @ kernel)
    np.testing.assert_array_equal(d_rows, grad @ kernel.T)
    np.testing.assert_array_equal(d_kernel, rows.T @ grad)


def test_it_is_as_near_float64_as_eight_bits_are():
    """Of 3 and 2 bits after the point: at most 1/16 and 1/8 of each factor, less in a sum."""
    rows, kernel, grad = drawn(1, 64, 128), 1e-3 * drawn(2, 128, 32), 1e4 * drawn(3, 64, 32)
    a, b, g = (np.asarray(x, np.float64) for x in (rows, kernel, grad))
    wanted = a @ b, g @ b.T, a.T @ g
    bounds = 0.05, 0.08, 0.08
    for found, right, bound in zip(backward(rows, kernel, grad), wanted, bounds, strict=True):
        error = np.linalg.norm(found - right) / np.linalg.norm(right)
        assert 0.01 < error < bound


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_no_size_of_numbers_is_lost(value):
    rows, kernel = jnp.full((4, 8), value), jnp.eye(8)
    y = fp8.product(rows, kernel, "float32")
    np.testing.assert_allclose(y, rows, rtol=1e-6)


def test_only_the_blocks_take_it_and_only_if_asked():
    make = {"image_size": 16, "channels": 3, "num_classes": 4, **SIZES}
    plain, narrow = vit(**make), vit(**make, precision=Precision(products="fp8"))
    params, images = plain.init(jax.random.key(0)), drawn(4, 2, 16, 16, 3)

    def text(model):
        return jax.jit(model.apply).lower(params, images).as_text()

    assert "f8E4M3FN" not in text(plain)
    programs = text(narrow)
    assert "f8E4M3FN" in programs and "8x32xf8E4M3FN" in programs  # B N, D
    assert "x192xf8E4M3FN" not in programs  # not the patches
    a, b = (np.asarray(m.apply(params, images)["tokens"]) for m in (plain, narrow))
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1


def test_an_unknown_kind_is_explained():
    with pytest.raises(InputError, match=r"unknown precision.products 'fp4'.*fp8"):
        make_precision(products="fp4")
