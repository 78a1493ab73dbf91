"""OpenCLIP's towers, its own and those that timm makes for it, against OpenCLIP itself."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timm_peer import run_peer

import vitjax
from vitjax.errors import InputError

TOWER = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 20}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
PLAIN = {"embed_dim": 8, "vision_cfg": TOWER, "text_cfg": TEXT}


def trunk(name, pool, proj):
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 20}
    return {"embed_dim": 128 if proj == "none" else 8, "vision_cfg": vision, "text_cfg": TEXT}


MODELS = {
    "openai's": PLAIN | {"quick_gelu": True},
    "laion's": PLAIN | {"vision_cfg": TOWER | {"ls_init_value": 0.1, "mlp_ratio": 1.53}},
    "clipa": PLAIN | {
        "vision_cfg": TOWER
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True,
           "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
    },
    "siglip": trunk("vit_base_patch16_siglip_224", "map", "none"),
    "siglip 2": trunk("vit_so400m_patch16_siglip_256", "map", "none"),
    "timm's with a projection": trunk("vit_base_patch16_224", "token", "linear"),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, native=np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, images):
    """Folders that OpenCLIP saved, by name, with its outputs beside them."""
    folder = tmp_path_factory.mktemp("openclip")
    cases = {n: {"folder": str(folder / str(i)), "config": c} for i, (n, c) in
             enumerate(MODELS.items())}  # fmt: skip
    run_peer("openclip", list(cases.values()), images, needs="open_clip")
    return {name: Path(case["folder"]) for name, case in cases.items()}


def check(ours, folder, images):
    with np.load(f"{folder}.npz") as wanted, np.load(images) as given:
        apply = jax.jit(lambda p, x: ours.model.apply(p, x, intermediates=True))
        mine = apply(ours.params, jnp.asarray(given["native"]))
        found = {f"block{i}": x for i, x in enumerate(mine["blocks"]["output"])}
        found["embedding"] = mine["embedding"]
        assert {f"native/{name}" for name in found} == set(wanted.files)
        for name, value in found.items():
            np.testing.assert_allclose(
                value, wanted[f"native/{name}"], rtol=1e-4, atol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("name", MODELS)
def test_every_block_equals_openclip_s(name, made, images):
    ours = vitjax.load(made[name])
    check(ours, made[name], images)
    assert set(ours.report.unused.values()) == {"the text tower"}
    p = ours.preprocess
    assert (p.mean, p.std, p.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    said = "gelu_tanh" if name == "siglip" else ""  # nothing else is left to a guess
    assert said in " ".join(ours.report.notes) and len(ours.report.notes) == bool(said)


@pytest.mark.parametrize("name", ["laion's", "siglip", "siglip 2"])
def test_a_bare_file_is_read_with_what_is_missing_given(name, made, images, tmp_path):
    bare = tmp_path / "bare.safetensors"
    bare.symlink_to(made[name] / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"--model\.num_heads=N"):
        vitjax.load(bare)
    if name == "laion's":
        with pytest.raises(InputError, match=r"--model\.activation=gelu"):
            vitjax.load(bare, model={"num_heads": 2})
    activation = "gelu_tanh" if name == "siglip 2" else "gelu"
    ours = vitjax.load(bare, model={"num_heads": 2, "activation": activation})
    check(ours, made[name], images)
    assert "no preprocess_cfg" in " ".join(ours.report.notes)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("model_cfg", {"pool_type": "none"}, "pool_type='none' has no counterpart"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "resize_mode='longest' has no counterpart"),
        ("preprocess_cfg", {"interpolation": "random"}, "interpolation='random' has no"),
    ],
    ids=str,
)
def test_a_config_without_a_counterpart_is_refused(part, change, words, made, tmp_path):
    config = json.loads((made["laion's"] / "open_clip_config.json").read_text())
    (config[part]["vision_cfg"] if part == "model_cfg" else config[part]).update(change)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    name = "open_clip_model.safetensors"
    (tmp_path / name).symlink_to(made["laion's"] / name)
    with pytest.raises(InputError, match=words):
        vitjax.load(tmp_path)
