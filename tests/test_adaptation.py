"""What fine-tuning needs of model, optimizer, objective and loop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import use_one_device
from scipy import special

import vitjax
from vitjax import experiment
from vitjax import train as train_lib
from vitjax.checkpoints import steps, store
from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.early_stop import EarlyStop
from vitjax.errors import InputError
from vitjax.models import lora, shapes
from vitjax.models.vit import vit
from vitjax.objectives.label_sets import LabelSets
from vitjax.optim import make_optimizer
from vitjax.schedules import bit_hyper
from vitjax.telemetry import read_metrics

SIZES = {"width": 16, "depth": 3, "mlp_dim": 32, "num_heads": 2, "patch_size": 4}


def make(num_classes=3, **options):
    return vit(image_size=8, channels=1, num_classes=num_classes, **(SIZES | options))


def drawn(model, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 200))
    return jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape), model.abstract_params
    )


IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 1))


@pytest.mark.parametrize("mlp", ["dense", "gated"])
@pytest.mark.parametrize("scan", [True, False])
def test_low_rank_updates_start_at_nothing_and_fold_into_the_kernels(mlp, scan):
    plain = make(mlp=mlp, scan=scan)
    model = make(
        mlp=mlp, scan=scan, lora_rank=2, lora_alpha=3.0, lora_targets=("qkv", "out", "mlp")
    )
    geometry = dict(model.arguments)["geometry"]
    assert sum(shapes.count_params(geometry).values()) == model.num_params > plain.num_params
    fresh = model.init(jax.random.key(0))
    block = {"lora_rank": 2, "lora_alpha": 3.0}
    found, folded = lora.merged(block, fresh)
    assert found["lora_rank"] == 0
    assert jax.tree.structure(folded) == jax.tree.structure(plain.abstract_params)
    kernel = fresh["blocks"]["attention"]["qkv"]["kernel"]
    assert (folded["blocks"]["attention"]["qkv"]["kernel"] == kernel).all()
    assert (model.apply(fresh, IMAGES)["tokens"] == plain.apply(folded, IMAGES)["tokens"]).all()
    params = drawn(model)
    _, folded = lora.merged(block, params)
    a, b = model.apply(params, IMAGES)["logits"], plain.apply(folded, IMAGES)["logits"]
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    without = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if "lora_b" in str(path) else x, params
    )
    assert np.abs(model.apply(without, IMAGES)["logits"] - a).max() > 1e-2


@pytest.mark.parametrize("scan", [True, False])
def test_frozen_blocks_keep_every_bit_and_have_no_slots(scan):
    model = make(frozen_blocks=2, cls_token=True, num_registers=1, scan=scan)
    params = drawn(model)
    params["blocks"]["norm1"]["bias"] = params["blocks"]["norm1"]["bias"].at[0].set(-0.0)
    optimizer = make_optimizer(
        params, algorithm=optax.scale_by_adam(), schedule=lambda count: jnp.ones(()),
        peak_lr=0.1, weight_decay=0.1, layer_decay=0.5, frozen_blocks=2,
    )  # fmt: skip
    state = optimizer.init(params)
    slots = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
    trained = sum(x.size // 3 for x in jax.tree.leaves(params["blocks"]))
    trained += sum(x.size for name in ("norm", "head") for x in jax.tree.leaves(params[name]))
    assert sum(x.size for x in slots) == 2 * trained

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: (model.apply(p, IMAGES)["logits"] ** 2).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new = params
    for _ in range(3):
        new, state = step(new, state)
    for path, (a, b) in jax.tree.leaves_with_path(
        jax.tree.map(lambda a, b: (np.asarray(a), np.asarray(b)), params, new),
        is_leaf=lambda x: isinstance(x, tuple),
    ):
        name = jax.tree_util.keystr(path)
        if "blocks" in name:
            assert a[:2].tobytes() == b[:2].tobytes(), name
            assert "qkv']['bias" in name or (a[2] != b[2]).any(), name
        else:
            is_trained = "norm" in name or "head" in name
            assert (a.tobytes() == b.tobytes()) != is_trained, name


def test_no_gradient_passes_frozen_blocks_and_the_outputs_are_the_same():
    model, whole = make(frozen_blocks=1), make()
    params = drawn(model)
    assert (model.apply(params, IMAGES)["logits"] == whole.apply(params, IMAGES)["logits"]).all()
    a, b = (
        jax.grad(lambda p, m=m: (m.apply(p, IMAGES)["logits"] ** 2).sum())(params)
        for m in (model, whole)
    )
    assert not np.asarray(a["patch_embed"]["kernel"]).any()
    assert not np.asarray(a["blocks"]["mlp"]["up"]["kernel"][0]).any()
    for part in ("attention", "mlp"):
        for x, y in zip(*(jax.tree.leaves(g["blocks"][part]) for g in (a, b)), strict=True):
            np.testing.assert_allclose(x[1:], y[1:], rtol=1e-5, atol=1e-6)
    seen = model.apply(params, IMAGES, intermediates=True)["blocks"]["output"]
    assert seen.shape[0] == 3


def test_inputs_are_tokens_and_what_is_unknown_is_one_of_its_own():
    model = make(input_sizes=(1, 2))
    geometry = dict(model.arguments)["geometry"]
    assert sum(shapes.count_params(geometry).values()) == model.num_params
    params = drawn(model)
    nan = np.nan
    inputs = jnp.array([[1.0, 0, 1], [nan, 0, 1], [1.0, nan, 1], [nan, nan, nan]])
    images = jnp.repeat(IMAGES[:1], 4, 0)
    out = model.apply(params, images, inputs=inputs)
    assert out["tokens"].shape == (4, 2 + 4, 16)
    logits = np.asarray(out["logits"])
    assert np.isfinite(logits).all()
    assert min(np.abs(logits[i] - logits[j]).max() for i in range(4) for j in range(i)) > 1e-4
    none = model.apply(params, images[:1])["logits"]
    np.testing.assert_allclose(none, logits[3:], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"do not fit model.input_sizes=\(1, 2\)"):
        model.apply(params, images, inputs=inputs[:, :2])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"frozen_blocks": 3}, "frozen_blocks must be in 0 to 2, got 3"),
        ({"lora_rank": -1}, "lora_rank must be 0"),
        ({"lora_rank": 2, "lora_targets": ("qvk",)}, "did you mean 'qkv'"),
        ({"input_sizes": (0,)}, "input_sizes must be positive"),
    ],
)
def test_wrong_adaptations_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        make(**options)


SETS = (
    {"name": "grade", "kind": "ordinal", "num_classes": 3},
    {"name": "finding", "kind": "multi", "num_classes": 2},
    {"name": "view", "kind": "single", "num_classes": 2},
)
LABELS = np.array([[2, 1, 0, 1], [0, np.nan, 0.3, 0], [np.nan, 1, 1, np.nan]], np.float32)


def objective(**options):
    return LabelSets(make(num_classes=6), SETS, **options)


def test_the_loss_of_label_sets_equals_its_formula():
    logits = np.random.default_rng(0).normal(size=(3, 6))
    targets, known = objective().targets(jnp.asarray(LABELS))
    losses = objective().losses(jnp.asarray(logits, jnp.float32), targets, known)
    yes, no = special.log_expit(logits), special.log_expit(-logits)

    def bce(row, column, target):
        return -(target * yes[row, column] + (1 - target) * no[row, column])

    grade = np.mean([[bce(0, 0, 1), bce(1, 0, 0)], [bce(0, 1, 1), bce(1, 1, 0)]])
    finding = np.mean([
        np.mean([bce(0, 2, 1), bce(2, 2, 1)]),
        np.mean([bce(0, 3, 0), bce(1, 3, 0.3), bce(2, 3, 1)]),
    ])  # fmt: skip
    log_p = special.log_softmax(logits[:, 4:], 1)
    view = -np.mean([log_p[0, 1], log_p[1, 0]])
    np.testing.assert_allclose(losses, [grade, finding, view], rtol=1e-5)


def test_unknown_labels_give_no_gradient():
    logits = jnp.zeros((3, 6))
    made = objective()

    def loss(z):
        return sum(made.losses(z, *made.targets(jnp.asarray(LABELS))))

    grad = np.asarray(jax.grad(loss)(logits))
    unknown = np.isnan(np.concatenate([LABELS[:, :1], LABELS[:, [0, 1, 2, 3, 3]]], 1))
    assert not grad[unknown].any() and grad[~unknown].all()
    nothing = jnp.full((3, 4), jnp.nan)
    assert sum(made.losses(logits, *made.targets(nothing))) == 0


def test_weights_focus_and_adjustment_do_what_they_say():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32)
    targets, known = objective().targets(jnp.asarray(LABELS))
    plain = objective().losses(z, targets, known)
    doubled = objective(weights=(2.0,) * 6).losses(z, targets, known)
    assert float(doubled[2]) == pytest.approx(2 * float(plain[2]))  # both classes of a single set
    assert float(plain[1]) < float(doubled[1]) < 2 * float(plain[1])  # positives alone
    focal = objective(focal_gamma=2.0).losses(10 * z, targets, known)
    assert all(
        f < p for f, p in zip(focal, objective().losses(10 * z, targets, known), strict=True)
    )
    priors = (0.5, 0.5, 0.5, 0.5, 0.9, 0.1)
    made = objective(priors=priors, logit_adjustment=1.0)
    batch = {"images": IMAGES[:3], "labels": jnp.asarray(LABELS)}
    params, _ = made.init(jax.random.key(0), batch)
    loss = made.loss(params, {}, batch, None)[1][1]["loss_view"]
    assert float(loss) == pytest.approx(-np.mean(np.log([0.1, 0.9])), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_model_that_is_sure_has_a_finite_gradient(gamma):
    """A probability of exactly 0 or 1, right and wrong, in every kind of set; and the formula."""
    made = objective(focal_gamma=gamma)
    targets, known = made.targets(jnp.asarray(LABELS))

    def loss(z):
        return sum(made.losses(z, targets, known))

    z = np.random.default_rng(2).normal(size=(3, 6))
    for scale in (1.0, 1e2, 1e4):
        assert np.isfinite(jax.grad(loss)(jnp.asarray(scale * z, jnp.float32))).all()
    p = special.softmax(z[:, 4:], 1)
    view = [-((1 - p[row, c]) ** gamma) * np.log(p[row, c]) for row, c in ((0, 1), (1, 0))]
    found = made.losses(jnp.asarray(z, jnp.float32), targets, known)[2]
    assert float(found) == pytest.approx(np.mean(view), rel=1e-5)


def test_mixed_examples_and_the_head_s_bias():
    made = objective(head_bias=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    batch = {"images": IMAGES[:3], "labels": jnp.asarray(LABELS)}
    params, _ = made.init(jax.random.key(0), batch)
    np.testing.assert_allclose(
        made.logits(params, {}, batch)[0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rtol=1e-6
    )
    mixed = batch | {"mix_labels": batch["labels"][::-1], "mix_weight": jnp.full(3, 0.25)}
    loss = made.loss(params, {}, mixed, None)[0]
    z = made.logits(params, {}, batch)
    t, k = made.targets(batch["labels"])
    u, j = made.targets(mixed["mix_labels"])
    assert float(loss) == pytest.approx(
        float(sum(made.losses(z, 0.25 * t + 0.75 * u, k & j))), rel=1e-6
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": (1.0,)}, "weights must be 6 numbers"),
        ({"logit_adjustment": 1.0}, "needs objective.priors"),
        ({"focal_gamma": -1.0}, "focal_gamma 0 or more"),
        ({"set_weights": (1.0,)}, "set_weights must be 3"),
        ({"sets": ({"name": "a", "kind": "multl", "num_classes": 6},)}, "did you mean 'multi'"),
        ({"sets": ({"name": "a", "kind": "multi", "num_classes": 5},)}, "num_classes=5, got 6"),
    ],
)
def test_wrong_objectives_are_refused(options, words):
    sets = options.pop("sets", SETS)
    with pytest.raises(InputError, match=words):
        LabelSets(make(num_classes=6), sets, **options)


class Vectors:
    """Labels that are vectors, and numbers beside the image."""

    num_classes, class_names, num_targets, num_inputs = 2, None, 2, 3
    may_lack_classes = True

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            from vitjax.errors import UnreadableImage

            raise UnreadableImage("no")
        return {
            "image": np.full((8, 8), index, np.uint8),
            "label": np.array([index, np.nan], np.float32),
            "inputs": np.array([index, 0, np.nan], np.float32),
            "id": str(index),
        }


def test_batches_of_vectors_and_inputs():
    loader = Loader(Vectors(), Preprocess(8, 1), num_threads=2, max_unreadable_fraction=0.5)
    batches = list(loader.eval_batches(4))
    labels = np.concatenate([b["labels"] for b in batches])
    inputs = np.concatenate([b["inputs"] for b in batches])
    mask = np.concatenate([b["mask"] for b in batches])
    assert labels.dtype == inputs.dtype == np.float32
    np.testing.assert_array_equal(mask, [1, 1, 1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(labels[:6, 0], [0, 1, 2, 3, np.nan, 5])
    np.testing.assert_array_equal(inputs[:6, 0], [0, 1, 2, 3, np.nan, 5])
    batch = loader.train_batch(0, 6, 0)
    assert set(batch) == {"images", "labels", "inputs"}
    np.testing.assert_array_equal(batch["labels"][:, 0], batch["images"][:, 0, 0, 0])
    loader.close()


def test_a_source_of_other_widths_is_refused(make_config):
    config = make_config()
    config.data.source = {"target": f"{__name__}:Vectors"}
    with pytest.raises(InputError, match=r"data.source gives 2 for data.num_targets.* None"):
        experiment.make_loader(
            config, config.data.source, experiment.make_preprocess(config), training=True
        )


def test_early_stop_counts_evaluations_without_a_gain():
    stop = EarlyStop("eval/val/x", patience=2, min_delta=0.1)
    values = [0.5, 0.55, 0.7, 0.75, 0.79]
    over = [stop.is_over(10 * i, {"eval/val/x": v}) for i, v in enumerate(values)]
    assert over == [False, False, False, False, True]
    again = EarlyStop("eval/val/x", patience=2, min_delta=0.1)
    again.read([{"step": 10 * i, "eval/val/x": v} for i, v in enumerate(values)], until=30)
    assert not again.was_over and again.is_over(40, {"eval/val/x": 0.79})
    assert not again.is_over(30, {"eval/val/x": 0.9})  # went back, and better this time
    falling = EarlyStop("eval/val/x", mode="min", patience=1)
    assert [falling.is_over(i, {"eval/val/x": v}) for i, v in enumerate([2, 1, 1])][-1]
    assert not EarlyStop().is_over(1, {})
    with pytest.raises(InputError, match=r"eval/val/x.*they give eval/test/loss"):
        stop.is_over(50, {"eval/test/loss": 1.0})
    with pytest.raises(InputError, match="patience must be at least 1"):
        EarlyStop("x", patience=0)
    with pytest.raises(InputError, match="'max' or 'min', got 'most'"):
        EarlyStop("x", mode="most")


def test_a_run_ends_early_with_its_best_step_kept_and_stays_ended(
    tmp_path, make_config, monkeypatch
):
    use_one_device(monkeypatch)
    values = iter([0.5, 0.6, 0.4, 0.3, 0.9])
    from vitjax.evals.classification import Classification

    real = Classification.__call__
    monkeypatch.setattr(
        Classification, "__call__", lambda self, state: real(self, state) | {"x": next(values)}
    )
    config = make_config(total_steps=20, eval_every=2, checkpoint_every=4)
    config.early_stop.update(metric="eval/test/x", patience=2)
    config.checkpoint.update(metric="eval/test/x", keep_last=1)
    summary = train_lib.train(config, tmp_path)
    assert summary["step"] == 8 and read_metrics(tmp_path)[-1]["step"] == 8
    assert steps.whole_steps(tmp_path / "checkpoints") == [4, 8]
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 8
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train_lib.train(config, tmp_path)["step"] == 8  # no number is left in `values` to take
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert next(values) == 0.9


def test_a_loaded_run_has_its_updates_merged(tmp_path, make_config, monkeypatch):
    use_one_device(monkeypatch)
    first = make_config(total_steps=2, eval_every=0)
    train_lib.train(first, tmp_path / "first")
    config = make_config(total_steps=3, eval_every=0)
    config.model.update(lora_rank=2)
    config.optimizer.freeze = (r"(?!.*lora_|head/).*",)
    config.init.update(checkpoint=str(tmp_path / "first"), skip=(r".*/lora_[ab]",))
    train_lib.train(config, tmp_path / "lora")
    step = tmp_path / "lora" / "checkpoints" / "3"
    contract = store.read_contract(step)
    assert contract["model"]["lora_rank"] == 2
    raw = store.read_verified(step, "params", None, contract)
    start = vitjax.load(tmp_path / "first")
    loaded = vitjax.load(tmp_path / "lora")
    assert loaded.config["lora_rank"] == 0
    assert not any("lora" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(
        loaded.params))  # fmt: skip
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 1), np.uint8)
    assert np.abs(loaded.logits(images) - start.logits(images)).max() > 1e-4
    frozen = raw["blocks"]["attention"]["qkv"]["kernel"]
    assert np.asarray(frozen).tobytes() == np.asarray(
        start.params["blocks"]["attention"]["qkv"]["kernel"]).tobytes()  # fmt: skip
    loaded.save(tmp_path / "out")
    np.testing.assert_allclose(
        vitjax.load(tmp_path / "out").logits(images), loaded.logits(images), rtol=1e-5, atol=1e-6
    )


def test_a_loaded_model_takes_inputs_or_says_that_it_takes_none(native):
    images = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    made = native(input_sizes=(1, 2))
    inputs = np.array([[0.5, 1, 0], [np.nan, 0, 1]])
    a, b = made.logits(images, inputs=inputs), made.logits(images)
    assert np.abs(a - b).max() > 1e-3
    ready = np.zeros((2, 16, 16, 3), np.float32)
    assert made.embed(ready, preprocessed=True, inputs=inputs).shape == (2, 32)
    with pytest.raises(InputError, match=r"inputs must be \[B, 3\].*got \(2, 2\)"):
        made.tokens(images, inputs=inputs[:, :2])
    with pytest.raises(InputError, match="takes no inputs"):
        native().logits(images, inputs=inputs)


def test_bit_hyper_warms_up_and_falls_by_ten():
    schedule = bit_hyper(total_steps=500)
    values = [float(schedule(jnp.asarray(s))) for s in (0, 49, 99, 150, 200, 300, 400, 499)]
    np.testing.assert_allclose(values, [0.01, 0.5, 1, 1, 0.1, 0.01, 0.001, 0.001], rtol=1e-5)


def test_label_sets_are_described_for_predict():
    assert objective().loss_type == "sigmoid"
    single = LabelSets(make(num_classes=2), SETS[2:])
    assert single.loss_type == "softmax" and dataclasses.is_dataclass(single)
