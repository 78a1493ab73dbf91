"""Functions as StableHLO and ONNX files: every operation that models use, and what is refused."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitjax.errors import InputError
from vitjax.interop.onnx import write_onnx
from vitjax.interop.stablehlo import write_stablehlo
from vitjax.models.bit import bit
from vitjax.models.convnext import convnext
from vitjax.models.vit import vit
from vitjax.precision import Precision

BIG = {"image_size": 32, "channels": 3, "num_classes": 5}
SMALL = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4}
MODELS = {
    "bit": bit(**BIG, blocks=(2, 1), widths=(32, 64), root_width=16, groups=8),
    "convnext": convnext(**BIG, blocks=(1, 2), widths=(8, 16), layer_scale=0.5),
    "conv stem": vit(**BIG, **SMALL, patch_size=8, stem="conv"),
    "hybrid": vit(
        **BIG, **SMALL, patch_size=8, pool="cls", stem="resnet", stem_blocks=(1, 1),
        stem_width=32,
    ),
    "registers, mean": vit(**BIG, **SMALL, patch_size=8, num_registers=3, activation="silu"),
}  # fmt: skip

WEIGHTS = {
    "kernel": np.random.default_rng(1).normal(size=(3, 3, 3, 6)).astype(np.float32),
    "depthwise": np.random.default_rng(2).normal(size=(5, 5, 1, 6)).astype(np.float32),
    "narrow": np.arange(6).astype(jnp.bfloat16),
}
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, stride=1, padding="SAME", groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def pool(x, start, operation, size=3, stride=2):
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, start, operation, window, strides, "SAME")


OPERATIONS = {
    "conv": lambda w, x: conv(x, w["kernel"], 2),
    "conv, padded by hand": lambda w, x: conv(x, w["kernel"], 2, ((1, 0), (2, 1))),
    "conv, dilated": lambda w, x: jax.lax.conv_general_dilated(
        x, w["kernel"], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=LAYOUT
    ),
    "depthwise": lambda w, x: conv(conv(x, w["kernel"]), w["depthwise"], groups=6),
    "pad": lambda w, x: jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0))),
    "max pool": lambda w, x: pool(x, -jnp.inf, jax.lax.max),
    "sum pool": lambda w, x: pool(x, 0.0, jax.lax.add),
    "index": lambda w, x: x[:, 3, -1],
    "slice": lambda w, x: x[:, ::2, 1:-1],
    "stride": lambda w, x: jax.lax.slice_in_dim(x, 1, 11, 3, axis=1),
    "take": lambda w, x: jnp.take(x, jnp.asarray([2, 0, 2]), axis=3),
    "split": lambda w, x: jnp.concatenate(jnp.split(x, 2, axis=1)[::-1], axis=2),
    "roll": lambda w, x: jnp.roll(x, 1, 1),
    "matrices": lambda w, x: jnp.einsum("bhwc,bgwc->bwhg", x, x),
    "matrix by rows": lambda w, x: jnp.einsum("bhwc,uvcd->bhwuvd", x, w["kernel"]),
    "softmax": lambda w, x: jax.nn.log_softmax(x.mean((1, 2))),
    "activations": lambda w, x: jax.nn.softplus(x) * jax.nn.hard_swish(x) + jax.nn.elu(x),
    "unit length": lambda w, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "spread": lambda w, x: jnp.std(x, (1, 2)) + x.max((1, 2)) - x.min((1, 2)),
    "resize": lambda w, x: jax.image.resize(x, (x.shape[0], 5, 8, 3), "bilinear"),
    "narrow weights": lambda w, x: conv(x, w["kernel"]) * w["narrow"][None, None, None].astype(
        jnp.float32
    ),
    "scan, collected": lambda w, x: jax.lax.scan(
        lambda carry, k: (carry * k.mean(), carry.mean((1, 2))), x, w["kernel"], reverse=True
    )[1].transpose(1, 0, 2),
    "a constant for each image": lambda w, x: jnp.broadcast_to(
        w["kernel"].reshape(1, -1), (x.shape[0], w["kernel"].size)
    ),
}  # fmt: skip

# What a user of the files does, in a process that cannot import vitjax.
PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vitjax":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import vitjax
except ModuleNotFoundError:
    pass
else:
    sys.exit("vitjax can be imported, so this proves nothing")

import jax, numpy as np
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    call = jax.export.deserialize((folder / "m.stablehlo").read_bytes()).call
    for given in sorted(folder.glob("b*.npy")):
        np.save(folder / ("out_" + given.name), call(np.load(given)))
"""


def batches(size=32):
    draw = np.random.default_rng(0).normal
    return [draw(size=(n, size, size, 3)).astype(np.float32) for n in (1, 7)]


def draw_params(model):
    leaves, tree = jax.tree.flatten(model.abstract_params)
    draw = np.random.default_rng(0).normal
    return jax.tree.unflatten(tree, [jnp.asarray(draw(0, 0.2, x.shape), x.dtype) for x in leaves])


@functools.cache
def made(name):
    """A model of the table as a function, its parameters, and its results for the batches."""
    model = MODELS[name]
    params = draw_params(model)

    def function(params, images):
        return model.apply(params, images)["logits"]

    return function, params, [np.asarray(jax.jit(function)(params, x)) for x in batches()]


def run_onnx(path, images):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    return [session.run(["output"], {"images": x})[0] for x in images]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_the_same_in_onnx(name, tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    function, images = OPERATIONS[name], batches(12)
    write_onnx(tmp_path / "m.onnx", function, WEIGHTS, (12, 12, 3))
    for found, x in zip(run_onnx(tmp_path / "m.onnx", images), images, strict=True):
        wanted = function(WEIGHTS, jnp.asarray(x))
        assert found.shape == wanted.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_convolutional_models_are_the_same_in_onnx(name, tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    function, params, wanted = made(name)
    write_onnx(tmp_path / "m.onnx", function, params, (32, 32, 3))
    for found, right in zip(run_onnx(tmp_path / "m.onnx", batches()), wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


def test_convolutional_models_are_the_same_in_stablehlo_without_vitjax(tmp_path, caplog):
    """One process for all: starting JAX takes longer than the rest. -I hides our folder too."""
    folders = {name: tmp_path / str(number) for number, name in enumerate(MODELS)}
    for name, folder in folders.items():
        folder.mkdir()
        for x in batches():
            np.save(folder / f"b{len(x)}.npy", x)
        function, params, _ = made(name)
        write_stablehlo(folder / "m.stablehlo", function, params, (32, 32, 3))
    assert not caplog.records  # each took the lean way
    command = [sys.executable, "-I", "-c", PROGRAM, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, folder in folders.items():
        for right in made(name)[2]:
            found = np.load(folder / f"out_b{len(right)}.npy")
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4, err_msg=name)


def test_standardised_kernels_are_computed_once(tmp_path):
    """What depends on weights alone is no work for the runtime."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")

    def function(weights, x):
        kernel = weights["kernel"]
        centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
        return conv(x, centred * jax.lax.rsqrt((centred**2).mean((0, 1, 2), keepdims=True)))

    write_onnx(tmp_path / "m.onnx", function, WEIGHTS, (12, 12, 3))
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert sorted(operators) == ["Conv", "Identity", "Transpose", "Transpose"]


def test_the_graph_says_what_it_takes_and_holds_each_weight_once(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    weights = {"used": np.ones((3, 400), np.float32), "unused": np.ones((999, 99), np.float32)}

    def function(weights, x):
        return x @ weights["used"] + (2 * x) @ weights["used"]

    write_onnx(tmp_path / "m.onnx", function, weights, (4, 6, 3), output="features")
    model = onnx.load(tmp_path / "m.onnx")
    dims = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert dims == [["batch", 4, 6, 3], ["batch", 4, 6, 400]]
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["images", "features"]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    large = [x.name for x in model.graph.initializer if len(x.raw_data) > 1000]
    assert large == ["used"]


def test_weights_beside_the_file_are_aligned_for_mapping(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    monkeypatch.setattr("vitjax.interop.onnx.MAX_BYTES", 1000)
    images, function = batches(12), OPERATIONS["depthwise"]
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 6)).astype(np.float32)
    weights = WEIGHTS | {"kernel": kernel, "depthwise": np.ones((9, 9, 1, 6), np.float32)}
    written = write_onnx(tmp_path / "m.onnx", function, weights, (12, 12, 3))
    assert (
        {path.name for path in written}
        == {"m.onnx", "m.onnx.data"}
        == {path.name for path in tmp_path.iterdir()}
    )
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = [
        {entry.key: entry.value for entry in x.external_data}
        for x in model.graph.initializer
        if x.external_data
    ]
    assert len(places) == 2 and all(int(place["offset"]) % 4096 == 0 for place in places)
    for found, x in zip(run_onnx(written[0], images), images, strict=True):
        np.testing.assert_allclose(found, function(weights, x), rtol=1e-4, atol=1e-4)


def test_stablehlo_leaves_out_what_is_not_used(tmp_path, caplog):
    weights = {"used": np.full((3, 4), 2, np.float32), "unused": np.ones((999, 99), np.float32)}
    path = tmp_path / "m.stablehlo"
    write_stablehlo(path, lambda w, x: x @ w["used"], weights, (4, 6, 3))
    assert path.stat().st_size < 20_000
    assert not caplog.records  # not the way around that needs more memory
    assert [p.name for p in tmp_path.iterdir()] == ["m.stablehlo"]
    images = np.ones((2, 4, 6, 3), np.float32)
    call = jax.export.deserialize(bytearray(path.read_bytes())).call
    np.testing.assert_array_equal(call(images), np.full((2, 4, 6, 4), 6.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (5, 200, 3)], ids=str)
def test_stablehlo_takes_weights_of_every_size(dtype, shape, tmp_path, caplog):
    """Sizes change how many bytes a length takes, and a single value looks like its marker."""
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    weights = [values, (values * 2).astype(dtype), np.asarray(values[..., :1], dtype)
               if shape else values + values]  # fmt: skip
    path = tmp_path / "m.stablehlo"

    def function(weights, x):
        return x + sum(w.astype(jnp.float32).sum() for w in weights)

    write_stablehlo(path, function, weights, (2, 2, 3))
    assert not caplog.records
    images = np.ones((3, 2, 2, 3), np.float32)
    found = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    np.testing.assert_allclose(found, function(weights, jnp.asarray(images)), rtol=1e-5)


REFUSED = {
    "no rule": (lambda w, x: jnp.sort(x, axis=1), "no ONNX for the operation 'sort'.*allowed: abs"),
    "narrow": (
        lambda w, x: x.astype(jnp.bfloat16) * w["narrow"][:3].reshape(1, 1, 1, 3),
        r"computes in bfloat16 \(mul\).*precision.compute=\"float32\"",
    ),
    "indices from images": (
        lambda w, x: jnp.take(w["kernel"], x[:, 0, 0, 0].astype(jnp.int32), axis=3),
        "gather with indices that depend on the images",
    ),
    "transposed conv": (
        lambda w, x: jax.lax.conv_transpose(x, w["kernel"], (2, 2), "SAME"),
        r"conv_general_dilated with lhs_dilation \(2, 2\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_onnx_names_what_it_cannot_express(name, tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        write_onnx(tmp_path / "m.onnx", function, WEIGHTS, (12, 12, 3))
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_model_is_named_by_what_it_computes(tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    model = vit(**BIG, **SMALL, patch_size=8, precision=Precision(compute="bfloat16"))
    with pytest.raises(InputError, match="computes in bfloat16"):
        write_onnx(
            tmp_path / "m.onnx",
            lambda p, x: model.apply(p, x)["logits"],
            draw_params(model),
            (32, 32, 3),
        )
    assert not list(tmp_path.iterdir())


def test_stablehlo_refuses_weights_that_are_not_floats(tmp_path):
    with pytest.raises(InputError, match=r"weights of type int32.*allowed: float32, bfloat16"):
        write_stablehlo(
            tmp_path / "m.stablehlo", lambda w, x: x * w, np.ones((1, 1, 1, 3), np.int32), (4, 4, 3)
        )
    assert not list(tmp_path.iterdir())


def test_without_flatbuffers_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(InputError, match="pip install flatbuffers"):
        write_stablehlo(tmp_path / "m.stablehlo", lambda w, x: x * w, np.ones(1, "f4"), (4, 4, 3))
    assert not list(tmp_path.iterdir())
