"""Programs with their weights inside: StableHLO and ONNX, run without vitjax."""

import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.interop import stablehlo

VARIANTS = {
    "mean, scanned": {},
    "unrolled": {"scan": False, "activation": "gelu"},
    "class token, LayerScale, registers": {
        "pool": "cls", "layer_scale": 0.3, "num_registers": 2, "mask_token": True,
    },
    "rotary, gated": {
        "pool": "cls", "positions": "rope", "mlp": "gated", "activation": "silu", "key_bias": False,
    },
    "attention pooling, fixed positions": {"pool": "map", "positions": "sincos2d"},
    "22B": {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False},
    "CLIP": {
        "pool": "cls", "pre_norm": True, "patch_bias": False, "projection_dim": 6,
        "activation": "quick_gelu", "num_classes": 0,
    },
    "distilled": {"pool": "cls", "distill_token": True, "distill_head": True},
    "resampled positions": {"pool": "cls_gap", "table_size": 24},
    "first ViT": {"pool": "cls", "pre_logits_dim": 7, "num_classes": 0},
}  # fmt: skip

# What a user of the files does, in a process that cannot import vitjax.
PROGRAM = """
import sys
sys.modules["vitjax"] = None
import jax, numpy as np
given = np.load(sys.argv[1])
for path in sys.argv[2:]:
    call = jax.export.deserialize(bytearray(open(path, "rb").read())).call
    np.savez(path + ".npz", **{name: call(given[name]) for name in given.files})
"""


def batches(channels=3):
    draw = np.random.default_rng(0).normal
    return {f"b{n}": draw(size=(n, 16, 16, channels)).astype(np.float32) for n in (1, 7)}


def wanted(vision, name, images):
    has_head = vision.config["num_classes"]
    return (vision.logits if has_head else vision.embed)(images, preprocessed=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_gives_the_same_numbers(variant, native, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    vision = native(**VARIANTS[variant])
    vision.save(tmp_path / "m.onnx", format="onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for images in batches().values():
        (found,) = session.run(None, {"images": images})
        np.testing.assert_allclose(found, wanted(vision, variant, images), rtol=1e-4, atol=1e-4)
    weights = sum(x.nbytes for x in jax.tree.leaves(vision.params))
    assert (tmp_path / "m.onnx").stat().st_size < 1.3 * weights + 60_000  # none is there twice


def test_stablehlo_gives_the_same_numbers_without_vitjax(native, tmp_path):
    """One process for all variants: starting JAX takes longer than the rest."""
    visions = {}
    for number, (variant, options) in enumerate(VARIANTS.items()):
        visions[variant] = native(**options)
        visions[variant].save(tmp_path / f"{number}.stablehlo", format="stablehlo")
    np.savez(tmp_path / "images.npz", **batches())
    files = [str(tmp_path / f"{n}.stablehlo") for n in range(len(VARIANTS))]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "images.npz"), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file, (variant, vision) in zip(files, visions.items(), strict=True):
        with np.load(f"{file}.npz") as found:
            for name, images in batches().items():
                np.testing.assert_allclose(
                    found[name], wanted(vision, variant, images), rtol=1e-4, atol=1e-4,
                    err_msg=f"{variant}, {name}",
                )  # fmt: skip


def test_one_file_is_for_every_platform_and_batch(native, tmp_path):
    native().save(tmp_path / "m.stablehlo", format="stablehlo")
    exported = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[0].shape) == "(b, 16, 16, 3)"
    assert exported.out_avals[0].dtype == np.float32


def test_an_unknown_layout_falls_back_to_jax_s_own(native, tmp_path, monkeypatch, caplog):
    vision = native(pool="cls")
    monkeypatch.setattr(stablehlo, "HEADER", b"another version")
    with caplog.at_level(logging.WARNING, "vitjax"):
        vision.save(tmp_path / "m.stablehlo", format="stablehlo")
    assert "needs more memory" in caplog.text
    call = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes())).call
    images = batches()["b7"]
    np.testing.assert_allclose(call(images), vision.logits(images, preprocessed=True), atol=1e-5)


@pytest.mark.parametrize("format", ["stablehlo", "onnx"])
def test_half_precision_weights_stay_half(format, native, tmp_path):
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    vision, images = native(), batches()["b7"]
    paths = [tmp_path / f"{dtype}.{format}" for dtype in ("float32", "bfloat16")]
    for path in paths:
        vision.save(path, format=format, dtype=path.stem)
    weights = sum(x.nbytes for x in jax.tree.leaves(vision.params))
    saved = paths[0].stat().st_size - paths[1].stat().st_size
    assert 0.4 * weights < saved < 0.6 * weights
    if format == "onnx":
        (found,) = onnxruntime.InferenceSession(str(paths[1])).run(None, {"images": images})
    else:
        found = jax.export.deserialize(bytearray(paths[1].read_bytes())).call(images)
    np.testing.assert_allclose(found, vision.logits(images, preprocessed=True), atol=0.2)


def test_weights_beyond_two_gigabytes(native, tmp_path, monkeypatch):
    """StableHLO's container ends there, and says so; ONNX keeps them in a second file."""
    from vitjax.interop import onnx as onnx_format

    monkeypatch.setattr(stablehlo, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match=r"do not fit into a StableHLO file.*bfloat16"):
        native().save(tmp_path / "m.stablehlo", format="stablehlo")
    assert not list(tmp_path.iterdir())
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    monkeypatch.setattr(onnx_format, "MAX_BYTES", 1000)
    vision, images = native(), batches()["b1"]
    vision.save(tmp_path / "m.onnx", format="onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "m.md"}
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"images": images})
    np.testing.assert_allclose(found, vision.logits(images, preprocessed=True), atol=1e-4)


def test_without_onnx_the_package_is_named(native, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'vitjax\[onnx\]'"):
        native().save(tmp_path / "m.onnx", format="onnx")
    assert not list(tmp_path.iterdir())
