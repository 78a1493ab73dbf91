"""BiT, ConvNeXt and the convolutional stems, against independent implementations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from vitjax import config as config_lib
from vitjax import experiment, parallel
from vitjax.errors import InputError
from vitjax.interop import conv_layouts, google, layout
from vitjax.models import bit as bit_lib
from vitjax.models import convnext as convnext_lib
from vitjax.models import stems
from vitjax.models.bit import bit
from vitjax.models.conv import Conv, convolve, standardise
from vitjax.models.convnext import convnext
from vitjax.models.norms import GroupNorm
from vitjax.models.vit import vit
from vitjax.precision import Precision

# What the Hugging Face folders of two tiny networks say of them.
HF = {
    "bit": {
        "model_type": "bit", "num_channels": 3, "embedding_size": 16, "hidden_sizes": [32, 64],
        "depths": [2, 1], "num_groups": 8, "hidden_act": "relu",
    },
    "convnext": {
        "model_type": "convnext", "num_channels": 3, "patch_size": 4, "hidden_sizes": [8, 16, 24],
        "depths": [1, 2, 1], "num_stages": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 0.1,
    },
}  # fmt: skip
BIT = {"blocks": (2, 1), "widths": (32, 64), "root_width": 16, "groups": 8}
CONVNEXT = {"blocks": (1, 2, 1), "widths": (8, 16, 24)}
SMALL = {"image_size": 32, "channels": 3, "num_classes": 5}
MODELS = {
    "bit": lambda **more: bit(**(SMALL | BIT | more)),
    "convnext": lambda **more: convnext(**(SMALL | CONVNEXT | more)),
}
HYBRID = {
    "image_size": 32, "channels": 3, "num_classes": 5, "width": 32, "depth": 1, "mlp_dim": 32,
    "num_heads": 2,
}  # fmt: skip


def images(rows=32, cols=32, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, rows, cols, 3))


def shaken(model, seed=0, scale=0.3):
    """Parameters without the zeros and ones at which norms and heads start."""
    leaves, treedef = jax.tree.flatten(jax.jit(model.init)(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return treedef.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in pairs])


def close(mine, theirs, name=""):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4, err_msg=name)


def last(x):
    """A map of torch's with its channels last."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def first(x):
    """A map of ours as torch has it."""
    import torch

    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def transformers_model(kind, num_labels):
    """A random network of transformers, and where its stem and its stages are."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    names = {"bit": ("BitConfig", "Bit"), "convnext": ("ConvNextConfig", "ConvNext")}[kind]
    settings = {k: v for k, v in HF[kind].items() if k != "model_type"}
    config = getattr(transformers, names[0])(**settings, num_labels=num_labels)
    ending = "ForImageClassification" if num_labels else "Model"
    model = getattr(transformers, names[1] + ending)(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    inner = getattr(model, kind) if num_labels else model
    stem = inner.embedder if kind == "bit" else inner.embeddings
    return model, [stem, *inner.encoder.stages]


@pytest.mark.parametrize("num_labels", [5, 0])
@pytest.mark.parametrize("kind", HF)
def test_equals_transformers_after_every_stage_and_at_two_sizes(kind, num_labels):
    import torch

    theirs, parts = transformers_model(kind, num_labels)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    shapes = {k: v.shape for k, v in state.items()}
    block = conv_layouts.read_config(theirs.config.to_dict(), shapes, "test")
    ours = config_lib.build(block, image_size=64, channels=3, precision=Precision())
    leaves = conv_layouts.hf_leaves(block)
    layout.check_complete(leaves, ours.abstract_params)
    assert layout.expected_shapes(leaves, ours.abstract_params, {}) == shapes
    params = layout.read_params(leaves, ours.abstract_params, state.__getitem__, {})
    seen = {}
    for index, part in enumerate(parts):
        part.register_forward_hook(lambda _m, _i, out, index=index: seen.update({index: out}))
    run = jax.jit(lambda p, x: ours.apply(p, x, intermediates=True))
    for rows, cols in ((64, 64), (48, 80)):
        x = images(rows, cols)
        with torch.no_grad():
            out = theirs(first(x), output_hidden_states=True)
        mine = run(params, x)
        assert len(mine["stages"]) == len(parts)
        for index, features in enumerate(mine["stages"]):
            close(features, last(seen[index]), f"stage {index}")
        if num_labels:
            close(mine["logits"], out.logits.detach().numpy())
            continue
        tokens = last(out.last_hidden_state)
        close(mine["tokens"], tokens.reshape(2, -1, tokens.shape[-1]))
        close(mine["embedding"], out.pooler_output.detach().numpy().reshape(2, -1))


@pytest.mark.parametrize("num_labels", [5, 0])
@pytest.mark.parametrize("kind", HF)
def test_what_is_written_is_what_was_read_and_transformers_takes_it(kind, num_labels):
    import torch

    theirs, _ = transformers_model(kind, num_labels)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    shapes = {k: v.shape for k, v in state.items()}
    block = conv_layouts.read_config(theirs.config.to_dict(), shapes, "test")
    ours = config_lib.build(block, image_size=64, channels=3, precision=Precision())
    leaves = conv_layouts.hf_leaves(block)
    params = layout.read_params(leaves, ours.abstract_params, state.__getitem__, {})
    written = {t.name: t.produce() for t in layout.tensors(leaves, params, {}, "float32")}
    assert written.keys() == state.keys()
    for name, value in written.items():
        assert value.tobytes() == state[name].tobytes(), name
    config = type(theirs.config)(
        **conv_layouts.write_config(block), num_channels=3, num_labels=num_labels
    )
    fresh = type(theirs)(config).eval()
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in written.items()}, strict=True)
    x = first(images(64, 64))
    name = "logits" if num_labels else "last_hidden_state"
    with torch.no_grad():
        np.testing.assert_array_equal(fresh(x)[name], theirs(x)[name])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("bit", {"layer_type": "bottleneck"}, "layer_type='bottleneck'"),
        ("bit", {"global_padding": "SAME"}, "global_padding='SAME'"),
        ("bit", {"output_stride": 16}, "output_stride=16"),
        ("bit", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("bit", {"embedding_dynamic_padding": True}, "embedding_dynamic_padding=True"),
        ("convnext", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("convnext", {"depths": [1, 2]}, "depths"),
        ("convnext", {"num_stages": 4}, "num_stages=4"),
        ("bit", {"width_factor": 2}, "width_factor=2"),
    ],
)
def test_configs_that_have_no_counterpart_are_refused(kind, change, words):
    with pytest.raises(InputError, match=words):
        conv_layouts.read_config(HF[kind] | change, {}, "config.json")


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("num_classes", [5, 0])
@pytest.mark.parametrize("kind", MODELS)
def test_counts_equal_the_built_network(kind, num_classes, size):
    model = MODELS[kind](num_classes=num_classes, image_size=size)
    arguments = dict(model.arguments)
    if kind == "bit":
        counted = bit_lib.count_params(arguments["plan"])
    else:
        counted = convnext_lib.count_params(arguments["plan"], has_layer_scale=True)
    assert counted == model.num_params
    assert model.flops_per_image == pytest.approx(products(model, size), rel=1e-9)


def products(model, size):
    """FLOPs of every convolution and matrix product in the traced program, one image."""
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out = "logits" if dict(model.description)["num_classes"] else "embedding"
    jaxpr = jax.make_jaxpr(lambda p, x: model.apply(p, x)[out])(model.abstract_params, shape)
    return 2 * _macs(jaxpr.jaxpr)


def _macs(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += _macs(inner)
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "conv_general_dilated":
            total += out * math.prod(eqn.invars[1].aval.shape[:-1])
        if eqn.primitive.name == "dot_general":
            ((x_dims, _), _) = eqn.params["dimension_numbers"]
            total += out * math.prod(eqn.invars[0].aval.shape[d] for d in x_dims)
    return total


@pytest.mark.parametrize("kind", ["bit", "convnext"])
def test_flops_are_near_the_compilers_count(kind):
    """At a size where the padding, which XLA does not count, is little of the whole."""
    large = {
        "bit": {"blocks": (1, 1)},
        "convnext": {"blocks": (1,), "widths": (64,), "activation": "relu"},
    }[kind]
    model = MODELS[kind](image_size=128, **large)
    shape = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    lowered = jax.jit(lambda p, x: model.apply(p, x)["logits"]).lower(model.abstract_params, shape)
    assert lowered.cost_analysis()["flops"] == pytest.approx(model.flops_per_image, rel=0.15)


# Millions of parameters and GMAC at 224 pixels, with 1000 classes: BiT of timm's table, ConvNeXt
# of its paper (table 1).
PUBLISHED = [
    (bit, {"depth": 50}, 25.55, None),
    (bit, {"depth": 50, "width_factor": 3}, 217.32, None),
    (bit, {"depth": 101}, 44.54, None),
    (bit, {"depth": 152, "width_factor": 2}, 236.34, None),
    (bit, {"depth": 152, "width_factor": 4}, 936.53, None),
    (convnext, {"size": "T"}, 28.59, 4.5),
    (convnext, {"size": "S"}, 50.22, 8.7),
    (convnext, {"size": "B"}, 88.59, 15.4),
    (convnext, {"size": "L"}, 197.77, 34.4),
    (convnext, {"size": "XL"}, 350.20, 60.9),
]


@pytest.mark.parametrize(("make", "options", "params", "macs"), PUBLISHED)
def test_published_sizes(make, options, params, macs):
    model = make(image_size=224, channels=3, num_classes=1000, **options)
    assert model.num_params / 1e6 == pytest.approx(params, abs=0.006)
    if macs is not None:
        assert model.flops_per_image / 2e9 == pytest.approx(macs, abs=0.06)


def test_standardised_weights_have_mean_zero_and_deviation_one():
    kernel = 3 + 5 * jax.random.normal(jax.random.key(0), (3, 3, 4, 6))
    for how in ("variance", "deviation"):
        flat = np.asarray(standardise(kernel, how)).reshape(-1, 6)
        np.testing.assert_allclose(flat.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(flat.std(0), 1, atol=1e-5)


def test_the_two_standardisations_add_their_epsilon_at_different_places():
    kernel = 1e-4 * jax.random.normal(jax.random.key(0), (3, 3, 4, 1))
    deviation = float(np.std(kernel))
    wanted = {
        "variance": deviation / math.sqrt(deviation**2 + 1e-8),
        "deviation": deviation / (deviation + 1e-5),
    }
    for how, value in wanted.items():
        assert float(np.std(standardise(kernel, how))) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("groups", "stride", "size"), [(1, 1, 3), (4, 2, 3), (8, 1, 7)])
def test_a_convolution_equals_torchs(groups, stride, size):
    torch = pytest.importorskip("torch", reason="needs torch")

    layer = Conv(
        8, 16, size, stride=stride, padding=size // 2, groups=groups, use_bias=True,
        precision=Precision(), rngs=nnx.Rngs(params=0),
    )  # fmt: skip
    layer.bias[...] = jnp.arange(16.0)
    x = jax.random.normal(jax.random.key(1), (2, 12, 11, 8))
    weight = torch.from_numpy(np.array(layer.kernel[...]).transpose(3, 2, 0, 1).copy())
    wanted = torch.nn.functional.conv2d(
        first(x), weight, torch.arange(16.0), stride, size // 2, 1, groups
    )
    close(layer(x), last(wanted))


def test_group_norm_equals_torchs():
    torch = pytest.importorskip("torch", reason="needs torch")
    norm = GroupNorm(12, precision=Precision(), eps=1e-3, groups=3)
    norm.scale[...] = jnp.arange(12.0)
    norm.bias[...] = 1 - jnp.arange(12.0)
    x = 0.1 * jax.random.normal(jax.random.key(0), (2, 5, 7, 12)) + 0.5
    scale, bias = torch.arange(12.0), 1 - torch.arange(12.0)
    theirs = [v.requires_grad_() for v in (first(x).clone(), scale, bias)]
    wanted = torch.nn.functional.group_norm(theirs[0], 3, *theirs[1:], 1e-3)
    close(norm(x), last(wanted.detach()))

    # Gradients: of an output whose places and channels all weigh differently.
    weights = jax.random.normal(jax.random.key(1), x.shape)
    graph, params = nnx.split(norm)
    ours = jax.grad(lambda p, x: (nnx.merge(graph, p)(x) * weights).sum(), argnums=(0, 1))
    of_params, of_x = ours(params, x)
    (wanted * first(weights)).sum().backward()
    close(of_x, last(theirs[0].grad))
    close(of_params["scale"][...], theirs[1].grad)
    close(of_params["bias"][...], theirs[2].grad)


def test_group_norm_of_narrow_numbers_is_computed_in_wide_ones():
    narrow = Precision(compute="bfloat16", gradients="bfloat16")
    norm, wide = (GroupNorm(12, precision=p, eps=1e-3, groups=3) for p in (narrow, Precision()))
    x = (20 + jax.random.normal(jax.random.key(0), (2, 8, 8, 12))).astype(jnp.bfloat16)
    grad = jax.grad(lambda norm, x: (norm(x).astype(jnp.float32) ** 3).sum(), argnums=1)
    assert norm(x).dtype == grad(norm, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), wide(x.astype(jnp.float32)).astype(jnp.bfloat16))
    near = np.abs(grad(norm, x).astype(np.float32) - grad(wide, x.astype(jnp.float32)))
    assert near.max() < 0.02 * np.abs(grad(wide, x.astype(jnp.float32))).max()


@pytest.mark.parametrize("kind", MODELS)
def test_the_head_starts_at_zero_and_outputs_are_those_of_a_vit(kind):
    model = MODELS[kind](precision=Precision(compute="bfloat16"))
    params = jax.jit(model.init)(jax.random.key(0))
    out = jax.jit(model.apply)(params, images(32, 48))
    facts = dict(model.description)
    tokens = 2 * facts["num_tokens"] // 2 * 48 // 32
    assert out["tokens"].shape == (2, tokens, facts["width"])
    assert out["embedding"].shape == (2, facts["width"])
    assert out["logits"].shape == (2, 5) and not out["logits"].any()
    assert out["logits"].dtype == jnp.float32 and out["tokens"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    params.pop("head")
    assert "logits" not in MODELS[kind](num_classes=0, image_size=32).apply(params, images())


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_the_last_map_row_by_row(kind):
    """A change in the picture's lower right corner is largest in the last token."""
    model = MODELS[kind]()
    params, x = shaken(model), images(64, 128)
    run = jax.jit(model.apply)
    out = run(params, x)
    if kind == "bit":
        close(out["tokens"].mean(1), out["embedding"])
    moved = run(params, x.at[:, 56:, 112:].add(3.0))
    change = np.abs(np.asarray(moved["tokens"] - out["tokens"])).sum(-1)
    assert (change.argmax(1) == out["tokens"].shape[1] - 1).all()


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_has_a_gradient(kind):
    model = MODELS[kind]()
    weights = jax.random.normal(jax.random.key(3), (2, 5))
    loss = jax.jit(jax.grad(lambda p: (model.apply(p, images())["logits"] * weights).sum()))
    for path, grad in jax.tree.leaves_with_path(loss(shaken(model))):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-7, parallel.path_name(path)


def test_stochastic_depth_drops_whole_examples_and_needs_a_key():
    sizes = {"blocks": (2,), "widths": (8,), "drop_path_rate": 0.5, "layer_scale": 1.0}
    model = convnext(**(SMALL | sizes))
    params = shaken(model)
    same = jnp.broadcast_to(images(batch=1), (64, 32, 32, 3))
    quiet, stem = (model.apply(params, same, intermediates=True)["stages"][i] for i in (-1, 0))
    run = jax.jit(lambda key: model.apply(params, same, key, intermediates=True)["stages"][-1])
    dropped = np.asarray(run(jax.random.key(0)))
    kinds = np.unique(np.round(dropped.reshape(64, -1), 3), axis=0)
    assert len(kinds) == 2  # the last block, whose rate is a half, is there or not
    np.testing.assert_array_equal(dropped, run(jax.random.key(0)))
    assert not np.allclose(dropped, run(jax.random.key(1)))
    kept, gone = sorted(kinds, key=lambda k: -np.abs(k - np.asarray(stem[0]).ravel()).sum())
    # What is kept is doubled: the mean of both is what inference gives.
    np.testing.assert_allclose((kept + gone) / 2, np.asarray(quiet[0]).ravel(), atol=2e-3)


def test_google_bit_names():
    """The arrays of the published R50x1 file, by hand."""
    wanted = {
        "resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 64),
        "resnet/group_norm/gamma": (2048,),
        "resnet/group_norm/beta": (2048,),
        "resnet/head/conv2d/kernel": (1, 1, 2048, 21843),
        "resnet/head/conv2d/bias": (21843,),
        "resnet/block1/unit01/a/proj/standardized_conv2d/kernel": (1, 1, 64, 256),
        "resnet/block1/unit01/a/standardized_conv2d/kernel": (1, 1, 64, 64),
        "resnet/block1/unit01/a/group_norm/gamma": (64,),
        "resnet/block1/unit01/b/standardized_conv2d/kernel": (3, 3, 64, 64),
        "resnet/block1/unit01/c/standardized_conv2d/kernel": (1, 1, 64, 256),
        "resnet/block1/unit02/a/group_norm/beta": (256,),
        "resnet/block2/unit01/a/proj/standardized_conv2d/kernel": (1, 1, 256, 512),
        "resnet/block2/unit04/b/group_norm/gamma": (128,),
        "resnet/block3/unit06/c/standardized_conv2d/kernel": (1, 1, 256, 1024),
        "resnet/block4/unit03/a/standardized_conv2d/kernel": (1, 1, 2048, 512),
    }
    block = {"target": conv_layouts.BIT, "blocks": (3, 4, 6, 3), "num_classes": 21843}
    model = bit(image_size=224, channels=3, num_classes=21843)
    leaves = conv_layouts.google_bit_leaves(block)
    layout.check_complete(leaves, model.abstract_params)
    found = layout.expected_shapes(leaves, model.abstract_params, {})
    assert len(found) == 1 + 2 + 2 + 16 * 9 + 4 and wanted.items() <= found.items()
    read = conv_layouts.read_google_bit(found)
    assert read == block | {
        "widths": (256, 512, 1024, 2048), "root_width": 64, "groups": 32,
    }  # fmt: skip
    assert not any("proj" in n for n in found if "unit01" not in n)


def torch_hybrid(torch, weights, x, blocks):
    """The ResNet of the hybrids, straight from its description."""
    nn = torch.nn.functional

    def conv(name, x, stride=1):
        w = torch.from_numpy(weights[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())
        w = w - w.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), correction=0, keepdim=True) + 1e-5)
        size = w.shape[-1]
        sides = []
        for length in (x.shape[3], x.shape[2]):
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            sides += [total // 2, total - total // 2]
        return nn.conv2d(nn.pad(x, sides), w, stride=stride)

    def norm(name, x):
        scale, bias = (torch.from_numpy(weights[f"{name}/{k}"].copy()) for k in ("scale", "bias"))
        return nn.group_norm(x, 32, scale, bias, 1e-6)

    x = nn.relu(norm("gn_root", conv("conv_root", x, 2)))
    pads = [(0, 1) if length % 2 == 0 else (1, 1) for length in (x.shape[3], x.shape[2])]
    x = nn.max_pool2d(nn.pad(x, [*pads[0], *pads[1]], value=-math.inf), 3, 2)
    for stage, count in enumerate(blocks, 1):
        for unit in range(1, count + 1):
            name, stride = f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1
            y = nn.relu(norm(f"{name}/gn1", conv(f"{name}/conv1", x)))
            y = nn.relu(norm(f"{name}/gn2", conv(f"{name}/conv2", y, stride)))
            y = norm(f"{name}/gn3", conv(f"{name}/conv3", y))
            if unit == 1:
                x = norm(f"{name}/gn_proj", conv(f"{name}/conv_proj", x, stride))
            x = nn.relu(x + y)
    return x


@pytest.mark.parametrize(
    ("blocks", "patch_size"), [((), 8), ((1,), 4), ((1, 2), 8)], ids=["root", "one", "two"]
)
def test_the_hybrids_stem_equals_torch(blocks, patch_size):
    torch = pytest.importorskip("torch", reason="needs torch")

    model = vit(**HYBRID, patch_size=patch_size, stem="resnet", stem_blocks=blocks, stem_width=32)
    params = shaken(model)
    table = google._stem(blocks)
    weights = {t.name: t.produce() for t in layout.tensors(table, params, {}, "float32")}
    made = stems.ResNetStem(3, 32, blocks, precision=Precision(), rngs=nnx.Rngs(params=0))
    graphdef, _ = nnx.split(made)
    run = jax.jit(lambda p, x: nnx.merge(graphdef, nnx.State(p))(x))
    for rows, cols in ((32, 32), (30, 45)):
        x = images(rows, cols)
        close(run(params["stem"], x), last(torch_hybrid(torch, weights, first(x), blocks)))


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "conv", "patch_size": 8},
        {"stem": "conv", "patch_size": 16},
        {"stem": "resnet", "patch_size": 8, "stem_blocks": (), "stem_width": 32},
        {"stem": "resnet", "patch_size": 16, "stem_blocks": (1, 1, 2), "stem_width": 32},
    ],
)
def test_stems_are_counted_exactly_and_take_other_sizes(options):
    model = vit(**HYBRID | options, scan=False)
    geometry = dict(model.arguments)["geometry"]
    from vitjax.models import shapes

    assert sum(shapes.count_params(geometry).values()) == model.num_params
    assert model.flops_per_image == pytest.approx(products(model, 32), rel=1e-9)
    out = jax.eval_shape(model.apply, model.abstract_params, images(48, 32))
    assert out["tokens"].shape[1] == 48 * 32 // options["patch_size"] ** 2


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (bit, {"depth": 51}, "50, 101, 152"),
        (bit, {"blocks": (1, 2), "widths": (128,)}, "blocks"),
        (bit, {"blocks": (1,), "widths": (100,)}, "groups=32"),
        (bit, {"groups": 0}, "groups"),
        (convnext, {"size": "M"}, "T, S, B, L, XL"),
        (convnext, {"activation": "gelo"}, "did you mean 'gelu'"),
        (convnext, {"drop_path_rate": 1.0}, "drop_path_rate"),
        (convnext, {"layer_scale": 0.0}, "layer_scale must be positive or None"),
        (convnext, {"image_size": 16}, "stride of 32"),
        (vit, {"stem": "cnn"}, "patch, conv, resnet"),
        (vit, {"stem": "conv", "patch_size": 12, "image_size": 48}, "got 12"),
        (vit, {"stem": "conv", "patch_size": 2}, "got 2"),
        (vit, {"stem": "conv", "patch_size": 64, "image_size": 64}, "got 64"),
        (vit, {"stem": "resnet", "patch_size": 8, "stem_blocks": (1, 1, 1)}, "stride of 16"),
    ],
)
def test_bad_numbers_are_refused(make, change, words):
    base = (HYBRID | {"patch_size": 8}) if make is vit else SMALL
    with pytest.raises(InputError, match=words):
        make(**(base | change))


@pytest.mark.parametrize("kind", MODELS)
def test_images_of_other_channels_are_refused(kind):
    model = MODELS[kind]()
    params = model.abstract_params
    with pytest.raises(InputError, match="3 channels, got 1"):
        jax.eval_shape(model.apply, params, jnp.zeros((1, 32, 32, 1)))
    if kind == "convnext":
        with pytest.raises(InputError, match="at least 16"):
            jax.eval_shape(model.apply, params, jnp.zeros((1, 32, 12, 3)))


def train(config, devices):
    exp = experiment.build(config, devices=devices)
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    step, state, losses = exp.compile(), exp.fresh_state(), []
    for i in range(2):
        batch = loader.train_batch(i, config.batch_size, config.seed)
        state, metrics = step(state, parallel.to_global(batch, exp.mesh, config.batch_size))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_takes_them_on_one_device_and_with_fsdp(kind, make_config):
    config = make_config()
    options = {"bit": BIT, "convnext": CONVNEXT | {"patch_size": 2, "drop_path_rate": 0.2}}[kind]
    target = {"bit": conv_layouts.BIT, "convnext": conv_layouts.CONVNEXT}[kind]
    with config.unlocked():
        config.model = ConfigDict({"target": target, "num_classes": 10, **options})
    single, _ = train(config, jax.devices()[:1])
    config.mesh = {"replica": 1, "fsdp": 8, "tensor": 1}
    spread, state = train(config, jax.devices())
    np.testing.assert_allclose(spread, single, rtol=1e-5)
    assert single[0] == pytest.approx(math.log(10), abs=1e-6) and single[1] != single[0]
    kernel = state.params["stage1"]["unit1"]["conv3" if kind == "bit" else "down"]["kernel"]
    assert kernel.addressable_data(0).size == kernel.size // 8


def test_a_first_unit_has_a_shortcut_even_where_channels_stay():
    block = conv_layouts.read_config(HF["bit"] | {"embedding_size": 32}, {}, "config.json")
    model = config_lib.build(block, image_size=32, channels=3, precision=Precision())
    layout.check_complete(conv_layouts.hf_leaves(block), model.abstract_params)
    assert bit_lib.count_params(dict(model.arguments)["plan"]) == model.num_params
    assert model.flops_per_image == products(model, 32)


def test_a_prefix_without_a_classifier_is_seen():
    block = conv_layouts.read_config(HF["bit"], {}, "config.json")
    bare = [leaf.names[0] for leaf in conv_layouts.hf_leaves(block)]
    outer = [f"bit.{name}" for name in bare]
    assert [leaf.names[0] for leaf in conv_layouts.hf_leaves(block, bare)] == bare
    assert [leaf.names[0] for leaf in conv_layouts.hf_leaves(block, outer)] == outer


def test_numbered_convolutions_of_google_are_found():
    block = {"target": conv_layouts.BIT, "blocks": (2, 1), "num_classes": 0}
    model = bit(image_size=32, channels=3, num_classes=0, **BIT)
    plain = layout.expected_shapes(conv_layouts.google_bit_leaves(block), model.abstract_params, {})
    numbered = {
        n.replace("b/standardized_conv2d/", "b/standardized_conv2d_7/"): s for n, s in plain.items()
    }
    assert numbered.keys() != plain.keys()
    assert conv_layouts.read_google_bit(numbered) == conv_layouts.read_google_bit(plain)
    leaves = conv_layouts.google_bit_leaves(block, numbered)
    assert layout.expected_shapes(leaves, model.abstract_params, {}) == numbered


def test_widths_that_torch_would_round_are_refused():
    with pytest.raises(InputError, match="divisible by 32"):
        conv_layouts.read_config(HF["bit"] | {"hidden_sizes": [48, 96]}, {}, "config.json")
    with pytest.raises(InputError, match="divisible by 32"):
        conv_layouts.write_config({"target": conv_layouts.BIT, **BIT, "widths": (16, 32)})


@pytest.mark.parametrize("groups", [1, 8])
def test_wide_gradients_are_not_rounded(groups):
    """Not compiled: XLA may keep more digits inside of a program than its types have."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8 // groups, 8))

    def gradient(**types):
        p = Precision(**types)
        return jax.grad(
            lambda k: (convolve(x, k, 2, "SAME", groups, p) ** 2).astype("float32").sum()
        )(kernel)

    def is_rounded(values):
        return values == values.astype(jnp.bfloat16).astype(jnp.float32)

    exact = gradient()
    assert is_rounded(gradient(compute="bfloat16", gradients="bfloat16")).all()
    wide = gradient(compute="bfloat16", gradients="float32")
    assert is_rounded(wide).mean() < 0.1
    np.testing.assert_allclose(wide, exact, atol=0.05 * np.abs(exact).max())


def test_timm_names():
    """A sample of the state dicts of resnetv2_50x1_bit and convnext_tiny, by hand."""
    wanted = {
        "bit": {
            "stem.conv.weight": (16, 3, 7, 7),
            "stages.0.blocks.0.downsample.conv.weight": (32, 16, 1, 1),
            "stages.0.blocks.1.norm1.bias": (32,),
            "stages.1.blocks.0.conv2.weight": (16, 16, 3, 3),
            "norm.weight": (64,),
            "head.fc.weight": (5, 64, 1, 1),
        },
        "convnext": {
            "stem.0.bias": (8,),
            "stem.1.weight": (8,),
            "stages.1.downsample.0.bias": (8,),
            "stages.1.downsample.1.weight": (16, 8, 2, 2),
            "stages.1.blocks.1.conv_dw.weight": (16, 1, 7, 7),
            "stages.2.blocks.0.mlp.fc1.weight": (96, 24),
            "stages.2.blocks.0.gamma": (24,),
            "head.norm.weight": (24,),
            "head.fc.weight": (5, 24),
        },
    }
    blocks = {
        "bit": {"target": conv_layouts.BIT, "num_classes": 5, **BIT},
        "convnext": {
            "target": conv_layouts.CONVNEXT, "num_classes": 5, "layer_scale": 1.0, **CONVNEXT,
        },
    }  # fmt: skip
    for kind, block in blocks.items():
        leaves, model = conv_layouts.timm_leaves(block), MODELS[kind]()
        layout.check_complete(leaves, model.abstract_params)
        found = layout.expected_shapes(leaves, model.abstract_params, {})
        assert wanted[kind].items() <= found.items()


def test_a_hybrids_units_start_as_their_shortcuts():
    model = vit(**HYBRID, patch_size=8, stem="resnet", stem_blocks=(1, 1), stem_width=32)
    stem = jax.jit(model.init)(jax.random.key(0))["stem"]
    assert not stem["stage1"]["unit1"]["norm3"]["scale"].any()
    assert stem["stage1"]["unit1"]["norm2"]["scale"].all()
