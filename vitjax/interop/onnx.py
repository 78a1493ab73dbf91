"""A trained model as an ONNX file, for any runtime that reads opset 18.

The graph is made from the function's jaxpr (`onnx_graph.py`). The file is a protocol buffer: all
but its weights is made by the package `onnx`, and the weights are written into it, or beside it,
straight from where they are.

Source: https://onnx.ai/onnx/repo-docs/IR.html, https://protobuf.dev/programming-guides/encoding.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitjax.errors import InputError
from vitjax.interop import onnx_graph
from vitjax.interop.onnx_rules import RULES
from vitjax.parallel import path_name

PyTree = Any
OPSET = 18
IR_VERSION = 8  # the format's version of the time of that opset
MAX_BYTES = 2**31 - 2**24  # a protocol buffer's limit, and room for the graph
ALIGNMENT = 4096  # of weights beside the file, which runtimes then map into memory
INLINE_BYTES = 1024  # smaller constants stay in the graph: runtimes infer shapes from them
GRAPH, INITIALIZER, RAW_DATA = b"\x3a", b"\x2a", b"\x4a"  # tags: fields 7, 5 and 9, of bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _data(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _tensor(onnx: Any, name: str, array: np.ndarray) -> Any:
    """A tensor's description, without its data."""
    dtype = onnx_graph.DTYPES[array.dtype.name]
    return onnx.TensorProto(name=name, dims=array.shape, data_type=dtype)


def _write_inside(
    file: BinaryIO, onnx: Any, model: Any, constants: Mapping[str, np.ndarray]
) -> None:
    """The model with its weights as fields of its graph."""
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = []
    for name, array in constants.items():
        tensor = _tensor(onnx, name, array).SerializeToString()
        tensor += RAW_DATA + _varint(array.nbytes)
        heads.append(INITIALIZER + _varint(len(tensor) + array.nbytes) + tensor)
    size = len(graph) + sum(map(len, heads)) + sum(x.nbytes for x in constants.values())
    file.write(model.SerializeToString() + GRAPH + _varint(size) + graph)
    for head, array in zip(heads, constants.values(), strict=True):
        file.write(head)
        file.write(_data(array))


def _write_beside(
    file: BinaryIO, beside: Path, onnx: Any, model: Any, constants: Mapping[str, np.ndarray]
) -> None:
    """The model, and its weights in a second file."""
    partial = beside.with_name(beside.name + ".partial")
    with partial.open("wb") as weights:
        for name, array in constants.items():
            tensor = _tensor(onnx, name, array)
            if array.nbytes < INLINE_BYTES:
                tensor.raw_data = _data(array).tobytes()
            else:
                weights.write(bytes(-weights.tell() % ALIGNMENT))
                place = {
                    "location": beside.name, "offset": weights.tell(), "length": array.nbytes
                }  # fmt: skip
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                weights.write(_data(array))
            model.graph.initializer.append(tensor)
    file.write(model.SerializeToString())
    os.replace(partial, beside)


def _make_graph(
    function: Callable[[PyTree, Array], Array], params: PyTree, image_shape: tuple[int, int, int]
) -> tuple[onnx_graph.Graph, onnx_graph.Value, Any]:
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)

    def program(params: PyTree, images: Array) -> Array:
        return function(params, images).astype(jnp.float32)

    closed = jax.make_jaxpr(program)(params, images)
    graph = onnx_graph.Graph(batch, "images")
    inputs = [
        onnx_graph.constant(leaf, path_name(path))
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    inputs.append(onnx_graph.Value(images.shape, np.dtype(np.float32), "images"))
    (result,) = onnx_graph.convert(graph, RULES, closed, inputs)
    (aval,) = closed.out_avals
    return graph, graph.whole(result, aval.shape), aval


def write_onnx(
    path: Path,
    function: Callable[[PyTree, Array], Array],
    params: PyTree,
    image_shape: tuple[int, int, int],
    *,
    output: str = "output",
) -> list[Path]:
    """Writes a function of images, with its weights, as ONNX.

    The model takes "images", float32 `[batch, Y, X, C]` for any batch from 1, already normalised,
    and gives one float32 array. Beside the parameters, memory is only needed for what is computed
    from them once and for all, such as standardised kernels.

    Args:
      path: replaced if there is one.
      function: of the parameters and the images, to one array; computes in float32.
      params: arrays of JAX or NumPy in float32, bfloat16 or float16; narrow ones are stored as
        they are and cast in the graph; what is not used is left out.
      image_shape: (Y, X, C).
      output: the result's name.

    Returns:
      What was written: the file, and above 2 GiB also one with the weights, which it names and
      which must stay in the same folder.

    Raises:
      InputError: `onnx` is not installed, or the model does something that has no rule here.
    """
    try:
        import onnx
    except ImportError:
        raise InputError("ONNX needs the package onnx: pip install 'vitjax[onnx]'") from None
    graph, result, aval = _make_graph(function, params, image_shape)
    graph.nodes.append(("Identity", (graph.name(result),), output, {}))
    graph.prune([output])
    nodes = [
        onnx.helper.make_node(op, inputs, [name], name=name, **attributes)
        for op, inputs, name, attributes in graph.nodes
    ]
    floats = onnx.TensorProto.FLOAT
    dims = [d if onnx_graph.is_static(d) else "batch" for d in aval.shape]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "vitjax",
            [onnx.helper.make_tensor_value_info("images", floats, ["batch", *image_shape])],
            [onnx.helper.make_tensor_value_info(output, floats, dims)],
        ),
        producer_name="vitjax",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    size = sum(array.nbytes for array in graph.constants.values())
    partial, beside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".data")
    with partial.open("wb") as file:
        if size <= MAX_BYTES:
            _write_inside(file, onnx, model, graph.constants)
        else:
            _write_beside(file, beside, onnx, model, graph.constants)
    os.replace(partial, path)
    return [path] if size <= MAX_BYTES else [path, beside]
