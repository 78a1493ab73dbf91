"""DINO: its terms against numpy, its teacher by closed form, its runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, use_one_device
from objective_runs import check_mesh, check_resume
from PIL import Image
from scipy.special import log_softmax, softmax

import vitjax
from vitjax import experiment, monitor, warm_start
from vitjax.checkpoints.store import read_contract
from vitjax.data.multicrop import MultiCrop, _weights, random_crops
from vitjax.errors import InputError
from vitjax.models.vit import vit
from vitjax.objectives import self_distillation as terms
from vitjax.objectives.dino import DINO
from vitjax.objectives.health import feature_rank
from vitjax.objectives.masking import draw_blobs
from vitjax.train import train

SIZES = {
    "image_size": 16, "channels": 3, "num_classes": 0, "width": 32, "depth": 2, "mlp_dim": 64,
    "num_heads": 2, "patch_size": 4, "cls_token": True, "pool": "cls", "mask_token": True,
    "scan": True,
}  # fmt: skip
HEAD = {"prototypes": 24, "hidden": 32, "bottleneck": 16, "num_layers": 3}
CROPS = {"global_size": 16, "local_size": 8, "num_local": 3}


def make(**changes):
    return DINO(vit(**SIZES), **{"total_steps": 10, "head": HEAD} | CROPS | changes)


def begin(objective):
    return jax.jit(objective.init)(jax.random.key(0), {})


def crops(batch=4, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "global_images": jax.random.normal(first, (batch, 2, 16, 16, 3)),
        "local_images": jax.random.normal(second, (batch, 3, 8, 8, 3)),
    }


def test_sinkhorn_rows_and_columns_sum_as_they_must():
    logits = jax.random.normal(jax.random.key(0), (12, 6))
    found = terms.sinkhorn(logits, 0.3, num_iterations=200)
    np.testing.assert_allclose(found.sum(1), np.ones(12), rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), np.full(6, 2.0), rtol=1e-4)


def test_sinkhorn_is_the_plain_one_and_leaves_rows_of_no_weight_out():
    logits = np.asarray(jax.random.normal(jax.random.key(1), (10, 6)), np.float64)
    q = np.exp(logits / 0.1).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 6
        q /= q.sum(0, keepdims=True) * 10
    plain = (q * 10).T
    np.testing.assert_allclose(terms.sinkhorn(jnp.asarray(logits, jnp.float32), 0.1), plain,
                               rtol=2e-4, atol=1e-7)  # fmt: skip
    more = jnp.concatenate([jnp.asarray(logits, jnp.float32), jnp.full((3, 6), 7.0)])
    weights = jnp.asarray([1.0] * 10 + [0.0] * 3)
    np.testing.assert_allclose(terms.sinkhorn(more, 0.1, weights)[:10], plain,
                               rtol=2e-4, atol=1e-7)  # fmt: skip
    assert jnp.isfinite(terms.sinkhorn(more, 0.1, jnp.zeros(13))).all()


def test_koleo_and_gram_are_the_plain_ones():
    x = np.asarray(jax.random.normal(jax.random.key(2), (7, 5)), np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + np.eye(7) * 9
    np.testing.assert_allclose(
        terms.koleo(jnp.asarray(x, jnp.float32)), -np.log(distances.min(1)).mean(), rtol=1e-4
    )
    a, b = (np.asarray(jax.random.normal(jax.random.key(i), (2, 4, 5))) for i in (3, 4))

    def gram(v):
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        return v @ v.transpose(0, 2, 1)

    plain = ((gram(a) - gram(b)) ** 2).mean()
    np.testing.assert_allclose(
        terms.gram_distance(jnp.asarray(a), jnp.asarray(b)), plain, rtol=1e-5
    )


def test_the_rank_of_known_features():
    spread = jnp.concatenate([jnp.eye(6), -jnp.eye(6)])
    np.testing.assert_allclose(feature_rank(spread), 6, rtol=1e-5)
    np.testing.assert_allclose(feature_rank(jnp.outer(jnp.arange(8.0), jnp.ones(5))), 1, rtol=1e-5)
    assert feature_rank(jnp.ones((8, 5))) == 0


def test_the_loss_is_the_plain_one():
    """Every term, from the models' outputs, in numpy loops over pairs of crops."""
    objective = make(masked_weight=0.0, koleo_weight=0.0, centring="centre")
    params, extra = begin(objective)
    teacher = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    extra |= {"teacher": teacher}
    extra["centres"] = {n: jnp.linspace(-0.2, 0.3, 24) for n in ("crop", "masked")}
    batch = crops()
    loss, (moved, _) = jax.jit(objective.loss)(params, extra, batch, jax.random.key(5))

    @jax.jit
    def project(params, flat):
        seen = objective.model.apply(params["model"], flat)["embedding"]
        return objective._heads["crop_head"].apply(params["crop_head"], seen)

    def scores(params, images):
        found = project(params, images.reshape(-1, *images.shape[2:]))
        return np.asarray(found, np.float64).reshape(*images.shape[:2], -1)

    theirs = scores(teacher, batch["global_images"])
    ours = np.concatenate(
        [scores(params, batch["global_images"]), scores(params, batch["local_images"])], axis=1
    )
    targets = softmax((theirs - np.linspace(-0.2, 0.3, 24)) / 0.07, axis=-1)
    logs = log_softmax(ours / 0.1, axis=-1)
    pairs = [
        -(targets[:, g] * logs[:, v]).sum(-1).mean() for g in range(2) for v in range(5) if v != g
    ]
    np.testing.assert_allclose(loss, np.mean(pairs), rtol=1e-4)
    plain = 0.9 * np.linspace(-0.2, 0.3, 24) + 0.1 * theirs.mean((0, 1))
    np.testing.assert_allclose(moved["centres"]["crop"], plain, rtol=1e-4, atol=1e-6)


def test_the_masked_loss_counts_masked_patches_alone():
    objective = make(crop_weight=0.0, koleo_weight=0.0, mask_probability=1.0)
    params, extra = begin(objective)
    batch, key = crops(), jax.random.key(9)
    blobs = draw_blobs(jax.random.split(key)[0], 8, (4, 4), (0.1, 0.5), 1.0)
    flat = batch["global_images"].reshape(8, 16, 16, 3)

    @jax.jit
    def project(params, flat, **masked):
        tokens = objective.model.apply(params["model"], flat, **masked)["tokens"][:, 1:]
        return objective._heads["masked_head"].apply(params["masked_head"], tokens)

    logs = log_softmax(np.asarray(project(params, flat, masked=blobs.masked)) / 0.1, axis=-1)
    masked = np.asarray(blobs.masked)
    logits = np.asarray(project(params, flat))[masked]
    goal = np.zeros((8, 16, 24))
    goal[masked] = np.asarray(terms.sinkhorn(jnp.asarray(logits), 0.07))
    each = -(goal * logs).sum(-1)
    plain = np.mean([each[i][masked[i]].mean() for i in range(8)])
    loss = jax.jit(objective.loss)(params, extra, batch, key)[0]
    np.testing.assert_allclose(loss, plain, rtol=1e-4)


def test_blobs_cover_as_much_as_asked():
    blobs = draw_blobs(jax.random.key(0), 200, (8, 8), (0.1, 0.5), 0.5)
    counts = np.asarray(blobs.masked.sum(1))
    assert 60 < (counts > 0).sum() < 140
    assert counts[counts > 0].min() >= 6 and counts.max() <= 32
    at = jnp.take_along_axis(blobs.masked, blobs.places, axis=1)
    assert (at == blobs.valid).all()


def test_the_teacher_gets_no_gradient_and_is_the_closed_form_of_its_average():
    objective = make(momentum=0.9)
    params, extra = begin(objective)

    def loss(teacher, params, extra, batch):
        return objective.loss(params, extra | {"teacher": teacher}, batch, jax.random.key(1))[0]

    gradient = jax.jit(jax.grad(loss))(extra["teacher"], params, extra, crops())
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))
    versions = [jax.tree.map(lambda x, i=i: x + i, params) for i in range(1, 5)]
    moving, move = extra, jax.jit(objective.after_update)
    for version in versions:
        moving = move(version, moving)
    momenta = [1 - 0.1 * (np.cos(np.pi * k / 10) + 1) / 2 for k in range(4)]
    expected, kept = 0.0, 1.0
    for m, i in zip(reversed(momenta), (4, 3, 2, 1), strict=True):
        expected, kept = expected + kept * (1 - m) * i, kept * m
    shift = moving["teacher"]["model"]["cls_token"] - params["model"]["cls_token"]
    np.testing.assert_allclose(shift, np.full(shift.shape, expected), rtol=1e-4)
    assert int(moving["updates"]) == 4


def test_the_teacher_is_evaluated():
    objective = make()
    params, extra = begin(objective)
    extra["teacher"] = jax.tree.map(lambda x: x + 1, extra["teacher"])
    assert objective.backbone(params, extra) is extra["teacher"]["model"]


def test_prototypes_are_frozen_at_first():
    objective = make(freeze_last_layer_steps=2)
    params, extra = begin(objective)

    gradients = jax.jit(jax.grad(lambda *given: objective.loss(*given, jax.random.key(1))[0]))

    def gradient(updates):
        return gradients(params, extra | {"updates": jnp.asarray(updates)}, crops())

    assert (gradient(1)["crop_head"]["prototypes"] == 0).all()
    assert (gradient(2)["crop_head"]["prototypes"] != 0).any()
    assert (gradient(1)["crop_head"]["dense1"]["kernel"] != 0).any()


def test_permuting_a_batch_permutes_nothing_else():
    objective = make(masked_weight=0.0)
    params, extra = begin(objective)
    batch, order = crops(), jnp.asarray([2, 0, 3, 1])
    other = {name: x[order] for name, x in batch.items()}
    loss = jax.jit(objective.loss)
    first, second = (loss(params, extra, b, None)[0] for b in (batch, other))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_gram_anchor_is_the_teacher_of_its_moment():
    objective = make(gram_weight=1.0, gram_every=2)
    params, extra = begin(objective)
    later = jax.tree.map(lambda x: x + 1, params)
    move = jax.jit(objective.after_update)
    once = move(later, extra)
    assert (once["gram"]["model"]["cls_token"] == params["model"]["cls_token"]).all()
    twice = move(later, once)
    assert (twice["gram"]["model"]["cls_token"] == twice["teacher"]["model"]["cls_token"]).all()
    metrics = jax.jit(objective.loss)(params, extra, crops(), jax.random.key(0))[1][1]
    assert float(metrics["gram"]) >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_size": 10}, "local_size=10 is not divisible"),
        ({"global_size": 18}, "global_size=18"),
        ({"mask_ratio": (0.0, 0.01)}, "mask_ratio"),
        ({"mask_ratio": (0.2, 1.0)}, "mask_ratio"),
        ({"centring": "sinkhron"}, "sinkhorn"),
        ({"head": {"prototype": 3}}, "prototypes"),
        ({"momentum": 1.5}, "momentum"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_a_model_without_a_mask_token_is_refused():
    with pytest.raises(InputError, match="mask_token"):
        DINO(vit(**SIZES | {"mask_token": False}), head=HEAD, **CROPS)


# Crops.


def test_a_crop_of_everything_is_the_image():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    same = random_crops(jax.random.key(1), x, 8, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_allclose(same, x, atol=1e-6)
    half = random_crops(jax.random.key(1), jnp.ones((2, 8, 8, 3)), 4, (0.3, 1.0))
    np.testing.assert_allclose(half, np.ones((2, 4, 4, 3)), rtol=1e-5)


@pytest.mark.parametrize(("start", "length", "size"), [(3.3, 20.5, 8), (0.0, 6.4, 16)])
def test_crops_are_resized_as_pillow_does(start, length, size):
    image = np.random.default_rng(0).random((32, 32), np.float32)
    box = (start, start, start + length, start + length)
    plain = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    weights = _weights(jnp.asarray([start]), jnp.asarray([length]), size, 32)[0]
    found = weights @ jnp.asarray(image) @ weights.T
    np.testing.assert_allclose(found, np.asarray(plain), atol=1e-5)


def test_every_image_has_a_crop_of_its_own():
    ramp = jnp.broadcast_to(jnp.arange(32.0)[None, :, None, None], (6, 32, 32, 1))
    found = random_crops(jax.random.key(2), ramp, 8, (0.2, 0.2), (1.0, 1.0))[:, :, 4, 0]
    side = np.sqrt(0.2) * 32
    np.testing.assert_allclose(found[:, -1] - found[:, 0], np.full(6, side * 7 / 8), rtol=0.05)
    assert np.ptp(np.asarray(found[:, 0])) > 2


def test_crops_have_operations_of_their_own():
    flip = {"target": "vitjax.data.augment:RandomFlip"}
    op = MultiCrop(8, 4, 2, operations=(flip,), second_operations=())
    batch = op(jax.random.key(0), {"images": jax.random.uniform(jax.random.key(1), (3, 8, 8, 3))})
    assert batch["global_images"].shape == (3, 2, 8, 8, 3)
    assert batch["local_images"].shape == (3, 2, 4, 4, 3)
    with pytest.raises(InputError, match="global_area"):
        MultiCrop(8, global_area=(0.5, 0.2))


# Runs.


def config_of(**changes):
    config = tiny_config(total_steps=4, checkpoint_every=2)
    config.unlock()
    config.model.update(num_classes=0, mask_token=True)
    sizes = {"global_size": 8, "local_size": 4, "num_local": 2}
    config.objective = {"target": "vitjax.objectives.dino:DINO", "head": HEAD, **sizes}
    config.augment = ({"target": "vitjax.data.multicrop:MultiCrop", **sizes},)
    config.evals = {}
    config.checkpoint.metric = None
    config.update(changes)
    return config.lock()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dino") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train(config_of(), workdir)
    return workdir


def test_a_mesh_changes_nothing(finished):
    check_mesh(config_of(), finished, rtol=1e-4)


def test_it_resumes_exactly_with_its_teacher(finished, tmp_path, monkeypatch):
    check_resume(config_of(), finished, tmp_path / "run", monkeypatch)


def test_its_checkpoint_is_the_teacher(finished, monkeypatch):
    use_one_device(monkeypatch)
    loaded = vitjax.load(finished).params
    contract = read_contract(finished / "checkpoints/4")
    assert contract["weights"] == ["extra", "teacher", "model"]
    config = config_of()
    config.init.checkpoint = str(finished)
    exp = experiment.build(config)
    state = warm_start.first_state(exp)
    for place in (state.extra["teacher"]["model"], state.params["model"]):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), place, loaded))


def test_the_teacher_lies_sharded_as_the_student():
    exp = experiment.build(config_of(mesh={"replica": 1, "fsdp": 4, "tensor": 2}))
    shardings = exp.state_shardings
    same = jax.tree.map(lambda a, b: a == b, shardings.params, shardings.extra["teacher"])
    assert jax.tree.all(same)
    assert any("tensor" in str(s.spec) for s in jax.tree.leaves(shardings.extra["teacher"]))


def test_crops_of_other_sizes_are_refused(monkeypatch):
    use_one_device(monkeypatch)
    crops = {"target": "vitjax.data.multicrop:MultiCrop", "global_size": 8, "local_size": 4}
    for changes, message in (
        ({"num_local": 3}, "wants 2 local_images of 4 x 4 pixels, MultiCrop gives 3"),
        ({"num_local": 2, "global_size": 6}, "wants 2 global_images of 8 x 8 pixels"),
        ({}, "needs local_images"),
    ):
        exp = experiment.build(config_of(augment=(crops | changes,)))
        with pytest.raises(InputError, match=message):
            jax.eval_shape(exp.train_step, exp.abstract_state, exp.abstract_batch)


@pytest.mark.parametrize("centring", ["sinkhorn", "centre"])
def test_a_step_may_be_taken_in_parts(centring, monkeypatch):
    use_one_device(monkeypatch)
    config = config_of()
    config.unlock()
    config.optimizer.accumulation_steps = 2
    config.model.depth = 1
    config.objective.centring = centring
    exp = experiment.build(config)
    batch = {
        "images": np.random.default_rng(0).integers(0, 255, (32, 8, 8, 1), np.uint8),
        "labels": np.zeros(32, np.int32),
    }
    state, metrics = jax.jit(exp.train_step)(exp.fresh_state(), batch)
    assert np.isfinite(metrics["loss"]) and int(state.extra["updates"]) == 1


def test_the_student_is_watched(finished):
    """Of the attention's logits, and of the layers, those in training."""
    config = config_of()
    config.monitor.update(attention_logits=True, layer_norms=True)
    exp = experiment.build(config, devices=jax.devices()[:1])
    state = exp.fresh_state()
    assert exp.objective.trained(state.params) is state.params["model"]
    batch = {"images": jnp.zeros((32, 8, 8, 1), jnp.uint8)}
    found = monitor.AttentionLogits(exp)(state, batch)
    assert set(found) == {"attention/max_logit", *(f"attention/max_logit/0{n}" for n in (0, 1))}
    assert any("model" in name for name in monitor.layer_names(state.params))


def test_without_crops_it_says_so(monkeypatch):
    use_one_device(monkeypatch)
    exp = experiment.build(config_of(augment=()))
    with pytest.raises(InputError, match="MultiCrop"):
        jax.eval_shape(exp.train_step, exp.abstract_state, exp.abstract_batch)
