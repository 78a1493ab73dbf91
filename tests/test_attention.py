"""Every kernel of attention is the same function, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax import parallel
from vitjax.models import attention
from vitjax.precision import Precision

# As they run here: the accelerators' own ones are interpreted.
RUN = {
    "explicit": lambda *a: attention.attend(*a[:3], Precision(), None, a[3])[0],
    "xla": attention.KERNELS["xla"],
    "pallas": functools.partial(attention.KERNELS["pallas"], interpret=True),
    "splash": functools.partial(attention.KERNELS["splash"], interpret=True),
}


def drawn(seed, shape, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def in_float64(query, key, value, grad, is_causal):
    """Mixed values and the gradients of query, key and value, written out in NumPy."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (query, key, value, grad))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bhnk,bhmk->bhnm", q, k) * scale
    if is_causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bhnk,bhmk->bhnm", g, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    mixed = np.einsum("bhnm,bhmk->bhnk", weights, v)
    d_query, d_key = d_logits @ k, np.swapaxes(d_logits, 2, 3) @ q
    return mixed, d_query, d_key, np.swapaxes(weights, 2, 3) @ g


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", list(RUN))
def test_kernels_agree_with_float64(name, is_causal):
    shape = (2, 2, 130, 16) if name == "splash" else (2, 2, 37, 16)  # not the kernels' blocks
    query, key, value, grad = drawn(len(name) + is_causal, shape)
    query = 3 * query

    @jax.jit
    def run(*inputs):
        mixed, backward = jax.vjp(lambda *x: RUN[name](*x, is_causal), *inputs)
        return mixed, *backward(grad)

    wanted = in_float64(query, key, value, grad, is_causal)
    for found, right in zip(run(query, key, value), wanted, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5 * np.abs(right).max())


def test_bfloat16_is_as_exact_as_its_products():
    query, key, value, grad = drawn(7, (2, 2, 37, 16), "bfloat16")
    mixed, backward = jax.vjp(lambda *x: attention.KERNELS["xla"](*x, False), query, key, value)
    wanted = in_float64(query, key, value, grad, False)
    for found, right in zip((mixed, *backward(grad)), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found, np.float64) - right).max()
        assert error < 2 * 2**-8 * np.abs(right).max()


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_a_mesh_changes_nothing(name):
    """Batch and heads are split; kernels that XLA cannot split run on each device's part."""
    inputs = drawn(3, (4, 4, 9, 8))[:3]
    mesh = parallel.make_mesh({"replica": 1, "fsdp": 2, "tensor": 4})

    def run(query, key, value):
        return RUN[name](query, key, value, False)

    split = jax.jit(parallel.on_mesh(run, mesh))(*inputs)
    np.testing.assert_allclose(split, run(*inputs), atol=1e-6)


def test_kernels_are_named_for_their_platforms():
    assert attention.available("cpu") == ["xla"]
    assert attention.available("gpu") == ["xla", "cudnn", "pallas"]
    assert attention.available("tpu") == ["xla", "splash"]
