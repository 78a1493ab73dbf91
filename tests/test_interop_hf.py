"""Hugging Face's models: read, compared layer by layer, written back."""

import copy
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax.errors import InputError

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 20,
    "patch_size": 4, "intermediate_size": 48,
}  # fmt: skip
NO_MLP = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
NO_IMAGE = {k: v for k, v in SIZES.items() if k != "image_size"}
DECODER = {
    "decoder_hidden_size": 8, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16, "mask_ratio": 0.0,
}  # fmt: skip
T = transformers
# name: class, config, and what of its output our embedding or logits must equal
MODELS = {
    "vit": (T.ViTModel, lambda: T.ViTConfig(**SIZES), "pooler_output"),
    "vit, tanh GELU, classifier": (
        T.ViTForImageClassification,
        lambda: T.ViTConfig(**SIZES, num_labels=5, hidden_act="gelu_pytorch_tanh"),
        "logits",
    ),
    "vit without biases": (
        T.ViTForImageClassification,
        lambda: T.ViTConfig(**SIZES, num_labels=5, qkv_bias=False, layer_norm_eps=1e-3),
        "logits",
    ),
    "ijepa": (
        T.IJepaForImageClassification, lambda: T.IJepaConfig(**SIZES, num_labels=5), "logits",
    ),
    "deit": (T.DeiTForImageClassification, lambda: T.DeiTConfig(**SIZES, num_labels=5), "logits"),
    "deit with teacher": (
        T.DeiTForImageClassificationWithTeacher,
        lambda: T.DeiTConfig(**SIZES, num_labels=5),
        "logits",
    ),
    "mae": (T.ViTMAEModel, lambda: T.ViTMAEConfig(**SIZES, **DECODER), None),
    "dinov2": (T.Dinov2Model, lambda: T.Dinov2Config(**NO_MLP), "pooler_output"),
    "dinov2 g": (T.Dinov2Model, lambda: T.Dinov2Config(**NO_MLP, use_swiglu_ffn=True), None),
    "dinov2, classifier": (
        T.Dinov2ForImageClassification, lambda: T.Dinov2Config(**NO_MLP, num_labels=5), "logits",
    ),
    "dinov2 with registers": (
        T.Dinov2WithRegistersForImageClassification,
        lambda: T.Dinov2WithRegistersConfig(**NO_MLP, num_labels=5, num_register_tokens=3),
        "logits",
    ),
    "dinov3": (
        T.DINOv3ViTModel,
        lambda: T.DINOv3ViTConfig(**SIZES, num_register_tokens=4),
        "pooler_output",
    ),
    "dinov3 H+": (
        T.DINOv3ViTModel,
        lambda: T.DINOv3ViTConfig(
            **SIZES, num_register_tokens=2, use_gated_mlp=True, hidden_act="silu", rope_theta=50.0,
        ),
        "pooler_output",
    ),
    "dinov3 7B": (
        T.DINOv3ViTModel,
        lambda: T.DINOv3ViTConfig(
            **SIZES, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu",
            query_bias=False, key_bias=False, value_bias=False,
        ),
        "pooler_output",
    ),
    "siglip": (T.SiglipVisionModel, lambda: T.SiglipVisionConfig(**SIZES), "pooler_output"),
    "siglip, classifier": (
        T.SiglipForImageClassification,
        lambda: T.SiglipConfig(
            vision_config=T.SiglipVisionConfig(**SIZES, vision_use_head=False).to_dict(),
            num_labels=5,
        ),
        "logits",
    ),
    "siglip2": (
        T.Siglip2VisionModel, lambda: T.Siglip2VisionConfig(**NO_IMAGE, num_patches=25),
        "pooler_output",
    ),
    "clip": (T.CLIPVisionModel, lambda: T.CLIPVisionConfig(**SIZES), "pooler_output"),
    "clip with projection": (
        T.CLIPVisionModelWithProjection,
        lambda: T.CLIPVisionConfig(**SIZES, projection_dim=8),
        "image_embeds",
    ),
    "openclip, exact GELU": (
        T.CLIPVisionModelWithProjection,
        lambda: T.CLIPVisionConfig(**SIZES, projection_dim=8, hidden_act="gelu"),
        "image_embeds",
    ),
}  # fmt: skip


def make(name, folder):
    """A model of theirs with random weights, saved by itself."""
    torch.manual_seed(0)
    model_class, config, _ = MODELS[name]
    theirs = model_class(config()).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    return theirs


def run(theirs, images):
    """Their output, and the output of each of their blocks."""
    seen = []
    lists = [m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    hooks = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out).numpy())
        )
        for block in lists[0]
    ]
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    options = {}
    rows = images.shape[1] // 4
    name = type(theirs).__name__
    with torch.no_grad():
        if name == "Siglip2VisionModel":
            cut = images.reshape(len(x), rows, 4, -1, 4, 3).transpose(0, 1, 3, 2, 4, 5)
            cut = torch.from_numpy(cut.reshape(len(x), -1, 48).copy())
            shape = torch.tensor([[rows, images.shape[2] // 4]] * len(x))
            out = theirs(cut, torch.ones(cut.shape[:2]), shape)
        else:
            if images.shape[1:3] != (20, 20) and not name.startswith(("Dino", "DINO")):
                options["interpolate_pos_encoding"] = True
            if name == "ViTMAEModel":
                options["noise"] = torch.arange(x.shape[2] * x.shape[3] / 16)[None].tile(2, 1)
            out = theirs(x, **options)
    for hook in hooks:
        hook.remove()
    return out, seen


@pytest.mark.parametrize("shape", [(20, 20), (28, 12)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_theirs(name, shape, tmp_path):
    """At the native size, and at one that is higher and narrower."""
    theirs = make(name, tmp_path)
    ours = vitjax.load(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    wanted, blocks = run(theirs, images)
    apply = jax.jit(lambda p, x: ours.model.apply(p, x, intermediates=True))
    mine = apply(ours.params, jnp.asarray(images))
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        found = mine["blocks"]["output"][index]
        np.testing.assert_allclose(found, block, rtol=1e-4, atol=1e-4, err_msg=f"block {index}")
    tokens = getattr(wanted, "last_hidden_state", None)
    if tokens is not None:
        if "clip" in name:  # theirs come before the last norm
            tokens = theirs.post_layernorm(tokens) if hasattr(theirs, "post_layernorm") else (
                theirs.vision_model.post_layernorm(tokens)
            )  # fmt: skip
        tokens = tokens.detach().numpy()
        np.testing.assert_allclose(mine["tokens"], tokens, rtol=1e-4, atol=1e-4)
    output = MODELS[name][2]
    if output is not None:
        found = mine["logits" if output == "logits" else "embedding"]
        np.testing.assert_allclose(found, getattr(wanted, output).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written_with_the_same_bits(name, tmp_path):
    from safetensors.numpy import load_file

    theirs = make(name, tmp_path / "theirs")
    vitjax.load(tmp_path / "theirs").save(tmp_path / "ours", format="hf")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert before[key].tobytes() == after[key].tobytes(), key
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    images = torch.full((1, 3, 20, 20), 0.5)
    if name not in ("siglip2", "mae"):
        again = copy.deepcopy(again)  # of a file's mapped pages, MKL sums in another order
        a, b = (m.eval()(images)[0].detach() for m in (theirs, again))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_whole_clip_gives_its_vision_tower(tmp_path):
    config = T.CLIPConfig(
        vision_config=T.CLIPVisionConfig(**SIZES).to_dict(), projection_dim=8,
        text_config=T.CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                     intermediate_size=16, vocab_size=50).to_dict(),
    )  # fmt: skip
    theirs = T.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        wanted = theirs.get_image_features(x).pooler_output.numpy()
    ours = vitjax.load(tmp_path)
    np.testing.assert_allclose(ours.embed(images, preprocessed=True), wanted, atol=1e-4)
    assert "the text tower" in set(ours.report.unused.values())


def test_a_decoder_of_masked_images_is_reported_not_loaded(tmp_path):
    theirs = T.ViTMAEForPreTraining(T.ViTMAEConfig(**SIZES, **DECODER))
    theirs.save_pretrained(tmp_path)
    ours = vitjax.load(tmp_path)
    assert all("decoder" in why for why in ours.report.unused.values()) and ours.report.unused


def test_half_precision_stays_half_precision(tmp_path):
    from safetensors.torch import load_file

    theirs = make("vit", tmp_path / "theirs").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    vitjax.load(tmp_path / "theirs").save(tmp_path / "ours", format="hf")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    for key in before:
        assert after[key].dtype == torch.bfloat16 and torch.equal(before[key], after[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "resnet"}, "unknown model_type 'resnet'"),
        ({"hidden_act": "mish"}, "hidden_act='mish' has no counterpart"),
        ({"hidden_size": -1}, "hidden_size must be a positive number, got -1"),
        ({"num_hidden_layers": 4}, "encoder.layer.3.layernorm_before.weight: missing"),
        ({"intermediate_size": 47}, r"\(48, 32\) in the file, \(47, 32\) wanted"),
        ({"image_size": [20, 24]}, "is not square"),
        ({"num_hidden_layers": 2}, "16 arrays that the model has no place for"),
        ({"image_size": 22}, "not divisible by patch size 4"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(change, message, tmp_path):
    make("vit", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        vitjax.load(tmp_path)


def test_the_processor_decides_the_preprocessing(tmp_path):
    make("dinov2", tmp_path)
    T.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3,
        image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3],
    ).save_pretrained(tmp_path)  # fmt: skip
    ours = vitjax.load(tmp_path)
    p = ours.preprocess
    assert (p.image_size, p.resize, p.crop_fraction) == (28, "shorter_side", 28 / 32)
    assert (p.interpolation, p.mean, p.std) == ("bicubic", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert ours.config["table_size"] == 20  # the positions stay those of the file
    ours.save(tmp_path / "out", format="hf")
    again = vitjax.load(tmp_path / "out")
    assert again.preprocess == p and again.config == ours.config


def test_what_is_taken_from_elsewhere_is_said(tmp_path, caplog):
    make("vit", tmp_path)
    with caplog.at_level(logging.WARNING, "vitjax"):
        vitjax.load(tmp_path)
    assert "no preprocessor_config.json" in caplog.text


NATIVE = {
    "mean": ({"pool": "gap"}, "IJepaForImageClassification"),
    "mean, fixed positions": (
        {"pool": "gap", "positions": "sincos2d", "qkv_bias": False}, "IJepaForImageClassification",
    ),
    "class token": ({"pool": "cls", "activation": "gelu"}, "ViTForImageClassification"),
    "class token without a position": (
        {"pool": "cls", "position_prefix": "none", "norm_bias": False, "out_bias": False},
        "ViTForImageClassification",
    ),
    "attention": ({"pool": "map", "num_classes": 0}, "SiglipVisionModel"),
    "LayerScale": (
        {"pool": "cls_gap", "layer_scale": 0.3, "cls_token": True, "mlp_dim": 64,
         "activation": "gelu"},
        "Dinov2ForImageClassification",
    ),
    "registers": (
        {"pool": "cls_gap", "layer_scale": 0.3, "num_registers": 2, "mask_token": True,
         "mlp_dim": 64, "activation": "gelu"},
        "Dinov2WithRegistersForImageClassification",
    ),
    "rotary": (
        {"pool": "cls", "positions": "rope", "num_registers": 4, "layer_scale": 0.3,
         "num_classes": 0, "activation": "gelu"},
        "DINOv3ViTModel",
    ),
    "a norm first": (
        {"pool": "cls", "pre_norm": True, "patch_bias": False, "projection_dim": 6,
         "num_classes": 0, "activation": "quick_gelu"},
        "CLIPVisionModelWithProjection",
    ),
    "distilled": (
        {"pool": "cls", "distill_token": True, "distill_head": True, "activation": "gelu"},
        "DeiTForImageClassificationWithTeacher",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_models_of_ours_go_to_the_class_that_computes_them(name, native, tmp_path):
    options, architecture = NATIVE[name]
    ours = native(**options)
    ours.save(tmp_path, format="hf")
    theirs, info = getattr(T, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    output = {"IJepa": "logits", "SiglipVisionModel": "pooler_output", "DINOv3ViTModel":
              "pooler_output", "CLIPVisionModelWithProjection": "image_embeds"}  # fmt: skip
    wanted = getattr(out, output.get(architecture, "logits")).numpy()
    found = ours.logits if options.get("num_classes", 5) else ours.embed
    np.testing.assert_allclose(found(images, preprocessed=True), wanted, rtol=1e-4, atol=1e-4)
    again = vitjax.load(tmp_path)
    np.testing.assert_allclose(
        again.embed(images, preprocessed=True), ours.embed(images, preprocessed=True), atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": True}, "model.parallel=True"),
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"pool": "map"}, "model.pool='map'"),
        ({"pool": "gap", "layer_scale": 0.1}, "model.layer_scale=0.1"),
        ({"stem": "conv"}, "model.stem='conv'"),
    ],
    ids=str,
)
def test_what_no_class_computes_is_named(options, words, native, tmp_path):
    with pytest.raises(InputError) as error:
        native(**options).save(tmp_path / "x", format="hf")
    assert words in str(error.value) and "nothing was written" in str(error.value)
    assert not (tmp_path / "x").exists()
