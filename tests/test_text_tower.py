"""Both towers and the losses against transformers' SigLIP and CLIP, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitjax
from vitjax.errors import InputError
from vitjax.models.text import text_transformer
from vitjax.objectives.contrastive import Contrastive

torch = pytest.importorskip("torch", reason="needs torch")
T = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
VOCABULARY, LENGTH, IMAGES = 50, 9, {"image_size": 16, "patch_size": 4}
OURS = {
    "target": "vitjax.models.text:text_transformer", "vocab_size": VOCABULARY, "length": LENGTH,
    "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2,
}  # fmt: skip
EOT = 47


def siglip():
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "projection_size": 32}
    config = T.SiglipConfig(text_config=SIZES | text, vision_config=SIZES | IMAGES)
    return T.SiglipModel(config), OURS, "sigmoid"


def clip(eot_id):
    """`eos_token_id` 2 means the largest id to transformers, as it did in CLIP's first config."""
    text = {
        "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH,
        "eos_token_id": 2 if eot_id is None else eot_id, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    config = T.CLIPConfig(text_config=SIZES | text, vision_config=SIZES | IMAGES, projection_dim=24)
    ours = OURS | {
        "pool": "eot", "eot_id": eot_id, "is_causal": True, "output_dim": 24, "head_bias": False,
        "activation": "quick_gelu", "eps": 1e-5,
    }  # fmt: skip
    return T.CLIPModel(config), ours, "softmax"


def text_params(theirs, heads=2):
    """Their text tower's arrays under our names."""
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    root = "text_model."

    def dense(name):
        found = {"kernel": state[f"{name}.weight"].T}
        return found | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(i):
        at = f"{root}encoder.layers.{i}."
        qkv = [dense(f"{at}self_attn.{x}_proj") for x in "qkv"]
        width = qkv[0]["kernel"].shape[0]
        kernel = np.stack([x["kernel"].reshape(width, heads, -1) for x in qkv], axis=1)
        bias = np.stack([x["bias"].reshape(heads, -1) for x in qkv])
        out = dense(f"{at}self_attn.out_proj")
        out["kernel"] = out["kernel"].reshape(heads, -1, width)
        return {
            "norm1": norm(f"{at}layer_norm1"), "norm2": norm(f"{at}layer_norm2"),
            "attention": {"qkv": {"kernel": kernel, "bias": bias}, "out": out},
            "mlp": {"up": dense(f"{at}mlp.fc1"), "down": dense(f"{at}mlp.fc2")},
        }  # fmt: skip

    head = "text_projection" if "text_projection.weight" in state else f"{root}head"
    return {
        "token_embed": state[f"{root}embeddings.token_embedding.weight"],
        "positions": state[f"{root}embeddings.position_embedding.weight"],
        "blocks": jax.tree.map(lambda *x: np.stack(x), block(0), block(1)),
        "norm": norm(f"{root}final_layer_norm"),
        "head": dense(head),
    }


def draw_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, EOT, (6, LENGTH))
    for row, end in enumerate([8, 3, 1, 5, 7, 2]):
        tokens[row, end:] = 0
        tokens[row, end] = EOT
    tokens[1, 5] = EOT  # only the first end counts
    return rng.normal(size=(6, 16, 16, 3)).astype(np.float32), tokens


@pytest.mark.parametrize(
    "make", [siglip, lambda: clip(None), lambda: clip(EOT)], ids=["siglip", "clip", "clip, eot"]
)
def test_embeddings_logits_and_loss_are_those_of_transformers(make, tmp_path):
    torch.manual_seed(0)
    theirs, block, kind = make()
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        theirs.logit_scale.fill_(1.7)
    theirs.save_pretrained(tmp_path)
    images, tokens = draw_batch()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens), pixel_values=pixels, return_loss=True)
    tower = vitjax.load(tmp_path)
    objective = Contrastive(tower.model, block, kind, chunk_size=4)
    params = {"model": tower.params, "text": jax.tree.map(jnp.asarray, text_params(theirs))}
    wanted_shapes = objective.text_model.abstract_params
    assert jax.tree.structure(params["text"]) == jax.tree.structure(wanted_shapes)
    params["scale"] = jnp.asarray(theirs.logit_scale.item())
    if kind == "sigmoid":
        params["bias"] = jnp.asarray(theirs.logit_bias.item())
    batch = {"images": jnp.asarray(images), "texts": jnp.asarray(tokens, jnp.int32)}
    ours = jax.jit(objective.embed_images)(params, batch["images"])
    np.testing.assert_allclose(ours, wanted.image_embeds.numpy(), atol=1e-4)
    texts = jax.jit(objective.embed_texts)(params, batch["texts"])
    np.testing.assert_allclose(texts, wanted.text_embeds.numpy(), atol=1e-4)
    logits = jnp.exp(params["scale"]) * ours @ texts.T + params.get("bias", 0.0)
    np.testing.assert_allclose(logits, wanted.logits_per_image.numpy(), atol=1e-4)
    loss, (_, metrics) = jax.jit(lambda p, b: objective.loss(p, {}, b, None))(params, batch)
    np.testing.assert_allclose(loss, wanted.loss.item(), rtol=1e-4)
    right = wanted.logits_per_image.argmax(1).numpy() == np.arange(6)
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), atol=1e-6)


def build(**changes):
    block = {k: v for k, v in OURS.items() if k != "target"}
    model = text_transformer(**(block | changes))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda x: 0.3 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    return model, jax.tree.map(draw, model.abstract_params)


def test_causal_tokens_see_nothing_behind_them():
    tokens = jnp.asarray(draw_batch()[1][:1], jnp.int32)
    changed = tokens.at[0, 5].add(1)
    for is_causal in (True, False):
        model, params = build(is_causal=is_causal, pool="eot")
        a, b = (model.apply(params, x)["tokens"][0] for x in (tokens, changed))
        is_same = np.isclose(a, b, atol=1e-6).all(1)
        assert not is_same[5:].any()
        assert is_same[:5].all() == is_causal and is_same[:5].any() == is_causal


def test_what_lies_behind_the_end_changes_no_causal_embedding():
    tokens = jnp.asarray(draw_batch()[1][1:2], jnp.int32)  # ends at 3
    model, params = build(is_causal=True, pool="eot", eot_id=EOT)
    changed = tokens.at[0, 6:].set(9)
    a, b = (model.apply(params, x)["embedding"] for x in (tokens, changed))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("pool", ["last", "eot", "map"])
def test_unrolled_and_rematerialised_blocks_give_the_same(pool):
    tokens = jnp.asarray(draw_batch()[1], jnp.int32)
    model, params = build(pool=pool)
    for changes in ({"scan": False}, {"remat": "full"}, {"remat": "dots"}):
        other, _ = build(pool=pool, **changes)
        run = lambda m: jax.jit(  # noqa: E731
            jax.grad(lambda p: (m.apply(p, tokens)["embedding"] ** 2).sum())
        )
        grads, others = run(model)(params), run(other)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                     grads, others)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "Bb"}, "unknown text.shape 'Bb'; did you mean 'B'"),
        ({"vocab_size": 0}, "text.vocab_size must be a positive number, got 0"),
        ({"eot_id": 3}, 'text.eot_id is of text.pool="eot"'),
        ({"pool": "eot", "eot_id": 50}, "text.eot_id must be in 0 to 49, got 50"),
        ({"activation": "gelo"}, "unknown text.activation 'gelo'; did you mean 'gelu'"),
        ({"remat": "offload"}, "unknown text.remat 'offload'"),
        ({"output_dim": -1}, "text.output_dim must be a positive number, got -1"),
    ],
)
def test_wrong_options_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        build(**changes)


def test_a_named_shape_gives_the_numbers_that_are_not_given():
    model = text_transformer(shape="B", depth=2, vocab_size=100, length=16)
    described = dict(model.description)
    assert (described["width"], described["depth"], described["mlp_dim"]) == (768, 2, 3072)


def test_texts_of_another_length_are_refused():
    model, params = build()
    with pytest.raises(InputError, match="takes 9 tokens, got 8"):
        model.apply(params, jnp.zeros((1, 8), jnp.int32))
