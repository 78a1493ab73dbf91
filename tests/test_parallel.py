"""Sharding, precision and recomputation: the same numbers in every arrangement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from test_train import run_steps

from vitjax import experiment, optim, parallel
from vitjax import precision as precision_lib
from vitjax.checkpoints.run import Checkpoints
from vitjax.errors import InputError
from vitjax.fingerprint import fingerprint
from vitjax.models import layers

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
HEADS = {"model__num_heads": 8, "model__width": 64}


def with_mesh(config, mesh):
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    return config


def with_pool(pool):
    return {**HEADS, "model__pool": pool, "model__parallel": pool == "map"}


@pytest.fixture(scope="module")
def alone():
    """The losses of one device, by the pool."""

    def losses(pool):
        config = tiny_config(**with_pool(pool))
        return run_steps(config, steps=5, devices=jax.devices()[:1])[0]

    return {pool: losses(pool) for pool in ("cls", "map")}


@pytest.mark.parametrize("pool", ["cls", "map"])
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_every_head_trains_alike_on_every_mesh(pool, mesh, make_config, alone):
    losses, state, _ = run_steps(with_mesh(make_config(**with_pool(pool)), mesh), steps=5)
    np.testing.assert_allclose(losses, alone[pool], rtol=1e-5)
    local = sum(x.addressable_data(0).size for x in jax.tree.leaves(state.params))
    assert local < 1.2 * sum(x.size for x in jax.tree.leaves(state.params)) / (mesh[1] * mesh[2])


def test_a_checkpoint_of_any_mesh_restores_on_any_other(tmp_path, make_config):
    experiments = [experiment.build(with_mesh(make_config(**HEADS), mesh)) for mesh in MESHES]
    for number, written in enumerate(experiments):
        folder = Checkpoints(tmp_path / str(number))
        state = written.fresh_state()
        folder.save(1, state, {})
        folder.wait()
        for read in experiments:
            restored, _ = folder.restore(1, read.state_target)
            assert fingerprint(restored.params) == fingerprint(state.params)
            assert fingerprint(restored.opt_state) == fingerprint(state.opt_state)
            for x, sharding in zip(
                jax.tree.leaves(restored), jax.tree.leaves(read.state_shardings), strict=True
            ):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)
        folder.close()


def test_heads_that_the_tensor_axis_does_not_divide_are_named(make_config):
    with pytest.raises(InputError, match=r"mesh.tensor=8 does not divide .*attention"):
        experiment.build(with_mesh(make_config(), (1, 1, 8)))


def test_recomputation_gives_the_same_losses_from_more_flops(make_config):
    def run(**changes):
        config = make_config(model__scan=False, **changes)
        losses, _, exp = run_steps(config, steps=5, devices=jax.devices()[:1])
        lowered = jax.jit(exp.train_step).lower(exp.state_target, exp.abstract_batch)
        return losses, lowered.cost_analysis()["flops"]

    plain, flops = run()
    for remat, more in (("dots", 1.01), ("full", 1.2)):
        again, found = run(model__remat=remat)
        np.testing.assert_allclose(again, plain, rtol=1e-6)
        assert found > more * flops


def test_offloading_is_refused_where_there_is_one_memory(make_config):
    for change in ({"model__remat": "offload"}, {"optimizer__offload": True}):
        with pytest.raises(InputError, match="CPUs have one memory"):
            experiment.build(make_config(**change), devices=jax.devices()[:1])


def test_gradients_are_summed_in_the_type_that_the_policy_says(make_config):
    """Of many small terms, a bfloat16 result keeps 8 bits and a float32 one keeps them all."""
    rows = jax.random.randint(jax.random.key(0), (4096, 8), -9, 10).astype(jnp.bfloat16)
    kernel = jnp.zeros((8, 8), jnp.float32)
    exact = np.asarray(rows, np.int64).T @ np.asarray(rows, np.int64)  # below 2 ** 24
    errors = {}
    for gradients in ("bfloat16", "float32"):
        precision = precision_lib.make_precision(compute="bfloat16", gradients=gradients)
        _, pull = jax.vjp(lambda k, p=precision: layers.product(rows, k, 1, p), kernel)
        (found,) = pull(rows)
        assert found.dtype == jnp.float32
        errors[gradients] = np.abs(np.asarray(found) - exact).max()
    assert errors["float32"] == 0 < 100 < errors["bfloat16"]
    with pytest.raises(InputError, match=r"precision.gradients"):
        precision_lib.make_precision(compute="float32", gradients="bfloat16")
    config = make_config(precision__compute="bfloat16", precision__gradients="float32")
    assert all(np.isfinite(run_steps(config, devices=jax.devices()[:1])[0]))


def test_wide_gradients_of_float32_products_equal_plain_ones():
    key = jax.random.key(0)
    rows, kernel = jax.random.normal(key, (6, 2, 3)), jax.random.normal(key, (2, 3, 4, 5))
    precision = precision_lib.Precision()

    def loss(function, rows, kernel):
        return (function(rows, kernel, 2, precision) ** 2).sum()

    ours = jax.grad(loss, (1, 2))(layers._product, rows, kernel)
    plain = jax.grad(loss, (1, 2))(layers.product, rows, kernel)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_bfloat16_second_moment_does_not_freeze():
    """Rounding to nearest leaves v where it is: 0.001 (g^2 - v) is below half its last bit."""
    params = {"w": jnp.zeros((64, 64))}
    wide = optax.scale_by_adam(b2=0.999)
    narrow = optim.store_in_bfloat16(wide)
    states = {name: o.init(params) for name, o in (("wide", wide), ("narrow", narrow))}
    steps = {name: jax.jit(o.update) for name, o in (("wide", wide), ("narrow", narrow))}
    grads = {"w": jnp.ones((64, 64))}
    for _ in range(200):
        for name, step in steps.items():
            _, states[name] = step(grads, states[name])
    slots = states["narrow"]["slots"]
    assert slots.nu["w"].dtype == slots.mu["w"].dtype == jnp.bfloat16
    mean = slots.nu["w"].astype(jnp.float32).mean()
    np.testing.assert_allclose(mean, states["wide"].nu["w"].mean(), rtol=5e-3)


def test_a_bfloat16_optimizer_trains_and_is_the_same_on_a_mesh(make_config):
    changes = {"precision__optimizer": "bfloat16"}
    alone, _, _ = run_steps(make_config(**changes), steps=5, devices=jax.devices()[:1])
    spread, state, _ = run_steps(with_mesh(make_config(**changes), (1, 4, 2)), steps=5)
    np.testing.assert_allclose(spread, alone, rtol=1e-4)
    types = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert types == {jnp.dtype(jnp.bfloat16)}


def test_constraints_mean_nothing_off_the_mesh_and_something_on_it():
    x = jnp.zeros((8, 4, 16))
    assert parallel.constrain(x, "B N D") is x
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    placed = jax.jit(parallel.on_mesh(lambda x: parallel.constrain(x, "B N F") * 2, mesh))(x)
    assert placed.addressable_data(0).shape == (2, 4, 8)


def test_precision_is_a_field_of_the_experiment(make_config):
    exp = experiment.build(make_config(), devices=jax.devices()[:1])
    assert dataclasses.asdict(exp.precision)["gradients"] == "float32"
