"""Convolutional baselines and stems: numbers, counts, formats, and the trainer."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import vitjax
from vitjax import experiment, state
from vitjax.errors import InputError
from vitjax.models import bit as bit_lib
from vitjax.models import convnext as convnext_lib
from vitjax.models import shapes
from vitjax.models.bit import bit
from vitjax.models.conv import standardise
from vitjax.models.convnext import convnext
from vitjax.models.norms import GroupNorm
from vitjax.models.vit import vit
from vitjax.precision import Precision

BIT = {"blocks": (2, 1, 1), "widths": (32, 64, 128), "root_width": 16, "groups": 8}
CONVNEXT = {"blocks": (2, 1, 2), "widths": (8, 16, 32), "layer_scale": 0.5}
SMALL = {"channels": 3, "num_classes": 5}


def plan_of(model):
    return dict(model.arguments)["plan"]


def make(name, folder):
    """A model of transformers with random weights, saved by itself."""
    torch = pytest.importorskip("torch", reason="needs torch")
    T = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    if name.startswith("bit"):
        config = T.BitConfig(
            hidden_sizes=[32, 64, 128],
            depths=[2, 1, 1],
            embedding_size=16,
            num_groups=8,
            num_labels=5,
        )
        model = (T.BitModel if "headless" in name else T.BitForImageClassification)(config)
    else:
        config = T.ConvNextConfig(
            hidden_sizes=[8, 16, 32], depths=[2, 1, 2], num_stages=3, num_labels=5, image_size=32,
            layer_scale_init_value=0.5,
        )  # fmt: skip
        model = (T.ConvNextModel if "headless" in name else T.ConvNextForImageClassification)(
            config
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    return torch, model


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("name", ["bit", "bit headless", "convnext", "convnext headless"])
def test_every_stage_equals_transformers(name, shape, tmp_path):
    torch, theirs = make(name, tmp_path)
    ours = vitjax.load(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        out = theirs(x, output_hidden_states=True)
    apply = jax.jit(lambda p, x: ours.model.apply(p, x, intermediates=True))
    mine = apply(ours.params, jnp.asarray(images))
    hidden = [h.numpy().transpose(0, 2, 3, 1) for h in out.hidden_states]
    assert len(hidden) == len(mine["stages"]) == 4
    for index, (a, b) in enumerate(zip(mine["stages"], hidden, strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"stage {index}")
    if "headless" in name:
        wanted = out.pooler_output.numpy().reshape(2, -1)
        np.testing.assert_allclose(mine["embedding"], wanted, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(mine["logits"], out.logits.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bit", "bit headless", "convnext", "convnext headless"])
def test_what_was_read_is_written_with_the_same_bits(name, tmp_path):
    _, theirs = make(name, tmp_path / "theirs")  # which skips where transformers is not installed
    from safetensors.numpy import load_file

    vitjax.load(tmp_path / "theirs").save(tmp_path / "ours", format="hf")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].tobytes() == after[key].tobytes(), key
    _, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info


# Parameters by timm 1.0.31; billions of multiply-accumulates by the paper.
PUBLISHED = [
    ("T", 28_589_128, 4.5), ("S", 50_223_688, 8.7),
    ("B", 88_591_464, 15.4), ("L", 197_767_336, 34.4),
]  # fmt: skip


@pytest.mark.parametrize(("size", "params", "gmacs"), PUBLISHED)
def test_convnext_is_counted_as_published(size, params, gmacs):
    model = convnext(image_size=224, channels=3, num_classes=1000, size=size)
    assert model.num_params == convnext_lib.count_params(plan_of(model), True) == params
    assert model.flops_per_image / 2e9 == pytest.approx(gmacs, abs=0.051)


@pytest.mark.parametrize(
    ("depth", "factor", "params"),
    [(50, 1, 25_549_352), (101, 1, 44_541_480), (50, 3, 217_319_080), (152, 4, 936_533_224)],
)
def test_bit_is_counted_as_published(depth, factor, params):
    options = {"depth": depth, "width_factor": factor}
    model = bit(image_size=224, channels=3, num_classes=1000, **options)
    assert model.num_params == bit_lib.count_params(plan_of(model)) == params


def test_flops_are_those_of_the_compiler():
    for model in (
        bit(image_size=128, **SMALL, blocks=(1, 1), widths=(256, 512), root_width=64),
        convnext(image_size=128, **SMALL, blocks=(1, 2), widths=(64, 128)),
        vit(image_size=128, **SMALL, width=64, depth=1, mlp_dim=128, num_heads=2, patch_size=16,
            stem="conv", scan=False),
        vit(image_size=128, **SMALL, width=64, depth=1, mlp_dim=128, num_heads=2, patch_size=16,
            stem="resnet", stem_blocks=(1, 1), scan=False),
    ):  # fmt: skip
        lowered = jax.jit(lambda p, x, m=model: m.apply(p, x)["logits"]).lower(
            model.abstract_params, jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
        )
        # XLA leaves out products with padding, and counts norms and standardisation.
        assert 0.95 < lowered.cost_analysis()["flops"] / model.flops_per_image < 1.2


def test_standardised_kernels_and_group_norm():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 6)) * 3 + 2
    for how in ("variance", "deviation"):
        found = standardise(kernel, how)
        np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(found.std((0, 1, 2)), 1, rtol=1e-4)
    torch = pytest.importorskip("torch", reason="needs torch")
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 12)).astype(np.float32) * 4 + 1
    norm = GroupNorm(12, precision=Precision(), eps=1e-5, groups=3)
    theirs = torch.nn.functional.group_norm(torch.from_numpy(x.transpose(0, 3, 1, 2)), 3, eps=1e-5)
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5
    )


def test_google_s_bit_file_has_its_published_names(tmp_path):
    model = bit(image_size=32, **SMALL, blocks=(3, 4, 6, 3), widths=(128, 256, 512, 1024),
                root_width=32)  # fmt: skip
    names = {
        "resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 32),
        "resnet/block1/unit01/a/proj/standardized_conv2d/kernel": (1, 1, 32, 128),
        "resnet/block1/unit01/a/group_norm/gamma": (32,),
        "resnet/block1/unit03/b/standardized_conv2d/kernel": (3, 3, 32, 32),
        "resnet/block3/unit06/c/group_norm/beta": (128,),
        "resnet/block4/unit03/c/standardized_conv2d/kernel": (1, 1, 256, 1024),
        "resnet/group_norm/gamma": (1024,),
        "resnet/head/conv2d/kernel": (1, 1, 1024, 5),
        "resnet/head/conv2d/bias": (5,),
    }
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        model.abstract_params,
    )
    vision = as_vision(model, params, {"target": "vitjax.models.bit:bit"} | {
        "blocks": (3, 4, 6, 3), "widths": (128, 256, 512, 1024), "root_width": 32, "num_classes": 5,
    }, 32)  # fmt: skip
    vision.save(tmp_path / "a.npz", format="npz")
    with np.load(tmp_path / "a.npz") as written:
        assert len(written.files) == len(jax.tree.leaves(params)) == 1 + 16 * 9 + 4 + 4
        for name, shape in names.items():
            assert written[name].shape == shape, name
    again = vitjax.load(tmp_path / "a.npz")
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(again.logits(images), vision.logits(images))


def as_vision(model, params, block, size):
    import dataclasses

    from vitjax.data.preprocess import Preprocess
    from vitjax.inference import VisionModel

    contract = {
        "model": block, "preprocess": dataclasses.asdict(Preprocess(size)), "class_names": None,
        "loss_type": "softmax", "precision": {}, "description": {},
    }  # fmt: skip
    return VisionModel(model, params, contract)


class StdConv(nn.Conv):
    """As the hybrid's code has it: the kernel is standardised as it is used."""

    def param(self, name, *arguments, **options):
        value = super().param(name, *arguments, **options)
        if name != "kernel":
            return value
        value = value - value.mean((0, 1, 2), keepdims=True)
        return value / (value.std((0, 1, 2), keepdims=True) + 1e-5)


class LinenUnit(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(y, features, size, stride, name):
            return StdConv(features, (size, size), (stride, stride), use_bias=False, name=name)(y)

        shortcut, wide = x, 4 * self.features
        if x.shape[-1] != wide or self.stride != 1:
            shortcut = nn.GroupNorm(name="gn_proj")(conv(x, wide, 1, self.stride, "conv_proj"))
        y = nn.relu(nn.GroupNorm(name="gn1")(conv(x, self.features, 1, 1, "conv1")))
        y = nn.relu(nn.GroupNorm(name="gn2")(conv(y, self.features, 3, self.stride, "conv2")))
        return nn.relu(shortcut + nn.GroupNorm(name="gn3")(conv(y, wide, 1, 1, "conv3")))


class LinenStage(nn.Module):
    features: int
    count: int
    stride: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            stride = self.stride if i == 0 else 1
            x = LinenUnit(self.features, stride, name=f"unit{i + 1}")(x)
        return x


class LinenHybrid(nn.Module):
    """R+ViT as vision_transformer writes it, around the Transformer of test_interop_npz."""

    blocks: tuple[int, ...]
    patch: int

    @nn.compact
    def __call__(self, images):
        from test_interop_npz import WIDTH, Encoder

        x = StdConv(32, (7, 7), (2, 2), use_bias=False, name="conv_root")(images)
        x = nn.relu(nn.GroupNorm(name="gn_root")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, count in enumerate(self.blocks):
            x = LinenStage(32 * 2**i, count, 2 if i else 1, name=f"block{i + 1}")(x)
        window = (self.patch, self.patch)
        x = nn.Conv(WIDTH, window, window, padding="VALID", name="embedding")(x)
        x = x.reshape(len(x), -1, WIDTH)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], WIDTH))
        x = Encoder(name="Transformer")(x)
        return nn.Dense(5, name="head")(x[:, 0])


@pytest.mark.parametrize(("blocks", "patch"), [((1, 2), 1), ((), 2)], ids=str)
def test_hybrids_are_read_from_npz_with_the_numbers_of_linen(blocks, patch, tmp_path):
    import re

    from test_interop_npz import RENAMED

    model = LinenHybrid(blocks, patch)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    with jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(1), images)["params"]
        keys = iter(jax.random.split(jax.random.key(2), 100))
        params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.3, params)
        wanted = model.apply({"params": params}, images)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for old, new in RENAMED.items():
        flat = {re.sub(rf"(block_\d+)/{old}/", rf"\1/{new}/", n): v for n, v in flat.items()}
    flat["Transformer/posembed_input/pos_embedding"] = flat.pop("pos_embedding")
    np.savez(tmp_path / "a.npz", **{n: np.asarray(v) for n, v in flat.items()})
    ours = vitjax.load(tmp_path / "a.npz")
    assert ours.config["patch_size"] == 8 and ours.config["stem_blocks"] == blocks
    found = ours.logits(np.asarray(images), preprocessed=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    ours.save(tmp_path / "b.npz", format="npz")
    with np.load(tmp_path / "b.npz") as written:
        assert set(written.files) == set(flat)
        for name, value in flat.items():
            np.testing.assert_array_equal(written[name], np.asarray(value), err_msg=name)


# family, size: parameters with a head of 1,000 classes by timm 1.0.31 (0: without)
HYBRIDS = {
    ("S/32", (2, 2, 2, 2), 1000): 36_431_912,
    ("B/16", (3, 4, 9), 0): 97_890_112,
    ("L/32", (3, 4, 6, 3), 1000): 328_994_856,
    ("Ti/16", (), 1000): None,
}


@pytest.mark.parametrize("key", HYBRIDS, ids=str)
def test_hybrids_and_convolutional_stems_are_counted(key):
    size, blocks, classes = key
    options = {"shape": size, "image_size": 224, "channels": 3, "pool": "cls"}
    model = vit(**options, num_classes=classes, stem="resnet", stem_blocks=blocks)
    geometry = dict(model.arguments)["geometry"]
    assert sum(shapes.count_params(geometry).values()) == model.num_params
    assert HYBRIDS[key] in (None, model.num_params)
    model = vit(**options, num_classes=classes, stem="conv")
    geometry = dict(model.arguments)["geometry"]
    assert sum(shapes.count_params(geometry).values()) == model.num_params


def tiny(target):
    return {
        "vitjax.models.bit:bit": {
            "blocks": (1, 1), "widths": (32, 64), "root_width": 8, "groups": 8,
        },
        "vitjax.models.convnext:convnext": {
            "size": None, "blocks": (1, 1), "widths": (16, 32), "patch_size": 2, "layer_scale": 0.1,
        },
    }[target]  # fmt: skip


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("target", ["vitjax.models.bit:bit", "vitjax.models.convnext:convnext"])
def test_the_trainer_takes_them(target, num_devices, make_config):
    config = make_config()
    block = ConfigDict({"target": target, "num_classes": 10, **tiny(target)})
    config.unlock()
    config.model = block
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    exp = experiment.build(config, devices=jax.devices()[:num_devices])
    train_state = exp.fresh_state()
    before = jax.tree.map(np.asarray, train_state.params)
    step, rng = exp.compile(), np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (32, 8, 8, 1)).astype(np.uint8),
        "labels": rng.integers(0, 10, 32).astype(np.int32),
    }
    batch = {k: jax.device_put(v, exp.abstract_batch[k].sharding) for k, v in batch.items()}
    losses = []
    for _ in range(4):
        train_state, metrics = step(train_state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    changed = jax.tree.map(
        lambda a, b: bool((a != np.asarray(b)).any()), before, train_state.params
    )
    assert all(jax.tree.leaves(changed)), changed
    assert state.tree_bytes(train_state.params) == 4 * exp.model.num_params


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_programs_of_convolutional_models(format, tmp_path):
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    blocks = {
        "vitjax.models.bit:bit": BIT, "vitjax.models.convnext:convnext": CONVNEXT,
        "vitjax.models.vit:vit": {
            "width": 32, "depth": 1, "mlp_dim": 32, "num_heads": 2, "patch_size": 8,
            "stem": "resnet", "stem_blocks": (1, 1), "stem_width": 32,
        },
    }  # fmt: skip
    images = np.random.default_rng(0).normal(size=(7, 32, 32, 3)).astype(np.float32)
    for target, options in blocks.items():
        function = {"bit": bit, "convnext": convnext, "vit": vit}[target.split(":")[1]]
        model = function(image_size=32, **SMALL, **options)
        keys = iter(jax.random.split(jax.random.key(0), 100))
        params = jax.tree.map(
            lambda x, keys=keys: jax.random.normal(next(keys), x.shape) * 0.3, model.abstract_params
        )
        vision = as_vision(model, params, {"target": target, "num_classes": 5, **options}, 32)
        path = tmp_path / f"{target.split(':')[1]}.{format}"
        vision.save(path, format=format)
        for batch in (images, images[:1]):
            if format == "onnx":
                (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"images": batch})
            else:
                found = jax.export.deserialize(bytearray(path.read_bytes())).call(batch)
            wanted = vision.logits(batch, preprocessed=True)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=target)


def test_stochastic_depth_drops_whole_examples():
    model = convnext(image_size=32, **SMALL, **CONVNEXT, drop_path_rate=0.9)
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    images = jnp.tile(jax.random.normal(jax.random.key(1), (1, 32, 32, 3)), (16, 1, 1, 1))
    still = model.apply(params, images)["embedding"]
    np.testing.assert_allclose(still, jnp.tile(still[:1], (16, 1)), atol=1e-4)
    dropped = np.asarray(model.apply(params, images, jax.random.key(2))["embedding"])
    assert len(np.unique(dropped.round(3), axis=0)) > 2


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (bit, {"depth": 34}, "unknown model.depth 34"),
        (bit, {"blocks": (1, 1), "widths": (32,)}, "make no network"),
        (bit, {"blocks": (1,), "widths": (40,)}, "groups=32 must divide"),
        (convnext, {"size": "M"}, "unknown model.size 'M'"),
        (convnext, {"size": "T", "activation": "mish"}, "unknown model.activation 'mish'"),
        (convnext, {"size": "T", "drop_path_rate": 1.0}, "drop_path_rate must be in"),
        (vit, {"shape": "B/14", "stem": "conv"}, 'stem="conv" needs a patch size'),
        (vit, {"shape": "B/14", "stem": "resnet"}, "must be a multiple of the ResNet's stride"),
        (vit, {"shape": "B/16", "stem": "inception"}, "unknown model.stem 'inception'"),
    ],
)
def test_numbers_that_make_no_network(function, options, message):
    with pytest.raises(InputError, match=message):
        function(image_size=224, **SMALL, **options)


def test_a_bit_with_other_settings_is_refused(tmp_path):
    import json

    make("bit", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_type": "bottleneck"}))
    with pytest.raises(InputError, match="layer_type='bottleneck' is not supported"):
        vitjax.load(tmp_path)
