"""Reference files of CLIP, OpenCLIP, DINOv2 and DINOv3.

Their arrays are those of transformers' models under the names of the reference code, in
the layout of that code; the numbers must be those of transformers.
"""

import json

import numpy as np
import pytest

import vitjax
from vitjax.errors import InputError

torch = pytest.importorskip("torch", reason="needs torch")
T = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20,
         "patch_size": 4}  # fmt: skip


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images():
    return np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)


def run(model):
    with torch.no_grad():
        return model(torch.from_numpy(images().transpose(0, 3, 1, 2).copy()))


def saved_names(model, folder):
    """A model's state under the names of its files, which are those of the releases."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def fused(state, block, names, kind):
    return torch.cat([state[f"{block}{name}.{kind}"] for name in names])


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def dinov2(state, *, gated):
    """A Hugging Face DINOv2 as Meta's code keeps it."""
    table = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed", "embeddings.": "",
        "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
        "mlp.weights_in": "mlp.w12", "mlp.weights_out": "mlp.w3", "layernorm": "norm",
    }  # fmt: skip
    found = {renamed(n, table): v for n, v in state.items() if "attention.attention" not in n}
    for i in range(SIZES["num_hidden_layers"]):
        block = f"encoder.layer.{i}.attention.attention."
        for kind in ("weight", "bias"):
            qkv = fused(state, block, ("query", "key", "value"), kind)
            found[f"blocks.{i}.attn.qkv.{kind}"] = qkv
    assert ("blocks.0.mlp.w12.weight" in found) == gated
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers, gated, tmp_path):
    config = SIZES | {"use_swiglu_ffn": gated}
    if registers:
        theirs = T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**config))
    else:
        theirs = T.Dinov2Model(T.Dinov2Config(**config))
    theirs = randomised(theirs)
    torch.save(dinov2(saved_names(theirs, tmp_path), gated=gated), tmp_path / "dinov2.pth")
    with pytest.raises(InputError, match=r"--model\.num_heads=N"):
        vitjax.load(tmp_path / "dinov2.pth")
    ours = vitjax.load(tmp_path / "dinov2.pth", model={"num_heads": 2})
    assert ours.contract["origin"]["format"] == "dinov2"
    wanted = run(theirs).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.tokens(images(), preprocessed=True), wanted, atol=1e-4)


def test_a_training_checkpoint_of_teacher_and_student(tmp_path):
    theirs = randomised(T.Dinov2Model(T.Dinov2Config(**SIZES)))
    state = dinov2(saved_names(theirs, tmp_path), gated=False)
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    teacher["dino_head.mlp.0.weight"] = torch.zeros(3, 3)
    student = {name: value * 0 for name, value in teacher.items()}
    torch.save({"teacher": teacher, "student": student, "epoch": 1}, tmp_path / "full.pth")
    with pytest.raises(InputError, match=r"'student' .*--key=NAME|'teacher'.*--key=NAME"):
        vitjax.load(tmp_path / "full.pth")
    ours = vitjax.load(tmp_path / "full.pth", key="teacher", model={"num_heads": 2})
    wanted = run(theirs).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.tokens(images(), preprocessed=True), wanted, atol=1e-4)
    assert set(ours.report.unused.values()) == {"the head of pretraining"}


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated, garbage, tmp_path):
    """Its fused bias has a part for the keys that a mask takes out, whatever stands there."""
    config = T.DINOv3ViTConfig(
        **SIZES, intermediate_size=48, num_register_tokens=3, use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    theirs = randomised(T.DINOv3ViTModel(config))
    state = saved_names(theirs, tmp_path)
    table = {
        "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.register_tokens": "storage_tokens", "embeddings.": "", "layer.": "blocks.",
        "attention.o_proj": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }  # fmt: skip
    table |= (
        {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
        if gated
        else {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    )
    found = {
        renamed(n, table): v
        for n, v in state.items()
        if "attention.o" in n or "attention." not in n
    }
    found["mask_token"] = found["mask_token"][0]
    for i in range(2):
        block = f"layer.{i}.attention."
        names = ("q_proj", "k_proj", "v_proj")
        found[f"blocks.{i}.attn.qkv.weight"] = fused(state, block, names, "weight")
        keys = torch.full((32,), garbage)
        parts = [state[f"{block}q_proj.bias"], keys, state[f"{block}v_proj.bias"]]
        found[f"blocks.{i}.attn.qkv.bias"] = torch.cat(parts)
        mask = torch.ones(96)
        mask[32:64] = garbage if garbage != 7.0 else 0
        found[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    head = 16
    found["rope_embed.periods"] = 100.0 ** (2 * torch.arange(head // 4) / (head // 2))
    found["local_cls_norm.weight"] = torch.ones(32)  # in the 7B's file, for small crops alone
    torch.save(found, tmp_path / "dinov3.pth")
    ours = vitjax.load(tmp_path / "dinov3.pth")
    assert "the norm of small crops in pretraining" in ours.report.unused.values()
    assert ours.config["num_heads"] == 2 and ours.config["rope_theta"] == 100.0
    wanted = run(theirs).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.tokens(images(), preprocessed=True), wanted, atol=1e-4)
    del found["rope_embed.periods"]
    torch.save(found, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"storage_tokens but no rope_embed\.periods"):
        vitjax.load(tmp_path / "other.pth")


def clip(state):
    """A Hugging Face CLIP vision tower as OpenAI's code keeps it."""
    table = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    others = ("q_proj", "k_proj", "v_proj", "visual_proj")
    found = {
        renamed(n, table): v for n, v in state.items() if not any(part in n for part in others)
    }
    for i in range(2):
        block = f"vision_model.encoder.layers.{i}.self_attn."
        for kind in ("weight", "bias"):
            qkv = fused(state, block, ("q_proj", "k_proj", "v_proj"), kind)
            found[f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}"] = qkv
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    return found | {"logit_scale": torch.zeros(()), "token_embedding.weight": torch.zeros(9, 4),
                    "transformer.resblocks.0.ln_1.weight": torch.zeros(4),
                    "positional_embedding": torch.zeros(7, 4)}  # fmt: skip


@pytest.mark.parametrize("quick", [True, False])
def test_clip(quick, tmp_path):
    config = T.CLIPVisionConfig(
        **SIZES,
        intermediate_size=48,
        projection_dim=8,
        hidden_act="quick_gelu" if quick else "gelu",
    )
    theirs = randomised(T.CLIPVisionModelWithProjection(config))
    state = clip(saved_names(theirs, tmp_path / "hf"))
    wanted = run(theirs).image_embeds.numpy()

    torch.save(state, tmp_path / "clip.pt")  # nothing beside it: two things must be said
    given = {"num_heads": 2}
    with pytest.raises(InputError, match=r"--model\.activation=quick_gelu"):
        vitjax.load(tmp_path / "clip.pt", model=given)
    given["activation"] = "quick_gelu" if quick else "gelu"
    ours = vitjax.load(tmp_path / "clip.pt", model=given)
    np.testing.assert_allclose(ours.embed(images(), preprocessed=True), wanted, atol=1e-4)
    assert set(ours.report.unused.values()) == {"the text tower"}

    from safetensors.torch import save_file

    (tmp_path / "open").mkdir()
    save_file(state, tmp_path / "open" / "open_clip_model.safetensors")
    about = {
        "model_cfg": {"quick_gelu": quick, "vision_cfg": {"head_width": 16, "width": 32}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open" / "open_clip_config.json").write_text(json.dumps(about))
    ours = vitjax.load(tmp_path / "open")
    np.testing.assert_allclose(ours.embed(images(), preprocessed=True), wanted, atol=1e-4)
    assert ours.preprocess.mean == (0.1, 0.2, 0.3) and not ours.report.notes
