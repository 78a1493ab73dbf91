"""Our ViT against Hugging Face's PyTorch one, with random weights copied across."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax.models.vit import vit

DEPTH, HEADS, WIDTH = 3, 4, 48
# Names of transformers 4 and earlier, in the words of transformers 5.
OLD_NAMES = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def convert(state):
    """Hugging Face's weights as our parameters."""
    weights = {}
    for name, value in state.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        weights[name] = value.numpy()

    def stack(name, change=lambda x: x):
        return np.stack([change(weights[f"layers.{i}.{name}"]) for i in range(DEPTH)])

    def norm(name):
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    def dense(name):
        return {"kernel": stack(f"{name}.weight", np.transpose), "bias": stack(f"{name}.bias")}

    projections = [dense(f"attention.{name}_proj") for name in "qkv"]
    heads = (HEADS, WIDTH // HEADS)
    qkv = {
        "kernel": np.stack([p["kernel"] for p in projections], 2).reshape(DEPTH, WIDTH, 3, *heads),
        "bias": np.stack([p["bias"] for p in projections], 1).reshape(DEPTH, 3, *heads),
    }
    out = dense("attention.o_proj")
    out["kernel"] = out["kernel"].reshape(DEPTH, *heads, WIDTH)
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    params = {
        "patch_embed": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, WIDTH),
            "bias": weights["embeddings.patch_embeddings.projection.bias"],
        },
        "cls_token": weights["embeddings.cls_token"][0],
        "positions": weights["embeddings.position_embeddings"][0],
        "blocks": {
            "norm1": norm("layernorm_before"),
            "norm2": norm("layernorm_after"),
            "attention": {"qkv": qkv, "out": out},
            "mlp": {"up": dense("mlp.fc1"), "down": dense("mlp.fc2")},
        },
        "norm": {"scale": weights["layernorm.weight"], "bias": weights["layernorm.bias"]},
    }
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_equals_transformers(activation):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, layer_norm_eps=1e-6,
        intermediate_size=96, image_size=32, patch_size=8,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[activation],
    )  # fmt: skip
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = vit(
        image_size=32, channels=3, num_classes=0, width=WIDTH, depth=DEPTH, mlp_dim=96,
        num_heads=HEADS, patch_size=8, pool="cls", activation=activation,
    )  # fmt: skip
    params = convert(theirs.state_dict())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ours.abstract_params)

    before_norm = {}
    theirs.layernorm.register_forward_hook(lambda _m, args, _o: before_norm.update(x=args[0]))
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 32, 32, 3)))
    with torch.no_grad():
        out = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    mine = ours.apply(params, jnp.asarray(x), intermediates=True)
    layers = [h.numpy() for h in out.hidden_states[1:DEPTH]] + [before_norm["x"].numpy()]
    np.testing.assert_allclose(mine["patches"], out.hidden_states[0].numpy(), atol=1e-5)
    for index, wanted in enumerate(layers):
        np.testing.assert_allclose(
            mine["blocks"]["output"][index], wanted, rtol=1e-4, atol=1e-4, err_msg=f"block {index}"
        )
    np.testing.assert_allclose(mine["tokens"], out.last_hidden_state.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(mine["embedding"], mine["tokens"][:, 0])
