"""Explanations: each method against an independent computation, the scores, the verb."""

import csv
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vitjax import cli
from vitjax import explain as explain_lib
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.explain import attention, explainer, features, perturbation, placement, sanity, scores
from vitjax.explain.explainer import METHODS, Explainer, explain
from vitjax.explain.grid import grid_of
from vitjax.inference import VisionModel
from vitjax.models.bit import bit
from vitjax.models.convnext import convnext
from vitjax.models.vit import vit

SMALL: dict[str, Any] = {
    "image_size": 16, "channels": 3, "num_classes": 4, "width": 16, "depth": 2, "mlp_dim": 24,
    "num_heads": 2, "patch_size": 4,
}  # fmt: skip
BIT: dict[str, Any] = {"blocks": (1, 1), "widths": (32, 64), "root_width": 16, "groups": 8}
CONVNEXT: dict[str, Any] = {"blocks": (1, 2), "widths": (8, 16), "layer_scale": 0.5}
SIDE, PATCH = 24, 4  # of the images with a planted square, which is one patch
COLOURS = ("red", "green", "blue")


def drawn(model, seed=0, scale=0.4):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape) * scale, model.abstract_params
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="intermediates")
def applied(model, params, images, intermediates=False, offsets=None):
    return model.apply(params, images, intermediates=intermediates, offsets=offsets)


sloped = jax.jit(attention.attention_gradients, static_argnums=0)


def noise(height=16, width=16, batch=2):
    return jax.random.normal(jax.random.key(5), (batch, height, width, 3))


def planted(count, seed, is_one=False):
    """Noise in which a patch is redder, one greener, one bluer, or not.

    With `is_one` each image has just one of them.

    Returns:
      Images, which of the colours are there [B, 3], and where each would be [B, 3, Y, X].
    """
    generator = np.random.default_rng(seed)
    images = generator.integers(90, 166, (count, SIDE, SIDE, 3)).astype(np.float32)
    is_there = generator.random((count, 3)) < 0.5
    if is_one:
        is_there = np.eye(3, dtype=bool)[generator.integers(0, 3, count)]
    masks = np.zeros((count, 3, SIDE, SIDE), bool)
    for image, mask, labels in zip(images, masks, is_there, strict=True):
        for c, place in enumerate(generator.permutation(36)[:3]):
            y, x = (PATCH * int(v) for v in divmod(place, 6))
            mask[c, y : y + PATCH, x : x + PATCH] = True
            image[mask[c], c] += labels[c] * generator.uniform(40, 90)
    return np.clip(images, 0, 255).astype(np.uint8), is_there, masks


@functools.cache
def trained():
    """A ViT that has learned to tell which of the colours are there, in a few seconds."""
    from vitjax.interop.contents import full_model

    block: dict[str, Any] = {
        "width": 32,
        "depth": 1,
        "mlp_dim": 64,
        "num_heads": 2,
        "patch_size": PATCH,
    }
    block |= {"num_classes": 3, "pool": "cls", "num_registers": 1}
    model = vit(image_size=SIDE, channels=3, **block)
    contract = Preprocess(SIDE)
    images, labels, _ = planted(1024, 0)
    ready = (images / np.float32(255) - 0.5) / 0.5
    optimizer = optax.adam(3e-3)
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def step(params, slots, x, y):
        def loss(p):
            logits = model.apply(p, x)["logits"]
            return optax.sigmoid_binary_cross_entropy(logits, y).mean()

        updates, slots = optimizer.update(jax.grad(loss)(params), slots)
        return optax.apply_updates(params, updates), slots

    slots = optimizer.init(params)
    for i in range(100):
        rows = np.arange(i * 64, i * 64 + 64) % 1024
        params, slots = step(params, slots, ready[rows], labels[rows].astype(np.float32))
    saved = {
        "model": full_model(block),
        "preprocess": dataclasses.asdict(contract),
        "class_names": COLOURS,
        "loss_type": "sigmoid",
        "precision": {},
        "description": dict(model.description),
    }
    return VisionModel(model, params, saved)


def convolutional(name, options):
    contract = Preprocess(32)
    block = {"target": f"vitjax.models.{name}:{name}", "num_classes": 4, **options}
    make: Any = {"bit": bit, "convnext": convnext}[name]
    model = make(image_size=32, channels=3, num_classes=4, **options)
    saved = {
        "model": block, "preprocess": dataclasses.asdict(contract), "class_names": None,
        "loss_type": "softmax", "precision": {}, "description": dict(model.description),
    }  # fmt: skip
    return VisionModel(model, drawn(model), saved)


# Rollout.


def test_rollout_is_a_product_whose_rows_sum_to_one():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 2, 4, 7, 7)) * 2, -1)
    joint = np.asarray(attention.rollout_matrix(weights))
    np.testing.assert_allclose(joint.sum(-1), 1, atol=1e-6)
    for image in range(2):
        expected = np.eye(7)
        for layer in np.asarray(weights, np.float64)[:, image]:
            expected = (layer.mean(0) / 2 + np.eye(7) / 2) @ expected
        np.testing.assert_allclose(joint[image], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"pool": "cls", "num_registers": 2}, lambda joint, prefix: joint[0]),
        ({"pool": "gap"}, lambda joint, prefix: joint[prefix:].mean(0)),
        ({"pool": "gap", "cls_token": True}, lambda joint, prefix: joint[prefix:].mean(0)),
        (
            {"pool": "cls", "distill_token": True, "distill_head": True},
            lambda joint, prefix: joint[:2].mean(0),
        ),
    ],
    ids=["cls", "gap", "gap beside cls", "distilled"],
)
def test_rollout_reads_what_pooling_reads_and_leaves_the_prefix_out(options, row):
    """On images that are no squares, of which 3 x 5 patches are cut."""
    model = vit(**SMALL, **options)
    params, images = drawn(model), noise(12, 20)
    prefix = dict(model.description)["prefix_tokens"]
    maps = attention.rollout(model, params, images, jnp.zeros(2, jnp.int32))
    assert maps.shape == (2, 3, 5) == (2, *grid_of(model, 12, 20))
    weights = applied(model, params, images, intermediates=True)["blocks"]["attention_weights"]
    for image, joint in zip(maps, attention.rollout_matrix(weights), strict=True):
        np.testing.assert_allclose(image.ravel(), row(joint, prefix)[prefix:], atol=1e-6)


def test_rollout_of_attention_pooling_begins_with_the_probe():
    model = vit(**SMALL, pool="map")
    params, images = drawn(model), noise(12, 20)
    out = applied(model, params, images, intermediates=True)
    pool = params["pool"]
    query = jnp.einsum("d,dhk->hk", pool["probe"][0], pool["query"]["kernel"])
    query = query + pool["query"]["bias"]
    key = jnp.einsum("bnd,dhk->bnhk", out["tokens"], pool["key_value"]["kernel"][:, 0])
    key = key + pool["key_value"]["bias"][0][None, None]
    weights = jax.nn.softmax(jnp.einsum("hk,bnhk->bhn", query, key) / 8**0.5, -1).mean(1)
    joint = attention.rollout_matrix(out["blocks"]["attention_weights"])
    expected = jnp.einsum("bn,bnm->bm", weights, joint).reshape(2, 3, 5)
    maps = attention.rollout(model, params, images, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(maps, expected, atol=1e-5)


# Relevance.


def plain_vit(params, image, offsets):
    """The model of SMALL with pool="cls" for one image, written out; attention gets offsets."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        scale = p["scale"].reshape(1, -1) / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * scale + p["bias"].reshape(1, -1)

    rows, cols = image.shape[0] // 4, image.shape[1] // 4
    patches = jnp.stack(
        [image[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].ravel() for r in range(rows)
         for c in range(cols)]
    )  # fmt: skip
    x = patches @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"][None]
    x = jnp.concatenate([params["cls_token"], x]) + params["positions"]
    kept = []
    for i in range(2):
        p = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        y = norm(x, p["norm1"])
        mixed = []
        for h in range(2):
            q, k, v = (
                y @ p["attention"]["qkv"]["kernel"][:, j, h]
                + p["attention"]["qkv"]["bias"][j, h][None]
                for j in range(3)
            )
            weights = jax.nn.softmax(q @ k.T / 8**0.5) + offsets[i][h]
            kept.append(weights)
            mixed.append(weights @ v @ p["attention"]["out"]["kernel"][h])
        x = x + sum(mixed) + p["attention"]["out"]["bias"][None]
        y = norm(x, p["norm2"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"][None]
        x = x + jax.nn.gelu(y) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"][None]
    logits = norm(x, params["norm"])[0] @ params["head"]["kernel"] + params["head"]["bias"]
    return logits, kept


@pytest.fixture(scope="module")
def small():
    model = vit(**SMALL, pool="cls")
    return model, drawn(model)


def test_relevance_equals_a_slow_implementation(small):
    model, params = small
    images, targets = noise(), [1, 3]
    maps = attention.relevance(model, params, images, jnp.array(targets))
    for image, target, ours in zip(images, targets, maps, strict=True):
        zeros = [[jnp.zeros((17, 17))] * 2] * 2

        def logit(offsets, image=image, target=target):
            logits, kept = plain_vit(params, image, offsets)
            return logits[target], kept

        gradients, kept = jax.jit(jax.grad(logit, has_aux=True))(zeros)
        joint = np.eye(17)
        for i in range(2):
            weighed = [np.maximum(np.asarray(kept[2 * i + h]) * gradients[i][h], 0)
                       for h in range(2)]  # fmt: skip
            joint = joint + sum(weighed) / 2 @ joint
        np.testing.assert_allclose(ours.ravel(), joint[0, 1:], rtol=1e-3, atol=1e-5)


def test_the_gradient_of_attention_is_a_difference_of_logits(small):
    model, params = small
    images, targets = noise(batch=1), jnp.array([2])
    _, gradients = sloped(model, params, images, targets)
    shape = gradients["blocks"].shape
    assert shape == (2, 1, 2, 17, 17)
    for place in ((0, 0, 1, 3, 5), (1, 0, 0, 0, 7)):
        step = jnp.zeros(shape).at[place].set(1e-2)

        def logit(offset):
            offsets = {"blocks": {"attention_weights": offset}}
            out = applied(model, params, images, offsets=offsets)
            return out["logits"][0, 2]

        difference = (logit(step) - logit(-step)) / 2e-2
        assert gradients["blocks"][place] == pytest.approx(float(difference), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_offsets_of_zero_change_nothing_and_reach_the_logits(pool):
    model = vit(**SMALL, pool=pool)
    params = drawn(model)
    plain = applied(model, params, noise(), intermediates=True)["logits"]
    np.testing.assert_allclose(plain, applied(model, params, noise())["logits"], rtol=1e-4)
    weights, gradients = sloped(model, params, noise(), jnp.zeros(2, jnp.int32))
    assert set(weights) == ({"blocks", "pool"} if pool == "map" else {"blocks"})
    zeros = {name: {"attention_weights": jnp.zeros_like(x)} for name, x in weights.items()}
    np.testing.assert_array_equal(applied(model, params, noise(), offsets=zeros)["logits"], plain)
    assert all(np.asarray(x).any() for x in gradients.values())


@pytest.mark.parametrize("pool", ["gap", "map"])
def test_only_rollout_is_the_same_for_every_class(pool):
    model = vit(**SMALL, pool=pool)
    params = drawn(model)
    for name, method in METHODS.items():
        first, second = (
            method.run(model, params, noise(), jnp.full(2, c, jnp.int32)) for c in (0, 1)
        )
        assert first.shape == (2, 4, 4)
        assert np.allclose(first, second, atol=1e-6) == (name == "rollout"), name
        assert method.is_class_specific == (name != "rollout")
        assert np.ptp(np.asarray(first)) > 0, f"{name}: a constant map"


# Grad-CAM.


def test_class_activation_by_hand():
    """Weights (1, 0) and (1, 1): the second has mean gradients of one half each."""
    x = jnp.array([[[2.0, 5.0], [-3.0, 7.0]], [[2.0, 4.0], [-8.0, 2.0]]])
    slopes = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(features.class_activation(x, slopes), [[2, 0], [3, 0]])


@pytest.mark.parametrize(("name", "options"), [("bit", BIT), ("convnext", CONVNEXT)])
def test_gradcam_of_a_convolutional_model(name, options):
    """On a map that is no square; the BiT's is its head's kernel times the last features."""
    vision = convolutional(name, options)
    model, images, targets = vision.model, noise(32, 48), jnp.array([1, 2])
    maps = features.gradcam(model, vision.params, images, targets)
    assert maps.shape == (2, 4, 6) == (2, *grid_of(model, 32, 48))
    if name == "bit":
        tokens = applied(model, vision.params, images)["tokens"]
        kernel = vision.params["head"]["kernel"][:, np.array([1, 2])].T
        expected = jnp.maximum(jnp.einsum("bnd,bd->bn", tokens, kernel), 0) / 24
        np.testing.assert_allclose(maps.reshape(2, -1), expected, rtol=1e-3, atol=1e-4)
    others = features.gradcam(model, vision.params, images, targets + 1)
    assert not np.allclose(maps, others)
    occluded = perturbation.occlusion(model, vision.params, images, targets)
    assert occluded.shape == maps.shape


def test_methods_of_attention_are_refused_without_attention():
    vision = convolutional("bit", BIT)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for name in ("rollout", "relevance"):
        with pytest.raises(InputError, match=r"needs attention.*that work: gradcam, occlusion$"):
            explain(vision, images, method=name)
    assert explain(vision, images, method="gradcam").maps.shape == (1, 4, 4)


# Occlusion, deletion, insertion.


@pytest.mark.parametrize("window", [1, 2, 9])
def test_occlusion_hides_one_window_after_another(small, window):
    model, params = small
    images, targets = noise(), np.array([0, 3])
    maps = perturbation.occlusion(model, params, images, jnp.asarray(targets), window=window)

    def run(x):
        return np.asarray(applied(model, params, x)["logits"])[[0, 1], targets]

    whole = run(images)
    size = min(window, 4)
    sums, counts = np.zeros((2, 4, 4)), np.zeros((4, 4))
    for top in range(4 - size + 1):
        for left in range(4 - size + 1):
            hidden = np.array(images)
            hidden[:, 4 * top : 4 * (top + size), 4 * left : 4 * (left + size)] = 0
            drop = whole - run(hidden)
            sums[:, top : top + size, left : left + size] += drop[:, None, None]
            counts[top : top + size, left : left + size] += 1
    np.testing.assert_allclose(maps, sums / counts[None], atol=1e-4)


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_deletion_ends_in_grey_and_insertion_in_the_image(small, is_multi_label):
    model, params = small
    images, targets = noise(), jnp.array([0, 3])
    maps = jax.random.normal(jax.random.key(9), (2, 4, 4))
    deleted, inserted = perturbation.deletion_insertion(
        model, params, images, targets, maps, is_multi_label=is_multi_label, steps=4
    )
    squash = jax.nn.sigmoid if is_multi_label else jax.nn.softmax

    def probability(x):
        return np.asarray(squash(applied(model, params, x)["logits"]))[[0, 1], [0, 3]]

    assert deleted.shape == inserted.shape == (2, 5)
    np.testing.assert_allclose(deleted[:, 0], probability(images), atol=1e-5)
    np.testing.assert_allclose(inserted[:, -1], probability(images), atol=1e-5)
    np.testing.assert_allclose(deleted[:, -1], probability(images * 0), atol=1e-5)
    top = np.argsort(-np.asarray(maps).reshape(2, -1), axis=1)[:, :4]
    partly = np.array(images)
    for image, places in zip(partly, top, strict=True):
        for place in places:
            y, x = divmod(int(place), 4)
            image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 0
    np.testing.assert_allclose(deleted[:, 1], probability(partly), atol=1e-5)


def test_an_area_is_that_of_trapezia():
    np.testing.assert_allclose(perturbation.area(np.array([[1.0, 0.0, 0.0], [1, 1, 1]])), [0.25, 1])


# What was planted is found.


def scored(heat, mask):
    found = scores.score_mask(placement.spread(heat, SIDE, SIDE), mask)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("method", "options", "least"),
    [("relevance", {}, 0.9), ("gradcam", {}, 0.5), ("occlusion", {"window": 1}, 0.95)],
)
def test_each_class_s_map_finds_the_square_of_its_own_colour(method, options, least):
    vision = trained()
    images, is_there, masks = planted(48, 1)
    found = Explainer(vision, method, **options)
    probabilities = found.probabilities(images)
    assert ((probabilities > 0.5) == is_there).mean() > 0.9
    for c in range(3):
        rows = is_there[:, c]
        maps = found.maps(images[rows], np.full(rows.sum(), c))
        given = [scored(m, k) for m, k in zip(maps, masks[rows, c], strict=True)]
        assert np.mean([s.is_hit for s in given]) >= least, "by chance 1 in 36"
        assert np.mean([s.mass for s in given]) > 4 / 36, "by chance 1 in 36"
        good, bad = (found.faithfulness(images[rows], np.full(rows.sum(), c), m)
                     for m in (maps, -maps))  # fmt: skip
        assert good[0].mean() < bad[0].mean() - 0.2, "without the square the class is gone"


def test_rollout_finds_what_is_attended_to_not_what_a_class_rests_on():
    vision = trained()
    images, is_there, masks = planted(48, 1)
    maps = Explainer(vision, "rollout").maps(images, np.zeros(48, np.int64))
    hits = [
        np.mean([scored(m, k[c]).is_hit for m, k in zip(maps[rows], masks[rows], strict=True)])
        for c, rows in enumerate(is_there.T)
    ]
    assert min(hits) < 0.5, "one map cannot point at three squares"


def test_a_named_class_and_one_for_each_image():
    vision, (images, _, _) = trained(), planted(5, 2)
    named = explain(vision, images, target="blue")
    assert named.classes.tolist() == [2] * 5 and named.is_class_specific
    each = explain(vision, list(images), target=["blue", 0, "1", 2, "green"], batch_size=2)
    assert each.classes.tolist() == [2, 0, 1, 2, 1]
    np.testing.assert_allclose(each.maps[[0, 3]], named.maps[[0, 3]], rtol=1e-4, atol=1e-6)
    expected = jax.nn.sigmoid(vision.logits(images))[np.arange(5), each.classes]
    np.testing.assert_allclose(each.probabilities, expected, atol=1e-5)


def test_the_computation_is_float32_whatever_the_checkpoint_is(native):
    vision = native(pool="cls")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vision.params)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    contract = vision.contract | {"precision": {"params": "bfloat16", "compute": "bfloat16"}}
    images = np.asarray(jax.random.randint(jax.random.key(0), (2, 16, 16, 3), 0, 256), np.uint8)
    a, b = (
        explain(VisionModel(vision.model, p, c), images, method="relevance")
        for p, c in ((low, contract), (exact, vision.contract))
    )
    assert a.maps.dtype == np.float32
    np.testing.assert_array_equal(a.maps, b.maps)


# Sanity.


def test_the_cascade_goes_from_the_head_to_the_embedding():
    model = vit(**SMALL, pool="map")
    params = drawn(model)
    steps = list(sanity.cascade(params))
    assert [name for name, _ in steps] == ["head", "block 2", "block 1", "embedding"]
    assert sanity.num_stages(params) == 4

    def changed(a, b):
        return {jax.tree_util.keystr(p, simple=True, separator="/")
                for p, same in jax.tree.leaves_with_path(jax.tree.map(np.array_equal, a, b))
                if not same}  # fmt: skip

    head = changed(params, steps[0][1])
    assert {name.split("/")[0] for name in head} == {"head", "norm", "pool"}
    block = steps[1][1]["blocks"]["mlp"]["up"]["kernel"]
    before = params["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(block[0], before[0])
    assert not np.allclose(block[1], before[1])
    assert float(block[1].std()) == pytest.approx(float(before[1].std()), rel=0.2)
    assert len(changed(params, steps[-1][1])) == len(jax.tree.leaves(params))
    conv = [name for name, _ in sanity.cascade(convolutional("convnext", CONVNEXT).params)]
    assert conv == [
        "head", "stage 2 unit 2", "stage 2 unit 1", "stage 2 downsampling", "stage 1 unit 1",
        "stem",
    ]  # fmt: skip


def test_randomised_weights_change_the_ranking():
    vision, (images, _, _) = trained(), planted(24, 3)
    for method in ("rollout", "relevance", "gradcam"):
        chosen = Explainer(vision, method)
        targets = chosen.probabilities(images).argmax(1)
        maps = chosen.maps(images, targets)
        stages = list(sanity.check(chosen, images, targets, maps))
        assert [s.name for s in stages] == ["head", "block 1", "embedding"]
        assert stages[-1].mean is not None and stages[-1].mean < 0.4, method
        assert sanity.verdict(method, stages) is None
        head = stages[0].mean
        assert head is not None and (head > 0.999) == (method == "rollout")


def test_a_map_that_ignores_the_model_is_named(monkeypatch):
    def edges(model, params, images, targets):
        return jnp.abs(images).mean(-1).reshape(-1, 6, 4, 6, 4).mean((2, 4))

    monkeypatch.setitem(METHODS, "edges", explainer.Method(edges, "edges"))
    vision, (images, _, _) = trained(), planted(4, 3)
    chosen = Explainer(vision, "edges")
    targets = np.zeros(4, np.int64)
    stages = list(sanity.check(chosen, images, targets, chosen.maps(images, targets)))
    assert "'edges' does not depend on what the model has learned" in str(
        sanity.verdict("edges", stages)
    )


def test_rank_correlation_has_ties_and_no_value_for_constant_maps():
    a = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert sanity.rank_correlation(a, a**3) == pytest.approx(1)
    assert sanity.rank_correlation(a, -a) == pytest.approx(-1)
    assert sanity.rank_correlation(a, np.array([[0.0, 0.0], [1.0, 1.0]])) == pytest.approx(
        0.8944, abs=1e-3
    )
    assert np.isnan(sanity.rank_correlation(a, np.zeros((2, 2))))


# Masks and places.


def test_scores_of_a_mask_by_hand():
    heat = np.array([[5.0, 4.0, np.nan], [-1.0, 1.0, np.nan]])
    mask = np.array([[True, False, True], [True, False, False]])
    given = scores.score_mask(heat, mask)
    assert given == scores.MaskScores(is_hit=True, iou=1 / 3, mass=0.5, area=0.5)
    assert scores.score_mask(heat, np.array([[False, False, True]] * 2)) is None
    low = scores.score_mask(np.array([[0.0, -1.0]]), np.array([[False, True]]))
    assert low is not None and not low.is_hit and np.isnan(low.mass) and low.iou == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"crop_fraction": 0.75}, {"resize": "squash"}, {"resize": "pad"}],
    ids=str,
)
def test_a_map_lies_where_the_model_saw_it(options):
    """A square of the original, through the contract's resize and back through `spread`."""
    contract = Preprocess(32, 1, **options)
    image = np.zeros((60, 100, 1), np.uint8)
    image[24:36, 48:60] = 255
    seen = contract.fit(image)[..., 0].reshape(16, 2, 16, 2).mean((1, 3))
    region = placement.seen_region(contract, 60, 100)
    back = placement.spread(seen, 60, 100, region)
    y, x = np.unravel_index(np.nanargmax(back), back.shape)
    assert 24 <= y < 36 and 48 <= x < 60
    bright = back > 128
    assert (bright & (image[..., 0] > 0)).sum() / (bright | (image[..., 0] > 0)).sum() > 0.6
    is_cropped = options.get("resize") is None
    assert np.isnan(back[30, 2]) == is_cropped and not np.isnan(back[30, 50])


def test_masks_are_what_is_not_zero(tmp_path):
    grey = np.zeros((4, 6), np.uint8)
    grey[1, 2] = 1
    colour = np.zeros((4, 6, 4), np.uint8)
    colour[..., 3] = 255
    colour[1, 2, 1] = 9
    for name, values in (("a.png", grey), ("b.tif", colour), ("c.png", grey.astype(np.uint16))):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(scores.read_mask(tmp_path / name, 4, 6), grey > 0)
    with pytest.raises(InputError, match="has 4 x 6 pixels, its image 6 x 4"):
        scores.read_mask(tmp_path / "a.png", 6, 4)
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read mask"):
        scores.read_mask(tmp_path / "d.png", 4, 6)


def test_an_overlay_shows_the_map_on_the_part_that_was_seen():
    image = np.full((40, 80, 3), 128, np.uint8)
    heat = np.array([[0.0, 0.0], [0.0, 1.0]])
    shown = explain_lib.blend(image, heat, (0.0, 20.0, 40.0, 60.0))
    assert shown.shape == (40, 80, 3)
    assert (shown[:, :20] == 128).all() and (shown[:, 60:] == 128).all()
    assert shown[36, 56, 0] > shown[4, 24, 0] + 60, "yellow above blue"
    large = explain_lib.blend(np.zeros((1024, 600, 1), np.uint8), heat)
    assert large.shape == (512, 300, 3)
    explain_lib.draw_overlay(image, heat * 0, title="a $constant map\nin two lines")


# The verb.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    vision = trained()
    vision.save(folder / "multi")
    VisionModel(vision.model, vision.params, vision.contract | {"loss_type": "softmax"}).save(
        folder / "single"
    )
    images, is_there, masks = planted(5, 4, is_one=True)
    masks = masks[is_there]
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "masks" / "deep").mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        name = f"deep/{i}" if i else "0"
        wide = np.pad(image, ((0, 0), (8, 8), (0, 0)))  # a centre crop takes this away again
        Image.fromarray(wide).save(folder / "images" / f"{name}.png")
        Image.fromarray(np.pad(mask, ((0, 0), (8, 8)))).save(folder / "masks" / f"{name}.tif")
    return folder


def call(*argv):
    try:
        return cli.main(["explain", *map(str, argv)])
    except SystemExit as stopped:
        return stopped.code


def test_the_verb_writes_pictures_maps_and_scores(saved, tmp_path, capsys):
    (saved / "images" / "broken.png").write_bytes(b"broken")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(saved / "masks" / "broken.png")
    out = tmp_path / "out"
    try:
        assert call(f"--checkpoint={saved / 'single'}", f"--images={saved / 'images'}",
                    "--method=relevance", f"--out={out}", f"--masks={saved / 'masks'}",
                    "--batch_size=2", "--sanity") == 0  # fmt: skip
    finally:
        (saved / "images" / "broken.png").unlink()
    assert "left out" in capsys.readouterr().err
    rows = list(csv.DictReader((out / "explain.csv").open()))
    assert len(rows) == 5
    for row in rows:
        assert row["class"] in COLOURS and 0.5 < float(row["probability"]) <= 1
        assert row["method"] == "relevance" and row["class_specific"] == "yes"
        assert 0 <= float(row["deletion_auc"]) <= float(row["insertion_auc"]) <= 1
        assert float(row["mask_area"]) == pytest.approx(1 / 36, abs=1e-4)
        heat = np.load(out / row["map"])
        assert heat.shape == (6, 6) and heat.dtype == np.float32
        with Image.open(out / row["overlay"]) as picture:
            picture.load()
            assert picture.width > 500
    assert np.mean([int(row["pointing_hit"]) for row in rows]) >= 0.8
    for name in ("overview.png", "sanity.png"):
        with Image.open(out / name) as picture:
            picture.load()
    written = json.loads((out / "sanity.json").read_text())
    assert written["stages"][0]["randomised_down_to"] == "head"
    assert written["images"] == 5 and written["warning"] is None


def test_rollout_says_that_it_is_not_class_specific(saved, tmp_path, monkeypatch):
    from vitjax.explain import verb

    titles = []
    monkeypatch.setattr(
        verb, "draw_overlay", lambda *a, title, **k: titles.append(title) or b"picture"
    )
    out = tmp_path / "out"
    assert call(f"--checkpoint={saved / 'single'}", f"--images={saved / 'images' / '0.png'}",
                "--method=rollout", f"--out={out}") == 0  # fmt: skip
    (row,) = csv.DictReader((out / "explain.csv").open())
    assert row["class_specific"] == "no" and row["iou"] == ""
    assert "not class-specific" in titles[0]


def test_of_several_labels_each_gets_a_map(saved, tmp_path, monkeypatch):
    def two_labels(self, images):
        return np.tile([0.9, 0.2, 0.7], (len(images), 1))

    monkeypatch.setattr(Explainer, "probabilities", two_labels)
    argv = (f"--images={saved / 'images' / '0.png'}", "--method=gradcam")
    for name, classes in (("multi", ["red", "blue"]), ("single", ["red"])):
        out = tmp_path / name
        assert call(f"--checkpoint={saved / name}", *argv, f"--out={out}") == 0
        rows = list(csv.DictReader((out / "explain.csv").open()))
        assert [row["class"] for row in rows] == classes
        assert len({row["map"] for row in rows}) == len(rows)
    out = tmp_path / "asked"
    assert call(f"--checkpoint={saved / 'multi'}", *argv, f"--out={out}", "--class=1") == 0
    assert [r["class"] for r in csv.DictReader((out / "explain.csv").open())] == ["green"]


WRONG = [
    (["--method=relevence"], "unknown method 'relevence'; did you mean 'relevance'"),
    (["--class=gren"], "the head has no class 'gren'; did you mean 'green'? it has 3"),
    (["--class=3"], "or by index 0 to 2"),
    (["--checkpoint={0}/headless"], "has no head"),
    (["--masks={0}/few"], "lacks a mask for 4 of 5 images, the first deep/1.png"),
    (["--masks={0}/none"], "is no folder"),
    (["--masks={0}/small"], "mask {0}/small/0.png has 3 x 3 pixels, its image 24 x 40"),
    (["--images={0}/empty"], "holds no images"),
    (["--images={0}/x.npz"], "from Python"),
    (["--out={0}/images"], "must be a new or an empty folder"),
    (["--out={0}/none/x"], "does not exist"),
    (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
    (["--window=2"], "for --method=occlusion only"),
    (["--method=rollout", "--checkpoint={0}/conv"], "methods that work: gradcam, occlusion"),
    (["--config.x=1"], "takes no --config options"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_exits_with_2_and_writes_nothing(saved, native, tmp_path, capfd, argv, words):
    (saved / "empty").mkdir(exist_ok=True)
    if not (saved / "few").is_dir():
        native(num_classes=0).save(saved / "headless")
        convolutional("bit", BIT).save(saved / "conv")
        for name, side in (("few", 24), ("small", 3)):
            for i in range(5 if name == "small" else 1):
                path = saved / name / (f"deep/{i}.png" if i else "0.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.zeros((side, 40 if side == 24 else 3), np.uint8)).save(path)
    options = {
        "checkpoint": saved / "single", "images": saved / "images", "method": "relevance",
        "out": tmp_path / "out",
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    before = sorted(saved.rglob("*"))
    capfd.readouterr()
    assert call(*given, *(a.format(saved) for a in argv)) == 2
    err = capfd.readouterr().err
    assert words.format(saved) in err and "Traceback" not in err
    assert err.count("vitjax:") == 1
    assert not list(tmp_path.iterdir()) and sorted(saved.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "attention"}, "unknown method 'attention'"),
        ({"target": "pink"}, "no class 'pink'"),
        ({"target": [0]}, "1 targets were given for 2 images"),
        ({"images": np.zeros((2, 24, 24, 3), np.float32)}, "uint8"),
        ({"images": np.zeros((0, 24, 24, 3), np.uint8)}, "one or more"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
    ids=["method", "class", "targets", "floats", "no images", "batch size"],
)
def test_wrong_arguments_are_refused(change, words):
    arguments = {"images": np.zeros((2, 24, 24, 3), np.uint8)} | change
    with pytest.raises(InputError, match=words):
        explain(trained(), **arguments)


def test_a_config_that_only_trains_on_accelerators_can_be_explained(native):
    vision = native(pool="cls")
    config = ConfigDict(vision.config).to_dict() | {"remat": "offload"}
    other = VisionModel(vision.model, vision.params, vision.contract | {"model": config})
    images = np.zeros((1, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(explain(other, images).maps, explain(vision, images).maps)
