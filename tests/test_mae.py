"""MAE: its parts by property, its numbers against transformers, its runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, use_one_device
from objective_runs import check_mesh, check_resume

import vitjax
from vitjax import experiment, warm_start
from vitjax.errors import InputError
from vitjax.interop.layout import named_leaves, nested
from vitjax.models.vit import vit
from vitjax.objectives.mae import MAE, unpatchify
from vitjax.objectives.masking import draw_masking, masking_of
from vitjax.train import train

SIZES = {
    "image_size": 16, "channels": 3, "num_classes": 0, "width": 32, "depth": 2, "mlp_dim": 64,
    "num_heads": 2, "patch_size": 4, "positions": "sincos2d", "cls_token": True, "pool": "cls",
    "activation": "gelu", "eps": 1e-12,
}  # fmt: skip
DECODER = {"width": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def mae():
    objective = MAE(vit(**SIZES), decoder=DECODER)
    params, _ = objective.init(jax.random.key(0), {})
    return objective, params


def images(batch=3, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, 16, 16, 3))


def test_unshuffling_is_exact():
    masking = draw_masking(jax.random.key(3), 5, 16, 4)
    order = jnp.concatenate([masking.keep, jnp.argsort(masking.restore, axis=1)[:, 4:]], axis=1)
    back = jnp.take_along_axis(order, masking.restore, axis=1)
    assert (back == jnp.arange(16)[None]).all()
    assert (masking.masked.sum(1) == 12).all()
    assert not jnp.take_along_axis(masking.masked, masking.keep, axis=1).any()


def test_every_image_has_a_key_of_its_own():
    few, many = (draw_masking(jax.random.key(3), n, 16, 4) for n in (2, 6))
    assert (few.keep == many.keep[:2]).all()
    assert len({tuple(row) for row in np.asarray(many.keep)}) == 6


def test_patches_are_put_back(mae):
    from vitjax.models.encoder import patchify

    x = images()
    assert (unpatchify(patchify(x, 4), (4, 4), 4) == x).all()


def test_the_loss_ignores_visible_patches(mae):
    objective, params = mae
    key, x = jax.random.key(7), images()
    masking = objective._masking(x, jax.random.split(key)[0])
    visible = ~masking.masked

    def loss_of_targets(shift):  # of the targets alone: the encoder still sees x
        changed = dataclasses.replace(objective)
        targets = objective.targets(x)[0] + shift
        object.__setattr__(changed, "targets", lambda _: (targets, None, None))
        return changed.loss(params, {}, {"images": x}, key)[0]

    gradient = jax.grad(loss_of_targets)(jnp.zeros((3, 16, 48)))
    assert (gradient[visible] == 0).all()
    assert (jnp.abs(gradient[masking.masked]).sum(-1) > 0).all()


def test_masked_pixels_are_not_seen(mae):
    """What is hidden changes no prediction."""
    objective, params = mae
    x = images()
    masking = draw_masking(jax.random.key(5), 3, 16, 4)
    pixels = jnp.repeat(jnp.repeat(masking.masked.reshape(3, 4, 4), 4, 1), 4, 2)[..., None]
    first = objective.predict(params, x, masking)[0]
    other = objective.predict(params, jnp.where(pixels, 9.0, x), masking)[0]
    assert (first == other).all()
    assert (first != objective.predict(params, jnp.where(pixels, x, 9.0), masking)[0]).any()


def test_without_normalised_targets_it_predicts_pixels(mae):
    objective = dataclasses.replace(mae[0], normalise_targets=False)
    x = images()
    given = objective.reconstruct(mae[1], {}, {"images": x})
    masked = jnp.repeat(jnp.repeat(given["masked"].reshape(3, 4, 4), 4, 1), 4, 2)
    assert (jnp.where(masked[..., None], 0, given["reconstruction"] - x) == 0).all()


def test_rotary_positions_follow_the_kept_patches():
    sizes = SIZES | {"positions": "rope", "cls_token": False, "pool": "gap"}
    model = vit(**sizes)
    params = model.init(jax.random.key(0))
    x, order = images(), jax.random.permutation(jax.random.key(1), 16)
    keep = jnp.broadcast_to(order[None], (3, 16))
    shuffled = model.apply(params, x, keep=keep)["tokens"]
    whole = model.apply(params, x)["tokens"]
    np.testing.assert_allclose(shuffled, whole[:, order], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.99}, "leaves 0 visible"),
        ({"mask_ratio": 0.0}, "0 masked"),
        ({"decoder": {"wide": 3}}, "has no 'wide'"),
        ({"decoder": {"width": 30, "num_heads": 4}}, "divisible"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        MAE(vit(**SIZES), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_classes": 3}, "num_classes must be 0"), ({"stem": "conv"}, "stem")],
)
def test_models_that_cannot_be_trained_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        MAE(vit(**SIZES | changes))


def test_flops_count_visible_patches_alone(mae):
    objective = MAE(vit(**SIZES, scan=False), decoder=DECODER)  # XLA counts a loop's body once
    assert objective.encoder_flops < 0.35 * objective.model.flops_per_image
    predict = jax.jit(
        lambda p, x: objective.predict(p, x, draw_masking(jax.random.key(0), 1, 16, 4))[0]
    )
    cost = predict.lower(mae[1], images(1)).cost_analysis()["flops"]  # as written, not as compiled
    counted = objective.flops_per_image / 3
    assert 0.95 * counted < cost < 1.6 * counted, (counted, cost)  # with norms, softmax, GELU


# Against transformers.


def _copy(theirs, ours):
    """Weights of transformers' ViTMAEForPreTraining in this tree of arrays."""
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    heads = {"model": 2, "decoder": 2}

    def linear(name):
        return state[f"{name}.weight"].T, state[f"{name}.bias"]

    def blocks(prefix, part, depth):
        layers = []
        for i in range(depth):
            base, h = f"{prefix}.{i}", heads[part]
            attention = next(
                b
                for b in (f"{base}.attention.attention", f"{base}.attention")
                if f"{b}.query.weight" in state or f"{b}.q_proj.weight" in state
            )
            names = ("query", "key", "value")
            if f"{attention}.q_proj.weight" in state:
                names = ("q_proj", "k_proj", "v_proj")
            kernels, biases = zip(*(linear(f"{attention}.{n}") for n in names), strict=True)
            d = kernels[0].shape[0]
            out_name = next(
                n
                for n in (
                    f"{base}.attention.output.dense",
                    f"{attention}.o_proj",
                    f"{attention}.out_proj",
                )
                if f"{n}.weight" in state
            )
            out, out_bias = linear(out_name)
            up_name, down_name = (
                (f"{base}.mlp.fc1", f"{base}.mlp.fc2")
                if f"{base}.mlp.fc1.weight" in state
                else (f"{base}.intermediate.dense", f"{base}.output.dense")
            )
            up, down = linear(up_name), linear(down_name)
            layers.append({
                "attention/qkv/kernel": np.stack([k.reshape(d, h, d // h) for k in kernels], 1),
                "attention/qkv/bias": np.stack([b.reshape(h, d // h) for b in biases]),
                "attention/out/kernel": out.reshape(h, d // h, d),
                "attention/out/bias": out_bias,
                "mlp/up/kernel": up[0], "mlp/up/bias": up[1],
                "mlp/down/kernel": down[0], "mlp/down/bias": down[1],
                "norm1/scale": state[f"{base}.layernorm_before.weight"],
                "norm1/bias": state[f"{base}.layernorm_before.bias"],
                "norm2/scale": state[f"{base}.layernorm_after.weight"],
                "norm2/bias": state[f"{base}.layernorm_after.bias"],
            })  # fmt: skip
        return {f"{part}/blocks/{k}": np.stack([x[k] for x in layers]) for k in layers[0]}

    encoder = next(
        k for k in state if k.endswith("0.layernorm_before.weight") and "decoder" not in k
    )
    found = blocks(encoder.removesuffix(".0.layernorm_before.weight"), "model", 2)
    found |= blocks("decoder.decoder_layers", "decoder", 2)
    kernel = state["vit.embeddings.patch_embeddings.projection.weight"]  # D C Y X
    found["model/patch_embed/kernel"] = kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])
    found["model/patch_embed/bias"] = state["vit.embeddings.patch_embeddings.projection.bias"]
    found["model/cls_token"] = state["vit.embeddings.cls_token"][0]
    norms = {"model/norm": "vit.layernorm", "decoder/norm": "decoder.decoder_norm"}
    for name, other in norms.items():
        found[f"{name}/scale"], found[f"{name}/bias"] = (
            state[f"{other}.weight"], state[f"{other}.bias"])  # fmt: skip
    for name, other in {"embed": "decoder_embed", "predict": "decoder_pred"}.items():
        kernel, bias = linear(f"decoder.{other}")
        found[f"decoder/{name}/kernel"], found[f"decoder/{name}/bias"] = kernel, bias
    found["decoder/mask_token"] = state["decoder.mask_token"][0]
    wanted = named_leaves(ours)
    assert set(found) == set(wanted)
    return nested({k: jnp.asarray(found[k]).reshape(wanted[k].shape) for k in wanted})


def _sine_tables(theirs, torch):
    """Their fixed positions, put where random ones were drawn, are ours: y before x."""
    from vitjax.models.positions import sincos2d_positions

    with torch.no_grad():
        for place, width in ((theirs.vit.embeddings.position_embeddings, 32),
                             (theirs.decoder.decoder_pos_embed, 24)):  # fmt: skip
            place[0, 0] = 0
            place[0, 1:] = torch.from_numpy(np.array(sincos2d_positions(4, 4, width)))


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_prediction_equal_those_of_transformers(normalise):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, decoder_hidden_size=24, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=96, mask_ratio=0.75,
        norm_pix_loss=normalise, layer_norm_eps=1e-12, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    _sine_tables(theirs, torch)
    objective = MAE(vit(**SIZES), decoder=DECODER, normalise_targets=normalise)
    params = _copy(theirs, objective.init(jax.random.key(0), {})[0])
    x, noise = np.asarray(images(2)), np.random.default_rng(0).random((2, 16), np.float32)
    masking = masking_of(jnp.argsort(jnp.asarray(noise), axis=1), 4)
    with torch.no_grad():
        pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        given = theirs(pixels, noise=torch.from_numpy(noise))
    predicted = objective.predict(params, jnp.asarray(x), masking)[0]
    np.testing.assert_allclose(predicted, given.logits.numpy(), atol=1e-4)
    errors = ((predicted - objective.targets(jnp.asarray(x))[0]) ** 2).mean(-1)
    loss = (errors * masking.masked).sum() / masking.masked.sum()
    np.testing.assert_allclose(loss, float(given.loss), rtol=1e-5)


# Runs.


def config_of(**changes):
    config = tiny_config(total_steps=4, checkpoint_every=2)
    config.unlock()
    config.model.num_classes = 0
    config.objective = {
        "target": "vitjax.objectives.mae:MAE",
        "decoder": {"width": 16, "depth": 1, "num_heads": 2},
    }
    config.evals, config.augment = {}, ()
    config.checkpoint.metric = None
    config.update(changes)
    return config.lock()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mae") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train(config_of(), workdir)
    return workdir


def test_a_mesh_changes_nothing(finished):
    check_mesh(config_of(), finished, rtol=2e-5)


def test_it_resumes_exactly(finished, tmp_path, monkeypatch):
    check_resume(config_of(), finished, tmp_path / "run", monkeypatch)


def test_its_checkpoint_is_the_encoder(finished, native):
    loaded = vitjax.load(finished)
    assert "decoder" not in loaded.params and loaded.class_names is None
    assert loaded.embed(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 32)


def test_it_starts_from_a_supervised_run_and_the_other_way(finished, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    config = config_of()
    config.init.checkpoint = str(finished)
    exp = experiment.build(config)
    state, before = warm_start.first_state(exp), vitjax.load(finished).params
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state.params["model"], before))
    supervised = tiny_config()
    supervised.init.checkpoint = str(finished)
    with pytest.raises(InputError, match="head"):
        experiment_of = experiment.build(supervised)
        warm_start.check_init(experiment_of)
    supervised.init.skip = ("head/.*",)
    state = warm_start.first_state(experiment.build(supervised))
    blocks = state.params["blocks"]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), blocks, before["blocks"]))


def test_the_decoder_is_not_frozen_with_the_encoder(monkeypatch):
    use_one_device(monkeypatch)
    config = config_of()
    config.model.frozen_blocks = 1
    exp = experiment.build(config)
    state = exp.fresh_state()
    batch = {
        "images": np.random.default_rng(0).integers(0, 255, (32, 8, 8, 1), np.uint8),
        "labels": np.zeros(32, np.int32),
    }
    new, _ = jax.jit(exp.train_step)(state, batch)
    changed = {
        name: bool((np.asarray(a) != np.asarray(b)).any())
        for (name, a), b in zip(
            named_leaves(state.params).items(), named_leaves(new.params).values(), strict=True
        )
    }
    assert changed["decoder/mask_token"] and changed["decoder/blocks/mlp/up/kernel"]
    assert not changed["model/patch_embed/kernel"]
