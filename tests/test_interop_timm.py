"""timm's models: read, compared block by block, written back, and loaded there again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax.errors import InputError
from vitjax.interop.files import open_weights, write_safetensors

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
    "siglip": ("vit_so400m_patch14_siglip_224", DYNAMIC | {"act_layer": "gelu_tanh"}),
    "clip": ("vit_base_patch16_clip_224", DYNAMIC | {"pre_norm": True}),
    "openai's clip": ("vit_base_patch16_clip_quickgelu_224", DYNAMIC | {"pre_norm": True}),
    "norms on queries and keys": ("vit_base_patch16_224", DYNAMIC | {"qk_norm": True}),
    "no biases on queries": ("vit_base_patch16_224", DYNAMIC | {"qkv_bias": False}),
}  # fmt: skip
PEER = Path(__file__).parent / "timm_peer.py"


def peer(mode, cases, images):
    """Runs timm where there is one: $VITJAX_TIMM_PATH is put before its search path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.environ.get("VITJAX_TIMM_PATH", "")
    pytest.importorskip("torch", reason="needs torch")
    has = subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; assert u.find_spec('timm')"],
        env=environment, capture_output=True,
    )  # fmt: skip
    if has.returncode:
        pytest.skip("needs timm, or VITJAX_TIMM_PATH, a folder that holds it")
    done = subprocess.run(
        [sys.executable, str(PEER), mode, json.dumps(cases), str(images)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
        name: {
            "folder": str(folder / str(number)), "architecture": architecture,
            "arguments": arguments, "dynamic": "dynamic_img_size" in arguments,
        }
        for number, (name, (architecture, arguments)) in enumerate(MODELS.items())
    }  # fmt: skip
    peer("make", list(cases.values()), images)
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


@pytest.mark.parametrize("name", MODELS)
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
    "no biases": {"pool": "gap", "norm_bias": False, "patch_bias": False, "qkv_bias": False},
    "projection": {"pool": "cls", "pre_norm": True, "projection_dim": 6, "num_classes": 0,
                   "patch_bias": False},
}  # fmt: skip


def test_timm_loads_what_is_exported(made, native, images, tmp_path):
    """What came from timm, and what is ours alone: the same logits there."""
    folders = {}
    for name in MODELS:
        folders[name] = vitjax.load(made[name])
    for name, options in NATIVE.items():
        folders[f"ours: {name}"] = native(size=20, **options)
    cases = []
    for number, vision in enumerate(folders.values()):
        vision.save(tmp_path / str(number), format="timm")
        cases.append({"folder": str(tmp_path / str(number))})
    peer("load", cases, images)
    for number, (name, vision) in enumerate(folders.items()):
        print(name)
        with np.load(tmp_path / f"{number}.npz") as found, np.load(images) as given:
            has_head = vision.config["num_classes"]
            wanted = (vision.logits if has_head else vision.embed)(
                given["native"], preprocessed=True
            )
            np.testing.assert_allclose(
                found["native/logits"], wanted, rtol=1e-4, atol=1e-4, err_msg=name
            )


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
        ({"pool": "cls", "projection_dim": 8}, "model.projection_dim=8"),
    ],
    ids=str,
)
def test_what_timm_has_no_word_for_is_named(options, words, native, tmp_path):
    with pytest.raises(InputError) as error:
        native(**options).save(tmp_path / "x", format="timm")
    assert words in str(error.value) and "nothing was written" in str(error.value)
    assert not (tmp_path / "x").exists()
