"""The losses of every fast path beside those of the plain version of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax import experiment, parallel
from vitjax.models import attention, layers, norms

STEPS, BATCH = 12, 16
KERNELS = {name: functools.partial(attention.KERNELS[name], interpret=True)
           for name in ("pallas", "splash")}  # fmt: skip


def batches():
    """Images whose label can be read from one corner."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        images = rng.integers(0, 256, (BATCH, 8, 8, 1), dtype=np.uint8)
        yield {"images": images, "labels": images[:, :4, :4].mean((1, 2, 3)).astype(np.int32) // 13}


def losses(make_config, compute="float32", **model):
    """Of a few steps of the real training step, at a rate at which they fall."""
    config = make_config(model__num_classes=20, optimizer__peak_lr=1e-2)
    config.batch_size = BATCH
    config.precision.compute = compute
    config.optimizer.schedule.warmup_steps = 0
    config.model.update(model)
    exp = experiment.build(config, devices=jax.devices()[:1])
    step, state, found = exp.compile(), exp.fresh_state(), []
    for batch in batches():
        state, metrics = step(state, parallel.to_global(batch, exp.mesh, BATCH))
        found.append(float(metrics["loss"]))
    return np.array(found)


def plain_norm(x, scale, bias, eps, dtype):
    x = x.astype(jnp.float32)
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(dtype)


def plain_attention(query, key, value, is_causal):
    logits = jnp.einsum("bhnk,bhmk->bhnm", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / np.sqrt(query.shape[-1]), axis=-1)
    return jnp.einsum("bhnm,bhmk->bhnk", weights.astype(value.dtype), value)


def plain_product(rows, kernel, num_in, precision):
    return jnp.tensordot(rows, kernel.astype(precision.compute), num_in)


@pytest.fixture(scope="module")
def plain():
    """Losses by the type of compute, of layers whose gradients JAX derives by itself."""
    from tests.conftest import tiny_config

    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.setattr(norms, "_normalise", plain_norm)
        patch.setattr(layers, "product", plain_product)
        patch.setattr(layers, "fusion_border", lambda x: x)
        patch.setitem(attention.KERNELS, "xla", plain_attention)
        return {
            compute: losses(tiny_config, compute, scan=False, remat="none")
            for compute in ("float32", "bfloat16")
        }


PATHS = [{"scan": False}, {"scan": True}, {"remat": "dots"}, {"remat": "full"},
         {"attention": "pallas"}, {"attention": "splash"}]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_losses_are_those_of_the_plain_version(path, plain, make_config, monkeypatch):
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(attention.KERNELS, name, kernel)
    assert plain["float32"][-1] < 0.9 * plain["float32"][0]
    found = losses(make_config, **path)
    np.testing.assert_allclose(found, plain["float32"], rtol=1e-4)


@pytest.mark.parametrize("path", [{"scan": False}, *PATHS[-2:]], ids=str)
def test_in_bfloat16_they_differ_by_the_noise_of_the_type(path, plain, make_config, monkeypatch):
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(attention.KERNELS, name, kernel)
    noise = np.abs(plain["bfloat16"] - plain["float32"])
    found = np.abs(losses(make_config, "bfloat16", **path) - plain["float32"])
    assert noise.max() > 0
    assert found.mean() < 2 * noise.mean() and found.max() < 3 * noise.max()
