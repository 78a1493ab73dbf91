"""What is watched for a run that diverges: norms by layer, attention logits, the alarm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax import config as config_lib
from vitjax import experiment, monitor, parallel, state
from vitjax.errors import InputError
from vitjax.models import layers
from vitjax.models.attention import attend
from vitjax.models.vit import vit

SMALL = {
    "image_size": 16, "channels": 3, "num_classes": 5, "width": 32, "depth": 3, "mlp_dim": 48,
    "num_heads": 2, "patch_size": 4,
}  # fmt: skip


def build(make_config, mesh=(1, 1, 1), **changes):
    config = make_config(**changes)
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    return experiment.build(config, devices=jax.devices()[: np.prod(mesh)])


def first_batch(exp):
    source = exp.config.data.source
    loader = experiment.make_loader(exp.config, source, exp.preprocess, training=True)
    rows = loader.train_batch(0, exp.config.batch_size, exp.config.seed)
    return parallel.to_global(rows, exp.mesh, exp.config.batch_size)


def random_like(tree, seed, scale=0.3):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda x: scale * jax.random.normal(next(keys), x.shape), tree)


def trees(exp):
    """Parameters, their gradients on real images, and updates, on the experiment's mesh."""

    def make(params, batch):
        images = state.prepare(batch["images"], exp.preprocess)
        batch = batch | {"images": images}
        grads = jax.grad(lambda p: exp.objective.loss(p, {}, batch, None)[0])(params)
        return params, grads, jax.tree.map(lambda p, g: 0.1 * p - g, params, grads)

    params = random_like(exp.model.abstract_params, 0)
    shardings = exp.state_shardings.params
    params = jax.device_put(params, shardings)
    step = jax.jit(parallel.on_mesh(make, exp.mesh), out_shardings=(shardings,) * 3)
    return step(params, first_batch(exp))


def numpy_norms(tree):
    """By name, from the definition, in float64."""
    squares = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        first, values = path[0].key, np.asarray(leaf, np.float64)
        rows = [(f"blocks/{i:02d}", x) for i, x in enumerate(values)]
        for name, x in rows if first == "blocks" else [(first, values)]:
            squares[name] = squares.get(name, 0.0) + (x**2).sum()
    return {name: total**0.5 for name, total in squares.items()}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_norms_by_layer_are_those_of_numpy_on_any_mesh(mesh, make_config):
    exp = build(make_config, mesh)
    params, grads, updates = trees(exp)
    run = jax.jit(
        parallel.on_mesh(monitor.layer_norms, exp.mesh),
        out_shardings=parallel.replicated(exp.mesh),
    )
    values = parallel.to_host(run(params, grads, updates))
    named = monitor.named_norms(monitor.layer_names(exp.model.abstract_params), values)
    wanted = {
        f"layers/{kind}/{name}": norm
        for kind, tree in (("grad_norm", grads), ("param_norm", params), ("update_norm", updates))
        for name, norm in numpy_norms(tree).items()
    }
    assert wanted.keys() == named.keys() and len(set(wanted.values())) == len(wanted)
    for name, norm in wanted.items():
        assert named[name] == pytest.approx(norm, rel=1e-5), name


def test_norms_of_narrow_leaves_are_summed_in_float32():
    wide = {"blocks": {"kernel": jnp.full((2, 64, 64), 0.1)}, "head": jnp.full((3,), 300.0)}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    norms = jax.jit(monitor.layer_norms)(wide, narrow, narrow)
    assert norms.dtype == jnp.float32
    exact = [64 * float(jnp.bfloat16(0.1))] * 2 + [300 * 3**0.5]
    np.testing.assert_allclose(norms[0], exact, rtol=1e-5)
    np.testing.assert_allclose(norms[1], [6.4, 6.4, 300 * 3**0.5], rtol=1e-5)


def test_norms_hold_no_copy_of_large_leaves():
    """As concatenating the leaves would, or going through the layers one by one."""
    up, down = (jax.ShapeDtypeStruct((4, *s), jnp.bfloat16) for s in ((512, 256), (256, 512)))
    tree = {"blocks": {"up": up, "down": down}}
    compiled = jax.jit(monitor.layer_norms).lower(tree, tree, tree).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * up.size * 2


def test_layers_are_named_in_order():
    model = vit(**(SMALL | {"depth": 12}), pool="map")
    numbered = tuple(f"blocks/{i:02d}" for i in range(12))
    names = monitor.layer_names(model.abstract_params)
    assert names == (*numbered, "head", "norm", "patch_embed", "pool", "positions")
    deep = {"blocks": {"scale": np.zeros((101, 2))}, "norm": np.zeros(3)}
    assert monitor.layer_names(deep)[:2] == ("blocks/000", "blocks/001")
    assert monitor.layer_names(deep)[100:] == ("blocks/100", "norm")


def test_layers_of_several_models_in_one_tree_are_told_apart():
    tree = {
        "decoder": {"blocks": {"scale": np.ones((2, 4))}, "mask_token": np.ones(9)},
        "encoder": {
            "blocks": {"mlp": {"kernel": np.ones((3, 2, 8))}},
            "patch_embed": {"bias": np.ones(25), "kernel": np.zeros((2, 3))},
        },
        "projection": {"kernel": np.ones((6, 6))},
    }
    tree = jax.tree.map(jnp.asarray, tree)
    norms = np.asarray(monitor.layer_norms(tree, tree, tree)[1])
    assert dict(zip(monitor.layer_names(tree), norms.tolist(), strict=True)) == {
        "decoder/blocks/00": 2, "decoder/blocks/01": 2, "decoder/mask_token": 3,
        "encoder/blocks/00": 4, "encoder/blocks/01": 4, "encoder/blocks/02": 4,
        "encoder/patch_embed": 5, "projection": 6,
    }  # fmt: skip


def numpy_normed(x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale


def numpy_turned(x, grid, theta=100.0):
    """Rotary positions as products of complex numbers; the first token is no patch."""
    half = x.shape[-1] // 2
    centres = np.stack(np.mgrid[:grid, :grid], -1).reshape(-1, 2) / grid * 2 + 1 / grid - 1
    frequency = 2 * np.pi / theta ** (np.arange(half // 2) * 2 / half)
    angles = (centres[:, :, None] * frequency).reshape(grid**2, half)
    z = (x[..., 1:, :half] + 1j * x[..., 1:, half:]) * np.exp(1j * angles)
    return np.concatenate([x[..., :1, :], np.concatenate([z.real, z.imag], -1)], -2)


VARIANTS = [{}, {"qk_norm": True}, {"key_bias": False}, {"positions": "rope"},
            {"positions": "rope", "qk_norm": True, "parallel": True}]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("scan", [True, False])
def test_the_largest_logit_is_that_of_queries_and_keys(options, scan):
    model = vit(**SMALL, pool="cls", rope_theta=100.0, eps=1e-6, scan=scan, **options)
    params = random_like(model.abstract_params, 1)
    images = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    apply = jax.jit(lambda p, x: model.apply(p, x, intermediates=True)["blocks"])
    seen = jax.tree.map(np.asarray, apply(params, images))
    assert seen["max_logit"].dtype == np.float32 and seen["max_logit"].shape == (3,)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params["blocks"]["attention"])
    for layer in range(3):
        w = jax.tree.map(lambda x, i=layer: x[i], weights)
        x = seen["norm1"][layer].astype(np.float64)
        q, k = (np.einsum("bnd,dhk->bhnk", x, w["qkv"]["kernel"][:, i]) for i in (0, 1))
        if "bias" in w["qkv"]:
            q, k = (y + w["qkv"]["bias"][i][:, None] for i, y in enumerate((q, k)))
        else:
            q = q + w["qv_bias"][0][:, None]
        if options.get("qk_norm"):
            q, k = (numpy_normed(y, w[n]["scale"]) for y, n in ((q, "query_norm"), (k, "key_norm")))
        if options.get("positions") == "rope":
            q, k = numpy_turned(q, 4), numpy_turned(k, 4)
        logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(16)
        assert seen["max_logit"][layer] == pytest.approx(abs(logits).max(), rel=1e-5)


def test_the_largest_logit_grows_with_the_queries():
    model = vit(**(SMALL | {"depth": 1}))
    params = model.init(jax.random.key(0))
    grown = jax.tree.map(jnp.copy, params)
    qkv = grown["blocks"]["attention"]["qkv"]
    qkv["kernel"] = qkv["kernel"].at[:, :, 0].multiply(10.0)
    images = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    apply = jax.jit(lambda p: model.apply(p, images, intermediates=True)["blocks"]["max_logit"])
    assert apply(params)[0] > 0
    np.testing.assert_allclose(apply(grown), 10 * apply(params), rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_largest_logit_costs_a_step_nothing(remat, make_config, monkeypatch):
    """The step takes a kernel that does not compute it."""
    exp = build(make_config, (1, 1, 1), model__remat=remat)
    asked = []

    def watched(*arguments):
        asked.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(layers, "attend", watched)
    jax.eval_shape(parallel.on_mesh(exp.train_step, exp.mesh), exp.state_target, exp.abstract_batch)
    assert not asked
    images = jax.ShapeDtypeStruct(exp.abstract_batch["images"].shape, jnp.float32)
    params = exp.abstract_state.params
    jax.eval_shape(lambda p, x: exp.model.apply(p, x, intermediates=True), params, images)
    assert asked


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_attention_logits_are_those_of_the_first_images(mesh, make_config):
    exp = build(make_config, mesh, optimizer__ema_decay=0.99)
    train_state, batch = exp.fresh_state(), first_batch(exp)
    params = random_like(exp.model.abstract_params, 3)
    train_state.params = jax.device_put(params, exp.state_shardings.params)
    images = np.asarray(batch["images"])

    def wanted(count):
        first = state.prepare(jnp.asarray(images[:count]), exp.preprocess)
        return exp.model.apply(params, first, intermediates=True)["blocks"]["max_logit"]

    assert (wanted(4) < wanted(32)).all()
    for num_images in (4, 8, 1000):  # the batch has 32
        watch = monitor.AttentionLogits(exp, num_images)
        found = watch(train_state, batch)
        per_layer = [found[f"attention/max_logit/{i:02d}"] for i in range(2)]
        np.testing.assert_allclose(per_layer, wanted(num_images), rtol=1e-5)
        assert found["attention/max_logit"] == max(per_layer) and len(found) == 3
        assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_attention_logits_compile_once_while_the_state_moves(mesh, make_config):
    exp = build(make_config, mesh)
    step, train_state, batch = exp.compile(), exp.fresh_state(), first_batch(exp)
    watch = monitor.AttentionLogits(exp)
    found = [watch(train_state, batch)]
    for _ in range(2):
        train_state, _ = step(train_state, batch)
        found.append(watch(train_state, batch))
    assert watch._max_logits._cache_size() == 1
    assert len({values["attention/max_logit"] for values in found}) == 3


@pytest.mark.parametrize(
    "model",
    [
        {"target": "vitjax.models.bit:bit", "blocks": (1, 1), "widths": (32, 64), "groups": 8,
         "root_width": 8},
        {"target": "vitjax.models.convnext:convnext", "blocks": (1, 1), "widths": (8, 16)},
    ],
    ids=lambda model: model["target"],
)  # fmt: skip
def test_attention_logits_need_attention(model, make_config):
    config = make_config(data__image_size=32)
    config.unlock()
    config.model = config_lib.ConfigDict(model | {"num_classes": 10})
    config.optimizer.decay = ((".*/kernel", 1.0),)
    exp = experiment.build(config, devices=jax.devices()[:1])
    with pytest.raises(InputError, match=r"monitor.attention_logits needs a Vision Transformer"):
        monitor.AttentionLogits(exp)


def test_attention_logits_need_an_image(make_config):
    with pytest.raises(InputError, match="num_images must be at least 1, got 0"):
        monitor.AttentionLogits(build(make_config), num_images=0)


def test_a_growing_value_raises_few_alarms():
    alarm = monitor.GrowthAlarm(100)
    raised = [x for x in [1, 99, 100, 101, 150, 201, 202, 300, 50, 403, 404, 1000] if alarm(x)]
    assert raised == [101, 202, 404, 1000]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_value_that_is_not_finite_raises_one_alarm(value):
    alarm = monitor.GrowthAlarm(100.0)
    assert [alarm(x) for x in (200.0, 210.0, value, value, 500.0)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    fresh = monitor.GrowthAlarm(float("inf"))
    assert [fresh(x) for x in (1e30, value, value)] == [False, True, False]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_an_alarm_needs_a_positive_limit(limit):
    with pytest.raises(InputError, match=f"must be positive, got {limit}"):
        monitor.GrowthAlarm(limit)
