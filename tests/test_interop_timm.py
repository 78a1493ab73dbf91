"""timm's models: read, compared block by block, written back, and loaded there again."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timm_peer import run_peer

import vitjax
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.inference import VisionModel
from vitjax.interop import timm
from vitjax.interop.contents import Source
from vitjax.interop.files import WeightFile, open_weights, write_safetensors
from vitjax.interop.weight_file import StoredArray

TINY = {"img_size": 20, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "num_classes": 5}  # fmt: skip
DYNAMIC = TINY | {"dynamic_img_size": True}
MODELS = {
    "vit": ("vit_base_patch16_224", DYNAMIC),
    "mean and a norm after it, as MAE is tuned": (
        "vit_base_patch16_224", DYNAMIC | {"global_pool": "avg", "fc_norm": True},
    ),
    "mean without class token": (
        "vit_base_patch16_224",
        DYNAMIC | {"global_pool": "avg", "fc_norm": False, "class_token": False},
    ),
    "deit3": ("deit3_small_patch16_224", DYNAMIC | {"init_values": 0.1}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", DYNAMIC | {"init_values": 0.1}),
    "registers with positions": (
        "vit_base_patch16_224", DYNAMIC | {"reg_tokens": 3, "no_embed_class": False},
    ),
    "dinov2 g": ("vit_giant_patch14_dinov2", DYNAMIC | {"init_values": 0.1}),
    "siglip": ("vit_so400m_patch14_siglip_224", DYNAMIC),
    "siglip 2": ("vit_so400m_patch16_siglip_256", DYNAMIC),
    "siglip, given another activation": (
        "vit_so400m_patch14_siglip_224", DYNAMIC | {"act_layer": "relu"},
    ),
    "attention over class and register tokens too": (
        "vit_base_patch16_224",
        DYNAMIC | {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True,
                   "fc_norm": False},
    ),
    "no positions": ("vit_base_patch16_224", DYNAMIC | {"pos_embed": "none"}),
    "clip": ("vit_base_patch16_clip_224", DYNAMIC | {"pre_norm": True}),
    "openai's clip": ("vit_base_patch16_clip_quickgelu_224", DYNAMIC | {"pre_norm": True}),
    "norms on queries and keys": ("vit_base_patch16_224", DYNAMIC | {"qk_norm": True}),
    "no biases on queries": ("vit_base_patch16_224", DYNAMIC | {"qkv_bias": False}),
}  # fmt: skip
ROTARY = {
    "dinov3": (
        "vit_small_patch16_dinov3_qkvb", DYNAMIC | {"global_pool": "token", "init_values": 0.1},
    ),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", DYNAMIC | {"rope_temperature": 50.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    draw = np.random.default_rng(0).normal
    arrays = {"native": (2, 20, 20, 3), "wide": (2, 12, 28, 3)}
    np.savez(path, **{n: draw(size=shape).astype(np.float32) for n, shape in arrays.items()})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, images):
    """Folders that timm saved, by name, with its outputs in them."""
    folder = tmp_path_factory.mktemp("timm")
    cases = {
        name: {"folder": str(folder / str(i)), "architecture": model, "arguments": arguments}
        for i, (name, (model, arguments)) in enumerate((MODELS | ROTARY).items())
    }
    run_peer("make", list(cases.values()), images)
    return {name: Path(case["folder"]) for name, case in cases.items()}


def check(ours, folder, images):
    """Blocks, tokens and logits, at each size that was computed there."""
    with np.load(f"{folder}.npz") as wanted, np.load(images) as given:
        apply = jax.jit(lambda p, x: ours.model.apply(p, x, intermediates=True))
        sizes = {name.split("/")[0] for name in wanted.files}
        for size in sorted(sizes):
            mine = apply(ours.params, jnp.asarray(given[size]))
            found = {f"block{i}": x for i, x in enumerate(mine["blocks"]["output"])}
            found |= {"tokens": mine["tokens"], "logits": mine.get("logits", mine["embedding"])}
            for name, value in found.items():
                np.testing.assert_allclose(
                    value, wanted[f"{size}/{name}"], rtol=1e-4, atol=1e-4, err_msg=f"{size} {name}"
                )


@pytest.mark.parametrize("name", MODELS | ROTARY)
def test_every_block_equals_timm_s(name, made, images):
    check(vitjax.load(made[name]), made[name], images)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written_with_the_same_bits(name, made, tmp_path):
    vitjax.load(made[name]).save(tmp_path / "out", format="timm")
    before, after = open_weights(made[name]), open_weights(tmp_path / "out")
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)


NATIVE = {
    "mean": {"pool": "gap"},
    "fixed positions": {"pool": "gap", "positions": "sincos2d"},
    "class token": {"pool": "cls", "eps": 1e-5},
    "attention": {"pool": "map"},
    "all": {"pool": "cls", "num_registers": 2, "layer_scale": 0.3, "position_prefix": "none",
            "mask_token": True, "mlp": "gated", "activation": "silu"},
    "registers": {"pool": "cls", "num_registers": 2},
    "registers alone": {"pool": "gap", "num_registers": 2},
    "attention, registers": {"pool": "map", "num_registers": 2, "cls_token": True},
    "two class tokens": {"pool": "cls", "distill_token": True, "distill_head": True,
                         "position_prefix": "none"},
    "no positions": {"pool": "gap", "positions": "none"},
    "table of another size": {"pool": "cls", "table_size": 16, "activation": "relu"},
    "a width of the MLP that is no multiple": {"pool": "map", "mlp_dim": 49},
    "no biases": {"pool": "gap", "norm_bias": False, "patch_bias": False, "qkv_bias": False},
    "projection": {"pool": "cls", "pre_norm": True, "projection_dim": 6, "num_classes": 0,
                   "patch_bias": False},
}  # fmt: skip


def test_timm_loads_what_is_exported(made, native, images, tmp_path):
    """What came from timm, and what is ours alone: the same logits there."""
    visions = {name: vitjax.load(made[name]) for name in MODELS}
    visions |= {f"ours: {name}": native(size=20, **options) for name, options in NATIVE.items()}
    folders = {name: tmp_path / str(number) for number, name in enumerate(visions)}
    for name, vision in visions.items():
        vision.save(folders[name], format="timm")
    run_peer("load", [{"folder": str(folder)} for folder in folders.values()], images)
    given = np.load(images)["native"]
    for name, vision in visions.items():
        if name in MODELS:
            wanted = np.load(f"{made[name]}.npz")["native/logits"]
        else:
            function = vision.logits if vision.config["num_classes"] else vision.embed
            wanted = function(given, preprocessed=True)
        found = np.load(f"{folders[name]}.npz")["native/logits"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_timm_prepares_images_as_we_do(native, images, tmp_path):
    vision, contracts = native(size=20), {}
    for resize, crop in (("shorter_side", 0.875), ("squash", 1.0)):
        contracts[resize] = mine = Preprocess(
            20, 3, resize=resize, crop_fraction=crop, interpolation="bicubic",
            mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.125),
        )  # fmt: skip
        changed = vision.contract | {"preprocess": dataclasses.asdict(mine)}
        folder = tmp_path / resize
        VisionModel(vision.model, vision.params, changed).save(folder, format="timm")
        assert vitjax.load(folder).preprocess == mine
    run_peer("load", [{"folder": str(tmp_path / resize)} for resize in contracts], images)
    for resize, mine in contracts.items():
        assert json.loads((tmp_path / f"{resize}.json").read_text()) == {
            "input_size": [3, 20, 20], "mean": list(mine.mean), "std": list(mine.std),
            "interpolation": "bicubic", "crop_pct": mine.crop_fraction,
            "crop_mode": "squash" if resize == "squash" else "center",
        }  # fmt: skip


# An architecture for each default that its name alone decides.
ARCHITECTURES = (
    "vit_base_patch16_224", "vit_base_patch16_gap_224", "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_gap_384",
    "vit_large_patch16_siglip_512", "vit_large_patch16_siglip_gap_512",
    "vit_so400m_patch14_siglip_378", "vit_so400m_patch16_siglip_gap_256",
    "vit_giantopt_patch16_siglip_256", "vit_giant_patch14_reg4_dinov2",
    "vit_giant_patch14_clip_224", "vit_medium_patch16_clip_224",
    "vit_large_patch14_clip_quickgelu_224", "vit_little_patch16_reg4_gap_256",
    "vit_huge_patch14_gap_224", "vit_so400m_patch14_reg1_tipsv2", "deit3_medium_patch16_224",
    "deit_small_distilled_patch16_224", "eva_large_patch14_196",
    "vit_huge_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3",
)  # fmt: skip
REFUSED = {
    "vit_base_patch16_rpn_224": "architecture='vit_base_patch16_rpn_224' has no counterpart",
    "vit_so150m_patch16_reg4_map_256": "pool_include_prefix=False",
    "vit_pe_core_base_patch16_224": "class Eva",
    "vit_base_patch16_rope_reg1_gap_256": "class Eva",
    "vit_base_patch16_lingbot": "class Eva",
    "aimv2_large_patch14_224": "an MLP without blocks.0.mlp.fc1.weight",
}


def test_defaults_of_timm_s_architectures(images, tmp_path):
    """A config without model_args, as timm's own are: heads, activation, epsilon, pooling."""
    names = (*ARCHITECTURES, *REFUSED)
    run_peer("facts", [{"folder": str(tmp_path / n), "architecture": n} for n in names], images)
    activations = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu",
                   "SiLU": "silu"}  # fmt: skip
    for name in names:
        about = json.loads((tmp_path / f"{name}.json").read_text())
        arrays = {
            n: StoredArray(tuple(s), np.dtype("float32"), lambda out: None)
            for n, s in about["shapes"].items()
        }
        config = {"architecture": name, "global_pool": about["global_pool"]}
        source = Source(
            tmp_path, WeightFile(tmp_path, "safetensors", 0, arrays),
            config | {"pretrained_cfg": about["pretrained_cfg"]}, {},
        )  # fmt: skip
        if name in REFUSED:
            with pytest.raises(InputError, match=REFUSED[name]):
                timm.describe(source)
            continue
        found = timm.describe(source)
        wanted = {
            "num_heads": about["num_heads"], "activation": activations[about["activation"]],
            "eps": about["eps"][0], "pool": timm.POOLS[about["global_pool"]],
        }  # fmt: skip
        assert len(about["eps"]) == 1 and wanted == {k: found.model[k] for k in wanted}, name
        table = {n.format(i=0) for leaf in found.leaves for n in leaf.names}
        assert table == {n for n in arrays if not n.startswith("blocks.") or ".0." in n[:9]}, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_layer": "rmsnorm"}, "norm_layer='rmsnorm' has no counterpart"),
        ({"global_pool": "avgmax"}, "global_pool='avgmax' has no counterpart"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix=True for"),
        ({"act_layer": "mish"}, "act_layer='mish' has no counterpart"),
        ({"img_size": [16, 25]}, "is not square"),
    ],
    ids=str,
)
def test_arguments_without_a_counterpart_are_refused(change, words, made, tmp_path):
    folder = made["vit"]
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match=words):
        vitjax.load(tmp_path)


def test_dinov3_without_its_config_is_refused(made, tmp_path):
    (tmp_path / "bare.safetensors").symlink_to(made["dinov3"] / "model.safetensors")
    with pytest.raises(InputError, match=r"class Eva \(architecture: not given.*Hugging Face"):
        vitjax.load(tmp_path / "bare.safetensors")


def test_a_bare_state_dict_says_what_it_cannot_hold(made, images, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    weights = open_weights(made["vit"])
    entries = [(n, s, "float32", lambda n=n: weights[n]) for n, s in weights.shapes.items()]
    write_safetensors(tmp_path / "bare.safetensors", entries)
    wrapped = {f"module.{name}": torch.from_numpy(weights[name]) for name in weights}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "checkpoint.pth")
    for name in ("bare.safetensors", "checkpoint.pth"):
        with pytest.raises(InputError, match=r"how many heads.*--model\.num_heads=N"):
            vitjax.load(tmp_path / name)
        ours = vitjax.load(tmp_path / name, model={"num_heads": 2})
        check(ours, made["vit"], images)
        notes = " ".join(ours.report.notes)
        for words in ("pooled: 'cls'", "activation: exact GELU", "ImageNet's mean"):
            assert words in notes


def test_mae_s_reference_file_is_read(made, images, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    weights = open_weights(made["vit"])
    state = {n: torch.from_numpy(weights[n]) for n in weights if not n.startswith("head")}
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 32)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    ours = vitjax.load(tmp_path / "mae.pth", model={"num_heads": 2})
    assert set(ours.report.unused.values()) == {"the decoder of masked images"}
    with np.load(f"{made['vit']}.npz") as wanted, np.load(images) as given:
        found = ours.tokens(given["native"], preprocessed=True)
        np.testing.assert_allclose(found, wanted["native/tokens"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": True}, "model.parallel=True"),
        ({"pool": "cls", "positions": "rope"}, "model.positions='rope'"),
        ({"pool": "cls_gap"}, "model.pool='cls_gap'"),
        ({"pool": "cls", "pre_logits_dim": 8}, "model.pre_logits_dim=8"),
        ({"eps": 1e-3}, "model.eps=0.001"),
        ({"qk_norm": True}, "model.qk_norm_bias=False"),
        ({"mlp": "gated", "activation": "gelu"}, "model.mlp='gated' with activation='gelu'"),
        ({"mlp": "gated", "activation": "silu", "pool": "map"}, "pool='map'"),
        ({"pool": "cls", "distill_token": True}, "model.distill_token=True"),
        (
            {"pool": "cls", "distill_token": True, "distill_head": True, "num_registers": 2},
            "model.distill_token=True",
        ),
        (
            {"pool": "gap", "cls_token": True, "distill_token": True, "distill_head": True},
            "model.distill_token=True",
        ),
        ({"pool": "cls", "projection_dim": 8}, "model.projection_dim=8"),
    ],
    ids=str,
)
def test_what_timm_has_no_word_for_is_named(options, words, native, tmp_path):
    with pytest.raises(InputError) as error:
        native(**options).save(tmp_path / "x", format="timm")
    assert words in str(error.value) and "nothing was written" in str(error.value)
    assert not (tmp_path / "x").exists()
