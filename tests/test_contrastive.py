"""The losses over all pairs, the objective, and runs of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import use_one_device

import vitjax
from vitjax import config as config_lib
from vitjax import experiment, parallel
from vitjax import train as train_lib
from vitjax.checkpoints import store
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.models.vit import vit
from vitjax.objectives.contrastive import Contrastive, at_most, normalised
from vitjax.objectives.pairwise import Pairs, pair_loss

MESHES = {"one": None, "8-1-1": (8, 1, 1), "1-8-1": (1, 8, 1), "2-4-1": (2, 4, 1),
          "2-2-2": (2, 2, 2)}  # fmt: skip


def make_mesh(sizes):
    return sizes and parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)))


def whole_loss(kind, images, texts, scale, bias):
    """The loss from the matrix of all pairs, as the papers write it."""
    logits = scale * images @ texts.T + bias
    own = jnp.eye(len(images))
    if kind == "sigmoid":
        return -jax.nn.log_sigmoid((2 * own - 1) * logits).sum() / len(images)
    rows, columns = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    return -(own * (rows + columns)).sum() / 2 / len(images)


def draw(count=32, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.normal(size=(count, dim)), jnp.float32) for _ in range(2))
    return normalised(x), normalised(y), jnp.asarray(7.0), jnp.asarray(-3.0)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("chunk", [3, 1024])
def test_chunked_loss_and_gradients_equal_those_of_the_whole_matrix(kind, mesh, chunk):
    mesh, values = make_mesh(mesh), draw()
    how = Pairs(kind, chunk, mesh)
    wanted, wanted_grads = jax.value_and_grad(lambda *v: whole_loss(kind, *v), (0, 1, 2, 3))(
        *values
    )
    if mesh is not None:
        split = parallel.batch_sharding(mesh)
        values = (*(jax.device_put(x, split) for x in values[:2]), *values[2:])
    run = jax.jit(jax.value_and_grad(lambda *v: 3 * pair_loss(how, *v)[0], (0, 1, 2, 3)))
    loss, grads = run(*values)
    np.testing.assert_allclose(loss, 3 * wanted, rtol=1e-5)
    for found, right in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(found, 3 * right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 4, 1)], ids=["one", "2-4-1"])
def test_the_metrics_are_those_of_the_matrix(mesh):
    images, texts, scale, bias = draw()
    _, seen = pair_loss(Pairs("sigmoid", 5, make_mesh(mesh)), images, texts, scale, bias)
    logits = np.asarray(scale * images @ texts.T + bias)
    own = np.eye(32, dtype=bool)
    np.testing.assert_allclose(seen["pair"], logits[own], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen["sum"], logits.sum(1), rtol=1e-5, atol=1e-4)
    others = np.where(own, -np.inf, logits).max(1)
    np.testing.assert_allclose(seen["best_other"], others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_order_of_a_batch_changes_no_loss(kind):
    images, texts, scale, bias = draw()
    order = np.random.default_rng(1).permutation(32)
    how = Pairs(kind, 8, make_mesh((2, 4, 1)))
    run = jax.jit(lambda *values: pair_loss(how, *values))
    loss, first = run(images, texts, scale, bias)
    again, seen = run(images[order], texts[order], scale, bias)
    other, _ = run(images[order], texts, scale, bias)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert abs(float(other) - float(loss)) > 0.01
    np.testing.assert_allclose(seen["pair"], first["pair"][order], atol=1e-6)


def temporaries(kind, count, devices, chunk):
    """Bytes a device needs beside inputs and outputs for the loss and all gradients."""
    mesh = parallel.make_mesh({"fsdp": -1}, jax.devices()[:devices])
    split = parallel.batch_sharding(mesh)
    part = jax.ShapeDtypeStruct((count, 16), jnp.float32, sharding=split)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=parallel.replicated(mesh))
    how = Pairs(kind, chunk, mesh)
    run = jax.jit(jax.value_and_grad(lambda *v: pair_loss(how, *v)[0], (0, 1, 2, 3)))
    return run.lower(part, part, number, number).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_memory_grows_with_the_local_batch_and_not_with_all_pairs(kind):
    # A matrix of all pairs of 2,048 is 16 MiB; its rows of one of eight devices are 2 MiB.
    alone, shared = (temporaries(kind, 256 * n, n, 128) for n in (1, 8))
    assert shared < 1.5 * alone, (alone, shared)
    assert shared < 2**20
    small, large = (temporaries(kind, count, 1, 128) for count in (512, 2048))
    assert large < 4.5 * small, (small, large)


def tiny(**changes):
    """The digits' config, shrunk to seconds."""
    config = config_lib.load_config("siglip_digits")
    config.update(total_steps=4, batch_size=32, log_every=1, eval_every=0, checkpoint_every=2)
    config.model.update(width=32, depth=1, mlp_dim=32, num_heads=2, scan=True)
    config.objective.text.update(width=32, depth=1, mlp_dim=32, num_heads=2, scan=True)
    config.objective.update(chunk_size=3, bias=-10.0)
    config.optimizer.schedule.warmup_steps = 2
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    config.checkpoint.keep_last = 10
    return config_lib.override(config, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])


def run_steps(config, steps=3, devices=None):
    exp = experiment.build(config, devices=devices)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state = exp.compile(), exp.fresh_state()
    rows = []
    for i in range(steps):
        batch = loader.train_batch(i, config.batch_size, config.seed)
        state, metrics = step(state, parallel.to_global(batch, exp.mesh, config.batch_size))
        rows.append({k: float(v) for k, v in metrics.items()})
    return rows, state, exp


@pytest.fixture(scope="module")
def one_device():
    return {kind: run_steps(tiny(objective__loss_type=kind), devices=jax.devices()[:1])[0]
            for kind in ("sigmoid", "softmax")}  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [((2, 4, 1), "softmax"), ((2, 2, 2), "sigmoid")],
    ids=str,
)
def test_every_mesh_trains_as_one_device(mesh, kind, one_device):
    config = tiny(objective__loss_type=kind)
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    rows, state, _ = run_steps(config)
    for name in ("loss", "scale", "positive_logit", "negative_logit", "image_std", "text_std"):
        wanted = [row[name] for row in one_device[kind]]
        np.testing.assert_allclose([row[name] for row in rows], wanted, rtol=2e-5, err_msg=name)
    kernel = state.params["text"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_data(0).size == kernel.size // (mesh[1] * mesh[2])


def test_the_text_tower_s_heads_are_split_by_the_tensor_axis():
    config = tiny()
    config.mesh = {"replica": 1, "fsdp": 4, "tensor": 2}
    exp = experiment.build(config)
    for tower in ("model", "text"):
        blocks = exp.state_shardings.params[tower]["blocks"]
        assert blocks["attention"]["qkv"]["kernel"].spec[3] == "tensor"
        assert blocks["mlp"]["down"]["kernel"].spec[1] == "tensor"


def test_accumulated_parts_are_batches_of_their_own():
    """The loss of two parts is the mean of two losses: an image meets half of the texts."""
    config = tiny(optimizer__accumulation_steps=2, objective__bias=0.0)  # so that negatives count
    config.augment = ()
    exp = experiment.build(config, devices=jax.devices()[:1])
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    batch = loader.train_batch(0, 32, config.seed)
    state, keys = exp.fresh_state(), iter(jax.random.split(jax.random.key(1), 100))
    noisy = lambda x: x + jax.random.normal(next(keys), x.shape)  # noqa: E731
    towers = {k: jax.tree.map(noisy, state.params[k]) for k in ("model", "text")}
    params = state.params | towers
    loss = jax.jit(lambda batch: exp.objective.loss(params, {}, batch, None)[0])
    images = exp.preprocess.normalise(jnp.asarray(batch["images"], jnp.float32) / 255)
    whole = {"images": images, "texts": jnp.asarray(batch["texts"])}
    losses = [float(loss({k: x[i::2] for k, x in whole.items()})) for i in (0, 1)]
    others = [float(loss({k: x[i : i + 16] for k, x in whole.items()})) for i in (0, 16)]
    assert abs(np.mean(losses) - np.mean(others)) > 1e-3
    assert abs(np.mean(losses) - float(loss(whole))) > 1e-2
    given = parallel.to_global(batch, exp.mesh, 32)
    _, metrics = exp.compile()(dataclasses.replace(state, params=params), given)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_first_step_has_the_papers_temperature_and_bias(one_device):
    sigmoid, softmax = one_device["sigmoid"][0], one_device["softmax"][0]
    assert (sigmoid["scale"], sigmoid["bias"]) == pytest.approx((10.0, -10.0))
    assert softmax["scale"] == pytest.approx(1 / 0.07) and "bias" not in softmax
    assert one_device["sigmoid"][2]["bias"] != -10.0


def test_the_softmax_s_scale_stays_at_most_100_and_can_come_back():
    value, grad = jax.value_and_grad(lambda x: -at_most(x, jnp.log(100.0)))(jnp.asarray(5.0))
    assert value == pytest.approx(-np.log(100)) and grad == 0  # descent would raise it more
    assert jax.grad(lambda x: at_most(x, jnp.log(100.0)))(jnp.asarray(5.0)) == 1
    assert jax.grad(lambda x: -at_most(x, jnp.log(100.0)))(jnp.asarray(4.0)) == -1


def test_a_run_leaves_an_image_model(tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    config = tiny(optimizer__ema_decay=0.9)
    summary = train_lib.train(config, tmp_path)
    assert 0 <= summary["eval/test/accuracy"] <= 1 and summary["eval/test/examples"] == 360
    exp = experiment.build(config)
    folder = tmp_path / "checkpoints" / "4"
    contract = store.read_contract(folder)
    assert contract["weights"] == ["params", "model"] and contract["class_names"] is None
    tree = store.read_verified(folder, "ema", None, contract)
    backbone = exp.objective.backbone(tree, {})
    loaded = vitjax.load(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, backbone))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    prepared = exp.preprocess.normalise(jnp.asarray(images, jnp.float32) / 255)
    own = exp.objective.embed(tree, {}, {"images": prepared})
    np.testing.assert_allclose(loaded.embed(images), own, atol=1e-5)
    unit = exp.objective.embed_images(tree, prepared)
    np.testing.assert_allclose(unit, normalised(own), atol=1e-6)


def test_a_supervised_checkpoint_starts_the_image_tower(tmp_path, monkeypatch, make_config):
    use_one_device(monkeypatch)
    train_lib.train(make_config(total_steps=2, eval_every=0), tmp_path / "first")
    config = tiny(model__mlp_dim=64, model__depth=2)
    config.init.update(checkpoint=str(tmp_path / "first"), drop=("head/.*",))
    from vitjax import warm_start

    exp = experiment.build(config)
    state = warm_start.first_state(exp)
    wanted = vitjax.load(tmp_path / "first").params["patch_embed"]["kernel"]
    np.testing.assert_array_equal(state.params["model"]["patch_embed"]["kernel"], wanted)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    config = tiny(model__drop_path_rate=0.2)
    train_lib.train(config, tmp_path / "whole")
    collect = train_lib._Run._collect
    with monkeypatch.context() as patch:

        def failing(self):
            if self.in_flight[0][0] == 3:
                raise KeyboardInterrupt
            collect(self)

        patch.setattr(train_lib._Run, "_collect", failing)
        with pytest.raises(KeyboardInterrupt):
            train_lib.train(config, tmp_path / "broken")
    train_lib.train(config, tmp_path / "broken")
    prints = [store.read_contract(tmp_path / d / "checkpoints" / "4")["arrays"]
              for d in ("whole", "broken")]  # fmt: skip
    assert prints[0] == prints[1]
    rows = [[json.loads(line)["train/loss"] for line in (tmp_path / d / "metrics.jsonl").open()
             if "train/loss" in line] for d in ("whole", "broken")]  # fmt: skip
    assert rows[0] == rows[1]


def change(**values):
    def apply(config):
        for key, value in values.items():
            node = config
            *parents, last = key.split("__")
            for part in parents:
                node = node[part]
            with config.unlocked(), config.ignore_type():
                node[last] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (change(objective__loss_type="sigmod"), "unknown objective.loss_type 'sigmod'; did you"),
        (change(objective__chunk_size=0), "chunk_size must be at least 1, got 0"),
        (change(objective__text={"target": ""}), "objective.text is not set"),
        (change(objective__text__pool="first"), "unknown text.pool 'first'"),
        (change(objective__text__width=30), "width 30 is not divisible by text.num_heads 4"),
        (change(objective__text__depth=0), "text.depth must be a positive number, got 0"),
        (change(objective__text__length=9), "text.length is 9, but data.tokenizer.length is 24"),
        (change(model__projection_dim=9), "gives 9 numbers and the text tower 64: set objective"),
        (change(objective__text__precision="x"), "takes no argument 'precision'"),
        (change(model__num_classes=10), "set model.num_classes=0, it is 10"),
        (change(model__frozen_blocks=1), "model.frozen_blocks does not tell the towers apart"),
        (change(data__tokenizer=None), "needs data.tokenizer"),
        (change(objective__text__vocab_size=99), "259 tokens, but objective.text.vocab_size is 99"),
        (
            change(data__source={"target": "vitjax.data.sources.arrays:Digits", "split": "train"}),
            "data.tokenizer is set, but data.source gives no captions",
        ),
        (
            change(augment=({"target": "vitjax.data.augment:Mixup", "alpha": 0.4},)),
            "leave Mixup and CutMix out of augment",
        ),
        (change(data__tokenizer__length=2), "length must be at least 3|length is 24, but"),
        (change(objective__scale=200.0), r"scale must be in \(0, 100\], got 200"),
    ],
)
def test_mistakes_are_named_before_the_first_step(apply, words):
    config = config_lib.load_config("siglip_digits")
    config.mesh = {"replica": 8, "fsdp": 1, "tensor": 1}
    apply(config)
    with pytest.raises(InputError, match=words):
        exp = experiment.build(config)
        jax.eval_shape(exp.train_step, exp.abstract_state, exp.abstract_batch)
        experiment.make_loader(config, config.data.source, exp.preprocess, training=True)


def test_captions_need_a_tokenizer(make_config):
    config = make_config()
    config.data.source = config_lib.load_config("siglip_digits").data.source
    with pytest.raises(InputError, match=r"gives captions, but data\.tokenizer is not set"):
        experiment.make_loader(config, config.data.source, Preprocess(8, 1), training=True)


def test_flops_are_of_both_towers():
    image = vit(image_size=8, channels=1, num_classes=0, width=32, depth=1, mlp_dim=32,
                num_heads=2, patch_size=2)  # fmt: skip
    text = config_lib.plain(tiny().objective.text)
    objective = Contrastive(image, text)
    towers = image.flops_per_image + objective.text_model.flops_per_image
    assert objective.flops_per_image == 3 * towers
    n, d, f = 24, 32, 32
    block = 2 * n * (4 * d * d + 2 * d * f + 2 * n * d)
    pool = 2 * (2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * f)
    assert objective.text_model.flops_per_image == block + pool + 2 * d * d
    assert dataclasses.replace(objective, loss_type="softmax").loss_type == "softmax"
