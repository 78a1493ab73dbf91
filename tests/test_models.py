import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.models import shapes
from vitjax.models.positions import rope_angles, rotate, sincos2d_positions
from vitjax.models.vit import patchify, vit
from vitjax.precision import Precision

SMALL = {
    "image_size": 16,
    "channels": 3,
    "num_classes": 5,
    "width": 32,
    "depth": 3,
    "mlp_dim": 48,
    "num_heads": 4,
    "patch_size": 4,
}


def geometry(model):
    return dict(model.arguments)["geometry"]


def images(batch=2, size=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, size, size, 3))


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
@pytest.mark.parametrize(
    "variant", [{}, {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False}]
)
def test_the_count_equals_the_built_model(pool, positions, variant):
    model = vit(**SMALL, pool=pool, positions=positions, **variant)
    assert sum(shapes.count_params(geometry(model)).values()) == model.num_params


@pytest.mark.parametrize("name", [f"{n}/16" for n in shapes.SHAPES])
def test_every_named_shape_is_counted_exactly(name):
    model = vit(shape=name, image_size=224, channels=3, num_classes=1000, pool="map")
    assert sum(shapes.count_params(geometry(model)).values()) == model.num_params


# name, millions of parameters, GFLOP at 224 and 384 (Zhai et al. 2021, table 2; 2106.04560)
PUBLISHED = [
    ("s/28", 5.4, 0.7, 2.0), ("s/16", 5.0, 2.2, 7.8), ("S/32", 22, 2.3, 6.9),
    ("Ti/16", 5.5, 2.5, 9.5), ("B/32", 87, 8.7, 26.0), ("S/16", 22, 9.2, 31.2),
    ("B/28", 87, 11.3, 30.5), ("B/16", 86, 35.1, 111.3), ("L/16", 303, 122.9, 382.8),
    ("g/14", 1011, 533.1, 1596.4), ("G/14", 1843, 965.3, 2859.9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "at_224", "at_384"), PUBLISHED)
def test_published_table(name, params, at_224, at_384):
    encoder, patch = shapes.parse_shape(name)

    def gflop(size):  # the published numbers count every operation, and the head of JFT
        g = shapes.Geometry(
            encoder, patch, size, 3, 29_593, "gap", "learned", *[True] * 2, *[False] * 2
        )
        return round(shapes.count_flops(g, elementwise=True) / 1e9, 1)

    assert (gflop(224), gflop(384)) == (at_224, at_384)
    g = shapes.Geometry(encoder, patch, 224, 3, 0, "gap", "learned", *[True] * 2, *[False] * 2)
    counted = sum(shapes.count_params(g).values()) / 1e6
    # The paper rounds up or counts a head here and there; one unit of its last digit.
    assert abs(counted - params) <= (0.1 if params < 10 else 1.0)


def test_flops_equal_the_compilers_count():
    model = vit(**SMALL, scan=False)
    params = model.abstract_params
    lowered = jax.jit(lambda p, x: model.apply(p, x)["logits"]).lower(
        params, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    )
    counted = shapes.count_flops(geometry(model), elementwise=True)
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.02)


def test_patches_are_row_major():
    y, x = np.mgrid[:4, :6]
    picture = jnp.asarray(np.stack([y, x], -1), jnp.float32)[None]
    patches = patchify(picture, 2)
    assert patches.shape == (1, 6, 8)
    np.testing.assert_array_equal(patches[0, 4].reshape(2, 2, 2)[0, 0], [2, 2])


def test_fixed_positions_tell_every_patch_apart():
    table = sincos2d_positions(7, 7, 64)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distances[~np.eye(49, dtype=bool)].min() > 0.1


def test_scanned_and_unrolled_give_the_same_numbers_from_the_same_parameters():
    scanned, unrolled = vit(**SMALL, scan=True), vit(**SMALL, scan=False)
    params = jax.tree.map(lambda x: x + 0.01, scanned.init(jax.random.key(0)))
    a, b = (jax.jit(m.apply)(params, images()) for m in (scanned, unrolled))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_memory_but_no_gradient(remat):
    plain, saving = vit(**SMALL), vit(**SMALL, remat=remat)
    params = jax.tree.map(lambda x: x + 0.01, plain.init(jax.random.key(0)))

    def gradient(model):
        return jax.grad(lambda p: (model.apply(p, images())["logits"] ** 2).sum())(params)

    text = str(jax.make_jaxpr(lambda: gradient(saving))())
    assert "remat" in text or "checkpoint" in text
    a, b = gradient(plain), gradient(saving)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_every_intermediate_can_be_returned():
    model = vit(**SMALL, pool="cls")
    params = model.init(jax.random.key(0))
    out = jax.eval_shape(lambda p, x: model.apply(p, x, intermediates=True), params, images())
    assert out["patches"].shape == (2, 17, 32)
    assert out["blocks"]["attention_weights"].shape == (3, 2, 4, 17, 17)
    assert {
        k: v.shape for k, v in out["blocks"].items() if k not in ("attention_weights", "max_logit")
    } == dict.fromkeys(("norm1", "attention", "mlp", "output"), (3, 2, 17, 32))


def test_dropping_needs_a_key_and_depends_on_it():
    model = vit(**SMALL, dropout_rate=0.2, drop_path_rate=0.5)
    params = jax.tree.map(lambda x: x + 0.01, model.init(jax.random.key(0)))
    run = jax.jit(lambda key: model.apply(params, images(), key)["tokens"])
    once = run(jax.random.key(1))
    np.testing.assert_array_equal(once, run(jax.random.key(1)))
    assert not np.allclose(once, run(jax.random.key(2)))
    quiet = model.apply(params, images())["tokens"]
    np.testing.assert_array_equal(quiet, model.apply(params, images())["tokens"])
    assert not np.allclose(quiet, once)


def test_stochastic_depth_drops_whole_branches_of_single_examples():
    from vitjax.models.layers import dropout

    x = jnp.ones((64, 3, 5))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0), whole=True))
    per_example = dropped.reshape(64, -1)
    assert (per_example == per_example[:, :1]).all()
    np.testing.assert_allclose(np.unique(per_example), [0, 4 / 3], rtol=1e-6)


def test_bfloat16_compute_keeps_float32_where_it_matters():
    from vitjax.precision import Precision

    model = vit(**SMALL, precision=Precision(compute="bfloat16"))
    params = model.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.eval_shape(lambda p, x: model.apply(p, x, intermediates=True), params, images())
    assert out["tokens"].dtype == jnp.bfloat16
    assert out["logits"].dtype == jnp.float32
    assert out["blocks"]["attention_weights"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": "Bb/16"}, "did you mean"),
        ({"shape": "B"}, "patch size"),
        ({"image_size": 18}, "16 and 20"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"pool": "mean"}, "cls, gap, map"),
        ({"remat": "all"}, "none, dots, full"),
        ({"width": None}, "model.width"),
        ({"drop_path_rate": 1.0}, "[0, 1)"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(change, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[").replace(")", r"\)")):
        vit(**(SMALL | change))


def test_whether_layers_are_scanned_is_no_number():
    unchecked = getattr(vit, "__wrapped__", vit)  # the tests' type checker would come first
    with pytest.raises(InputError, match="True, False or None, got 1"):
        unchecked(**(SMALL | {"scan": 1}))


FAMILY_OPTIONS = [
    {"pool": "cls", "num_registers": 2, "mask_token": True, "layer_scale": 0.1, "mlp": "gated",
     "activation": "silu", "positions": "rope", "key_bias": False},
    {"pool": "cls", "position_prefix": "all", "num_registers": 2},
    {"pool": "cls", "position_prefix": "none", "layer_scale": 0.1},
    {"pool": "cls_gap", "num_registers": 2, "table_size": 32},
    {"pool": "cls", "distill_token": True, "distill_head": True},
    {"pool": "cls", "pre_norm": True, "patch_bias": False, "projection_dim": 7},
    {"pool": "gap", "cls_token": True, "norm_after_pool": True, "qk_norm": True,
     "qk_norm_bias": True},
    {"pool": "cls", "pre_logits_dim": 9, "mlp_bias": False, "out_bias": False},
    {"pool": "map", "positions": "none", "mlp": "gated", "mlp_bias": False},
]  # fmt: skip


@pytest.mark.parametrize("options", FAMILY_OPTIONS, ids=str)
def test_the_options_of_all_families_are_counted_and_trained(options):
    """Counts are exact, every parameter gets a gradient, and another size is taken."""
    model = vit(**SMALL, **options)
    g = geometry(model)
    assert sum(shapes.count_params(g).values()) == model.num_params
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape) * 0.3, model.abstract_params
    )
    masked = jnp.tile(jnp.arange(16) % 3 == 0, (2, 1)) if g.mask_token else None

    def loss(params):
        out = model.apply(params, images(), masked=masked)
        return (out["logits"] ** 2).sum() + out["embedding"].sum()

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.asarray(grad).any(), path
    larger = jax.eval_shape(lambda p, x: model.apply(p, x), params, jnp.zeros((2, 20, 28, 3)))
    assert larger["tokens"].shape == (2, 35 + g.num_prefix, 32)
    assert larger["embedding"].shape == (2, g.embedding_dim)


@pytest.mark.parametrize("options", FAMILY_OPTIONS, ids=str)
def test_matrix_products_of_all_families_are_counted(options):
    """Against XLA's count of the same program, whose elementwise operations are few here."""
    wide = SMALL | {"width": 128, "mlp_dim": 192, "num_heads": 2}
    model = vit(**wide, scan=False, **options)
    lowered = jax.jit(lambda p, x: model.apply(p, x)["logits"]).lower(
        model.abstract_params, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    )
    counted = shapes.count_flops(geometry(model), elementwise=True)
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)


def test_the_mask_token_takes_the_place_of_patches():
    model = vit(**SMALL, pool="cls", mask_token=True)
    params = model.init(jax.random.key(0))
    masked = jnp.tile(jnp.arange(16) == 3, (2, 1))
    a = model.apply(params, images(), masked=masked, intermediates=True)["patches"]
    b = model.apply(params, images(), intermediates=True)["patches"]
    changed = np.asarray(abs(a - b).max((0, 2)) > 0)
    np.testing.assert_array_equal(changed, np.arange(17) == 4)
    np.testing.assert_allclose(a[:, 4], jnp.tile(params["positions"][4:5], (2, 1)), atol=1e-6)
    with pytest.raises(InputError, match="no mask token"):
        vit(**SMALL).apply(vit(**SMALL).init(jax.random.key(0)), images(), masked=masked)


def test_rotary_attention_sees_distances_not_places():
    """Turning queries and keys by the same grid, moved, leaves their products as they were."""
    sin, cos = rope_angles(6, 6, 16, 100.0)
    assert sin.shape == (36, 16)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 36, 16))
    q, k = jnp.tile(q[:, :, :1], (1, 1, 36, 1)), jnp.tile(k[:, :, :1], (1, 1, 36, 1))
    turned = [rotate(x, (sin, cos), Precision()) for x in (q, k)]
    products = np.asarray(jnp.einsum("bhnk,bhmk->nm", *turned)).reshape(6, 6, 6, 6)
    np.testing.assert_allclose(products[0, 0, 2, 3], products[3, 2, 5, 5], rtol=1e-4)
    assert abs(products[0, 0, 2, 3] - products[0, 0, 3, 2]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "swiglu"}, "unknown model.mlp 'swiglu'"),
        ({"pool": "cls", "cls_token": False}, "pool='cls' needs model.cls_token=True"),
        ({"distill_token": True}, "needs model.cls_token=True"),
        ({"pool": "cls", "distill_head": True}, "needs model.distill_token=True"),
        ({"pool": "map", "norm_after_pool": True}, "norm_after_pool must be False"),
        ({"qk_norm_bias": True}, "needs model.qk_norm=True"),
        ({"num_registers": -1}, "num_registers must be 0"),
        ({"projection_dim": 0}, "projection_dim must be positive"),
        ({"positions": "rope", "width": 24}, "divisible by 4, got 24 / 4"),
        ({"table_size": 18}, "image size 18 is not divisible"),
        ({"position_resampling": "nearest"}, "unknown model.position_resampling 'nearest'"),
    ],
    ids=str,
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(InputError, match=message):
        vit(**(SMALL | options))
