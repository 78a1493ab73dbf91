"""Google's npz files, against the same network written in flax.linen, whose names they have."""

import json
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax.errors import InputError
from vitjax.interop import google
from vitjax.interop.contents import full_model
from vitjax.interop.layout import expected_shapes
from vitjax.models.vit import vit

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, SIZE = 24, 3, 4, 40, 4, 16
# How the two code bases call the layers of a block.
RENAMED = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(x.shape[-1])(hidden)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x = Block(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 1, WIDTH))
        x = nn.MultiHeadDotProductAttention(num_heads=HEADS)(jnp.tile(probe, (len(x), 1, 1)), x)
        return (x + MlpBlock()(nn.LayerNorm()(x)))[:, 0]


class Linen(nn.Module):
    pool: str
    position_first: bool = False  # the class token comes before positions are added
    pre_logits: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(
            images
        )
        x = x.reshape(len(x), -1, WIDTH)
        count = x.shape[1] + self.position_first
        table = self.param("pos_embedding", nn.initializers.normal(), (1, count, WIDTH))
        cls = (
            self.param("cls", nn.initializers.normal(), (1, 1, WIDTH)) if "cls" in self.pool else 0
        )
        if self.pool != "cls":
            x = x + table
        elif self.position_first:
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1) + table
        else:
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x + table], 1)
        tokens = x = Encoder(name="Transformer")(x)
        x = MAPHead()(x) if self.pool == "map" else x[:, 0] if self.pool == "cls" else x.mean(1)
        if self.pre_logits:
            x = jnp.tanh(nn.Dense(10, name="pre_logits")(x))
        return tokens, nn.Dense(5, name="head")(x)


def make(path, *, prefix="", more=None, **options):
    """Random weights as Google's code saves them, and what the network makes of images."""
    model = Linen(**options)
    images = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 3))
    with jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(1), images)["params"]
        keys = iter(jax.random.split(jax.random.key(2), 100))
        params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.2, params)
        tokens, logits = model.apply({"params": params}, images)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    if options.get("position_first"):
        for old, new in RENAMED.items():
            flat = {
                re.sub(rf"(encoderblock_\d+)/{old}/", rf"\1/{new}/", n): v for n, v in flat.items()
            }
        flat["Transformer/posembed_input/pos_embedding"] = flat.pop("pos_embedding")
    np.savez(path, **{prefix + n: np.asarray(v) for n, v in flat.items()}, **(more or {}))
    return flat, np.asarray(images), tokens, logits


KINDS = {
    "AugReg": {"pool": "cls", "position_first": True},
    "the first ViT, with its representation layer": {
        "pool": "cls", "position_first": True, "pre_logits": True,
    },
    "big_vision, class token": {"pool": "cls"},
    "big_vision, mean": {"pool": "gap"},
    "big_vision, attention": {"pool": "map"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_npz_gives_the_numbers_of_linen_and_the_same_bits_back(kind, tmp_path):
    flat, images, tokens, logits = make(tmp_path / "a.npz", **KINDS[kind])
    ours = vitjax.load(tmp_path / "a.npz")
    np.testing.assert_allclose(ours.tokens(images, preprocessed=True), tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.logits(images, preprocessed=True), logits, rtol=1e-4, atol=1e-4)
    ours.save(tmp_path / "b.npz", format="npz")
    with np.load(tmp_path / "b.npz") as written:
        assert set(written.files) == set(flat)
        for name, value in flat.items():
            np.testing.assert_array_equal(written[name], np.asarray(value), err_msg=name)


def test_the_image_tower_of_a_whole_training_checkpoint_is_read(tmp_path):
    """big_vision's files hold the text tower, the temperature and the optimizer too."""
    more = {"params/t": np.zeros(()), "params/b": np.zeros(()), "opt/0/count": np.zeros(3),
            "params/txt/Embed_0/embedding": np.zeros((3, 4), np.float32)}  # fmt: skip
    _, images, _, logits = make(tmp_path / "a.npz", pool="map", prefix="params/img/", more=more)
    ours = vitjax.load(tmp_path / "a.npz")
    np.testing.assert_allclose(ours.logits(images, preprocessed=True), logits, rtol=1e-4, atol=1e-4)
    assert set(ours.report.unused.values()) == {"the text tower", "optimizer state"}


def test_scanned_blocks_are_read_and_written_back(tmp_path):
    flat, images, _, logits = make(tmp_path / "a.npz", pool="gap")
    stacked: dict = {n: v for n, v in flat.items() if "encoderblock_" not in n}
    for name in flat:
        if "encoderblock_0/" in name:
            blocks = [flat[name.replace("_0/", f"_{i}/", 1)] for i in range(DEPTH)]
            stacked[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    np.savez(tmp_path / "b.npz", **stacked)
    ours = vitjax.load(tmp_path / "b.npz")
    np.testing.assert_allclose(ours.logits(images, preprocessed=True), logits, rtol=1e-4, atol=1e-4)
    ours.save(tmp_path / "c.npz", format="npz")
    with np.load(tmp_path / "c.npz") as written:
        assert set(written.files) == set(stacked)
        for name, value in stacked.items():
            np.testing.assert_array_equal(written[name], np.asarray(value), err_msg=name)


def test_the_contract_travels_beside_the_file(tmp_path):
    make(tmp_path / "a.npz", pool="gap")
    ours = vitjax.load(tmp_path / "a.npz")
    assert "squashed" in ours.report.notes[-1] and ours.preprocess.resize == "squash"
    changed = vitjax.load(tmp_path / "a.npz", preprocess={"mean": (0.4,), "resize": "shorter_side"})
    changed.save(tmp_path / "b.npz", format="npz")
    again = vitjax.load(tmp_path / "b.npz")
    assert again.preprocess == changed.preprocess and again.preprocess.mean == (0.4,)
    assert "mean [0.4]" in (tmp_path / "b.md").read_text()


# What the published ViT-B/16 files hold (AugReg, ImageNet-21k; big_vision's ImageNet-1k).
BLOCK = {
    "{attention}/query/kernel": (768, 12, 64), "{attention}/query/bias": (12, 64),
    "{attention}/key/kernel": (768, 12, 64), "{attention}/key/bias": (12, 64),
    "{attention}/value/kernel": (768, 12, 64), "{attention}/value/bias": (12, 64),
    "{attention}/out/kernel": (12, 64, 768), "{attention}/out/bias": (768,),
    "LayerNorm_0/scale": (768,), "LayerNorm_0/bias": (768,),
    "{norm2}/scale": (768,), "{norm2}/bias": (768,),
    "{mlp}/Dense_0/kernel": (768, 3072), "{mlp}/Dense_0/bias": (3072,),
    "{mlp}/Dense_1/kernel": (3072, 768), "{mlp}/Dense_1/bias": (768,),
}  # fmt: skip
PUBLISHED = {
    "AugReg B/16": (
        {"pool": "cls", "num_classes": 21843},
        {"cls": (1, 1, 768), "Transformer/posembed_input/pos_embedding": (1, 197, 768)},
        ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    ),
    "big_vision B/16": (
        {"pool": "gap", "num_classes": 1000},
        {"pos_embedding": (1, 196, 768)},
        ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name):
    options, more, (attention, norm2, mlp) = PUBLISHED[name]
    model = vit(shape="B/16", image_size=224, channels=3, **options)
    block = full_model(options | {"cls_token": options["pool"] == "cls"})
    style = "vision_transformer" if "Aug" in name else "big_vision"
    leaves = google._leaves(block, style, google.BLOCK, "")
    sizes = {"y": 16, "x": 16, "c": 3, "h": 12, "s": 3}
    found = expected_shapes(leaves, model.abstract_params, sizes)
    wanted = more | {
        "embedding/kernel": (16, 16, 3, 768), "embedding/bias": (768,),
        "Transformer/encoder_norm/scale": (768,), "Transformer/encoder_norm/bias": (768,),
        "head/kernel": (768, options["num_classes"]), "head/bias": (options["num_classes"],),
    }  # fmt: skip
    for i in range(12):
        for part, shape in BLOCK.items():
            part = part.format(attention=attention, norm2=norm2, mlp=mlp)
            wanted[f"Transformer/encoderblock_{i}/{part}"] = shape
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embedding": np.zeros((1, 15, WIDTH), np.float32)}, "15 positions are no square"),
        ({"head/kernel": np.zeros((WIDTH + 1, 5), np.float32)}, "head/kernel: .25, 5. in the file"),
        ({"extra/kernel": np.zeros(3, np.float32)}, "1 arrays that the model has no place for"),
        ({"Transformer/encoderblock_1/LayerNorm_0/scale": None}, "missing"),
        ({"Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": None}, "not a ViT of Google's"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(change, message, tmp_path):
    flat, *_ = make(tmp_path / "a.npz", pool="gap")
    flat = {n: np.asarray(v) for n, v in (flat | change).items() if v is not None}
    np.savez(tmp_path / "b.npz", **flat)
    with pytest.raises(InputError, match=message):
        vitjax.load(tmp_path / "b.npz")
    if "extra/kernel" in change:
        vitjax.load(tmp_path / "b.npz", ignore=["extra/.*"])


def test_what_google_has_no_name_for_is_named(tmp_path, native):
    for options, words in (
        ({"parallel": True}, "model.parallel=True"),
        ({"layer_scale": 0.1, "activation": "gelu"}, "layer_scale=0.1 and model.activation='gelu'|"
         "activation='gelu' and"),
        ({"positions": "rope"}, "model.positions='rope'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"(?s)cannot express.*({words}).*nothing was written"):
            native(**options).save(tmp_path / "x.npz", format="npz")
    assert not list(tmp_path.iterdir())


def test_missing_biases_are_written_as_zeros(tmp_path, native):
    model = native(positions="sincos2d", qkv_bias=False, norm_bias=False, pool="gap")
    model.save(tmp_path / "x.npz", format="npz")
    again = vitjax.load(tmp_path / "x.npz")
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(
        again.logits(images, preprocessed=True), model.logits(images, preprocessed=True), atol=1e-5
    )
    assert again.config["positions"] == "sincos2d" and again.config["qkv_bias"]
    assert json.loads((tmp_path / "x.json").read_text())["vitjax"] == 1
