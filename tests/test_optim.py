import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitjax import config as config_lib
from vitjax import optim, schedules
from vitjax.errors import InputError
from vitjax.models.vit import vit

MODEL = vit(
    image_size=8,
    channels=1,
    num_classes=3,
    width=32,
    depth=3,
    mlp_dim=64,
    num_heads=2,
    patch_size=4,
)
ALGORITHMS = {
    "adam": {"target": "optax:scale_by_adam", "b2": 0.95},
    "adam_bf16": {"target": "optax:scale_by_adam", "mu_dtype": "bfloat16"},
    "sgd": {"target": "vitjax.optim:scale_by_momentum"},
    "lion": {"target": "optax:scale_by_lion"},
    "muon": {"target": "vitjax.optim:scale_by_muon"},
    "adafactor": {"target": "vitjax.optim:scale_by_adafactor"},
}
RATES = {"sgd": 0.3, "lion": 1e-3}
SCHEDULES = {
    "constant": {"warmup_steps": 5},
    "cosine": {"warmup_steps": 5, "final_fraction": 0.1},
    "rsqrt": {"warmup_steps": 5, "cooldown_steps": 10, "timescale": 20},
    "warmup_stable_decay": {"warmup_steps": 5, "cooldown_steps": 10},
}


def params(seed=0):
    """Random everywhere, the zero head included, so that every gradient is alive."""
    leaves, treedef = jax.tree.flatten(MODEL.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def make(algorithm="adam", schedule="constant", tree=None, **settings):
    return optim.make_optimizer(
        params() if tree is None else tree,
        algorithm=config_lib.build(ALGORITHMS[algorithm]),
        schedule=config_lib.build(
            {"target": f"vitjax.schedules:{schedule}"} | SCHEDULES[schedule], total_steps=40
        ),
        **{"peak_lr": RATES.get(algorithm, 1e-2), "clip_norm": 1.0} | settings,
    )


def loss(tree):
    images = jax.random.normal(jax.random.key(7), (16, 8, 8, 1))
    logits = MODEL.apply(tree, images)["logits"]
    labels = (images.mean((1, 2, 3)) > 0).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [(name, "cosine") for name in ALGORITHMS] + [("adam", name) for name in SCHEDULES],
)
def test_every_optimizer_and_schedule_learns_and_compiles_once(algorithm, schedule):
    tree = params()
    optimizer = make(algorithm, schedule, weight_decay=1e-3)
    state = optimizer.init(tree)
    first = loss(tree)
    traces = []

    @jax.jit
    def step(tree, state):
        traces.append(1)
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    for _ in range(15):
        tree, state = step(tree, state)
    assert len(traces) == 1
    assert loss(tree) < 0.5 * first
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, params())


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_to_one_and_stay_in_range(name):
    schedule = config_lib.build(
        {"target": f"vitjax.schedules:{name}"} | SCHEDULES[name], total_steps=40
    )
    values = np.array([schedule(jnp.asarray(i)) for i in range(40)])
    np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert ((values > 0) & (values <= 1)).all()
    assert (np.diff(values[5:]) <= 1e-7).all()
    if name == "cosine":
        assert values[-1] == pytest.approx(0.1, abs=0.01)
        assert schedule(jnp.asarray(22)) == pytest.approx(0.1 + 0.9 * 0.5, abs=0.03)
    if name == "rsqrt":
        assert values[25] == pytest.approx(1 / np.sqrt(1 + 20 / 20), rel=1e-5)
    if name in ("rsqrt", "warmup_stable_decay"):
        assert values[-1] == pytest.approx(0.1 * values[29] if name != "rsqrt" else 0.06, abs=0.02)


def test_adamw_equals_optax():
    tree, grads = params(), jax.grad(loss)(params())
    mask = jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", tree)
    reference = optax.adamw(1e-2 * 0.2, b2=0.95, weight_decay=0.1, mask=mask)
    ours = make("adam", weight_decay=0.1, clip_norm=None)
    a, _ = reference.update(grads, reference.init(tree), tree)
    b, _ = ours.update(grads, ours.init(tree), tree)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), a, b)


def test_weight_decay_goes_from_the_first_to_the_last_along_half_a_cosine():
    tree = params()
    nothing = jax.tree.map(jnp.zeros_like, tree)
    rates, settings = (
        1e-2 * np.array([0.2, 0.4, 0.6, 0.8, 1, 1]),
        {"clip_norm": None, "weight_decay": 0.04},
    )
    moving = make("adam", final_weight_decay=0.2, total_steps=4, **settings)
    state, seen = moving.init(tree), []
    for rate in rates:
        updates, state = moving.update(nothing, state, tree)
        seen.append(float((-updates["head"]["kernel"] / tree["head"]["kernel"]).mean() / rate))
    wanted = [0.2 - 0.16 * (1 + np.cos(np.pi * min(t, 4) / 4)) / 2 for t in range(6)]
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)
    assert not updates["blocks"]["norm1"]["scale"].any()
    same = make("adam", final_weight_decay=0.04, total_steps=4, **settings)
    plain = make("adam", **settings)  # and its state is that of before there was a schedule
    assert jax.tree.structure(same.init(tree)) == jax.tree.structure(plain.init(tree))


def test_decay_factors_let_the_last_pattern_win():
    factors = optim.decay_factors(params(), ((".*/kernel", 1.0), ("head/kernel", 100.0)))
    assert factors["head"]["kernel"] == 100.0
    assert factors["blocks"]["mlp"]["up"]["kernel"] == 1.0
    assert factors["blocks"]["norm1"]["scale"] == 0.0


def test_layer_decay_falls_by_the_layer():
    scales = optim.layer_scales(params(), 0.5)
    np.testing.assert_allclose(
        scales["blocks"]["mlp"]["up"]["kernel"].ravel(), [1 / 8, 1 / 4, 1 / 2]
    )
    assert scales["head"]["kernel"] == 1.0
    assert scales["patch_embed"]["kernel"] == 1 / 16
    tree, grads = params(), jax.grad(loss)(params())
    plain, scaled = make(), make(layer_decay=0.5)
    a, _ = plain.update(grads, plain.init(tree), tree)
    b, _ = scaled.update(grads, scaled.init(tree), tree)
    jax.tree.map(lambda x, s, y: np.testing.assert_allclose(x * s, y, rtol=1e-6), a, scales, b)


def test_frozen_parameters_stay_and_have_no_slots():
    tree = params()
    optimizer = make(freeze=("patch_embed/.*", "blocks/.*"), weight_decay=0.1, layer_decay=0.9)
    state = optimizer.init(tree)
    names = [optim.path_name(p) for p, _ in jax.tree.leaves_with_path(state)]
    assert any("head/kernel" in n for n in names)
    assert not any("patch_embed" in n or "blocks" in n for n in names)
    updates, _ = optimizer.update(jax.grad(loss)(tree), state, tree)
    moved = optax.apply_updates(tree, updates)
    for part in ("patch_embed", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, moved[part], tree[part])
    assert not np.array_equal(moved["head"]["kernel"], tree["head"]["kernel"])


def test_adafactor_keeps_bfloat16_momentum_and_factored_moments():
    tree = params()
    state = make("adafactor").init(tree)
    leaves = {optim.path_name(p): x for p, x in jax.tree.leaves_with_path(state)}
    momentum = [x for n, x in leaves.items() if "ema" in n and n.endswith("mlp/up/kernel")]
    assert [x.dtype for x in momentum] == [jnp.bfloat16]
    rows = [x for n, x in leaves.items() if "v_row" in n and n.endswith("mlp/up/kernel")]
    assert rows[0].size < tree["blocks"]["mlp"]["up"]["kernel"].size / 10


def test_muon_orthogonalises_each_matrix_of_a_block():
    tree = params()
    algorithm = config_lib.build(ALGORITHMS["muon"] | {"newton_schulz_steps": 10})
    updates, _ = algorithm.update(jax.grad(loss)(tree), algorithm.init(tree), tree)
    for kernel in (
        updates["blocks"]["attention"]["qkv"]["kernel"][1, :, 2].reshape(32, 32),
        updates["blocks"]["attention"]["out"]["kernel"][2].reshape(32, 32),
        updates["blocks"]["mlp"]["up"]["kernel"][0],
    ):
        values = np.linalg.svd(np.asarray(kernel), compute_uv=False)
        values = values / (0.2 * np.sqrt(max(kernel.shape)))
        assert 0.6 < np.median(values) < 1.3


def test_ema_equals_its_closed_form():
    ema = {"x": jnp.zeros(())}
    for step in range(5):
        ema = optim.update_ema(ema, {"x": jnp.asarray(1.0)}, jnp.asarray(step), 0.9)
    remaining = np.prod([min(0.9, (1 + t) / (10 + t)) for t in range(5)])
    assert ema["x"] == pytest.approx(1 - remaining, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ("nothing/.*",)}, "matches no parameter"),
        ({"freeze": (".*",)}, "freezes every parameter"),
        ({"freeze": ("[",)}, "pattern"),
        ({"weight_decay": 0.1, "decay": (("kernels", 1.0),)}, "matches no parameter"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"final_weight_decay": -0.1}, "final_weight_decay must not be negative, got -0.1"),
        ({"peak_lr": 0.0}, "peak_lr must be positive"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        make(**settings)


def test_phases_must_fit():
    with pytest.raises(InputError, match="do not fit in total_steps=10"):
        schedules.warmup_stable_decay(total_steps=10, warmup_steps=6, cooldown_steps=6)
