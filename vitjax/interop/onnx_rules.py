"""What each JAX primitive that the models use is in ONNX, opset 18."""

import math
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.interop.onnx_graph import DTYPES, Graph, Rule, Value, broadcast, constant, is_static

ELEMENTWISE = {
    "abs": "Abs", "add": "Add", "and": "And", "ceil": "Ceil", "cos": "Cos", "div": "Div",
    "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual",
    "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less",
    "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "not": "Not", "or": "Or",
    "pow": "Pow", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
    "add_any": "Add",
}  # fmt: skip
SAME = (
    "copy", "copy_p", "name", "optimization_barrier", "sharding_constraint", "stop_gradient",
)  # fmt: skip
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


def _need(is_allowed: bool, eqn: Any, what: str) -> None:
    if not is_allowed:
        raise InputError(f"no ONNX for {eqn.primitive.name} with {what}")


def _apply(graph: Graph, op: str, *values: Value, **attributes: Any) -> Value:
    shape = broadcast([v.shape for v in values])
    return graph.node(op, *values, shape=shape, dtype=values[0].dtype, **attributes)


def _scalar(value: Value, number: float) -> Value:
    return constant(np.asarray(number, value.dtype))


def _elementwise(op: str) -> Rule:
    def rule(graph: Graph, eqn: Any, *values: Value) -> Value:
        shape = broadcast([v.shape for v in values])
        return graph.node(op, *values, shape=shape, dtype=eqn.outvars[0].aval.dtype)

    return rule


def _rsqrt(graph: Graph, eqn: Any, x: Value) -> Value:
    return _apply(graph, "Reciprocal", _apply(graph, "Sqrt", x))


def _erfc(graph: Graph, eqn: Any, x: Value) -> Value:
    return _apply(graph, "Sub", _scalar(x, 1), _apply(graph, "Erf", x))


def _expm1(graph: Graph, eqn: Any, x: Value) -> Value:
    return _apply(graph, "Sub", _apply(graph, "Exp", x), _scalar(x, 1))


def _log1p(graph: Graph, eqn: Any, x: Value) -> Value:
    return _apply(graph, "Log", _apply(graph, "Add", x, _scalar(x, 1)))


def _square(graph: Graph, eqn: Any, x: Value) -> Value:
    return _apply(graph, "Mul", x, x)


def _integer_pow(graph: Graph, eqn: Any, x: Value) -> Value:
    power = eqn.params["y"]
    if power == 2:
        return _apply(graph, "Mul", x, x)
    return _apply(graph, "Pow", x, _scalar(x, power))


def _not_equal(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    equal = graph.node("Equal", x, y, shape=broadcast([x.shape, y.shape]), dtype=np.bool_)
    return _apply(graph, "Not", equal)


def _select(graph: Graph, eqn: Any, which: Value, *cases: Value) -> Value:
    _need(len(cases) == 2 and which.dtype == np.bool_, eqn, f"{len(cases)} cases")
    shape = broadcast([which.shape, *(c.shape for c in cases)])
    return graph.node("Where", which, cases[1], cases[0], shape=shape, dtype=cases[0].dtype)


def _clamp(graph: Graph, eqn: Any, low: Value, x: Value, high: Value) -> Value:
    return _apply(graph, "Min", _apply(graph, "Max", x, low), high)


def _cast(graph: Graph, eqn: Any, x: Value) -> Value:
    dtype = np.dtype(eqn.params["new_dtype"])
    if dtype == x.dtype:
        return x
    _need(dtype.name in DTYPES, eqn, f"type {dtype}")
    if x.array is not None and (x.dtype.itemsize >= dtype.itemsize or x.array.size == 1):
        return constant(x.array.astype(dtype), x.name)
    return graph.node("Cast", x, shape=x.shape, dtype=dtype, to=DTYPES[dtype.name])


def _same(graph: Graph, eqn: Any, *values: Value) -> list[Value]:
    return list(values)


def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
    _need(eqn.params["dimensions"] is None, eqn, "dimensions")
    return graph.reshape(graph.whole(x, eqn.invars[0].aval.shape), eqn.outvars[0].aval.shape)


def _squeeze(graph: Graph, eqn: Any, x: Value) -> Value:
    gone = [d % len(x.shape) for d in eqn.params["dimensions"]]
    return graph.reshape(x, [d for i, d in enumerate(x.shape) if i not in gone])


def _broadcast_in_dim(graph: Graph, eqn: Any, x: Value) -> Value:
    shape: list[Any] = [1] * len(eqn.params["shape"])
    for dim, length in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        shape[dim] = length
    return graph.reshape(x, shape)


def _transpose(graph: Graph, eqn: Any, x: Value) -> Value:
    return graph.transpose(x, eqn.params["permutation"])


def _slice(graph: Graph, eqn: Any, x: Value) -> Value:
    p, x = eqn.params, graph.whole(x, eqn.invars[0].aval.shape)
    return graph.slice(
        x, p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(x.shape)
    )


def _dynamic_slice(graph: Graph, eqn: Any, x: Value, *starts: Value) -> Value:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    firsts = []
    for dim, size, start in zip(shape, sizes, starts, strict=True):
        _need(start.array is not None or dim == size, eqn, "a start that depends on the images")
        firsts.append(0 if dim == size else min(max(int(start.array), 0), dim - size))  # type: ignore[arg-type]
    limits = [first + size for first, size in zip(firsts, sizes, strict=True)]
    return graph.slice(graph.whole(x, shape), firsts, limits, [1] * len(sizes))


def _split(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    axis, first, out = eqn.params["axis"], 0, []
    x = graph.whole(x, eqn.invars[0].aval.shape)
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(x.shape), list(x.shape)
        starts[axis], limits[axis] = first, first + size
        out.append(graph.slice(x, starts, limits, [1] * len(starts)))
        first += size
    return out


def _unstack(graph: Graph, eqn: Any, x: Value) -> list[Value]:
    axis, found = eqn.params["axis"], []
    x = graph.whole(x, eqn.invars[0].aval.shape)
    for index, var in enumerate(eqn.outvars):
        starts, limits = [0] * len(x.shape), list(x.shape)
        starts[axis], limits[axis] = index, index + 1
        one = graph.slice(x, starts, limits, [1] * len(starts))
        found.append(graph.reshape(one, var.aval.shape))
    return found


def _concatenate(graph: Graph, eqn: Any, *values: Value) -> Value:
    parts = [graph.whole(v, var.aval.shape) for v, var in zip(values, eqn.invars, strict=True)]
    out, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    return graph.node("Concat", *parts, shape=out.shape, dtype=out.dtype, axis=axis)


def _pad(graph: Graph, eqn: Any, x: Value, fill: Value) -> Value:
    config = eqn.params["padding_config"]
    _need(all(a >= 0 and b >= 0 and not c for a, b, c in config), eqn, f"padding {config}")
    pads = constant(np.asarray([[c[0] for c in config], [c[1] for c in config]], np.int64).ravel())
    out = eqn.outvars[0].aval
    x = graph.whole(x, eqn.invars[0].aval.shape)
    return graph.node("Pad", x, pads, fill, shape=out.shape, dtype=out.dtype)


def _iota(graph: Graph, eqn: Any) -> Value:
    dim, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    _need(is_static(shape[dim]), eqn, "the batch's length")
    numbers = np.arange(shape[dim], dtype=eqn.params["dtype"])
    return constant(numbers.reshape([-1 if i == dim else 1 for i in range(len(shape))]))


def _fixed_columns(graph: Graph, eqn: Any, x: Value, table: np.ndarray) -> tuple[Value, list[int]]:
    """Slices along the dimensions in which every index is the same, and says which are left."""
    dims, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    starts, left = [0] * len(shape), []
    for column, dim in enumerate(dims.start_index_map):
        if len(table) > 1 and (dim in dims.collapsed_slice_dims or np.ptp(table[:, column])):
            left.append(dim)
        else:
            starts[dim] = int(table[0, column])
    limits = [
        d if i in left else first + size
        for i, (d, first, size) in enumerate(
            zip(shape, starts, eqn.params["slice_sizes"], strict=True)
        )
    ]
    return graph.slice(graph.whole(x, shape), starts, limits, [1] * len(shape)), left


def _gather(graph: Graph, eqn: Any, x: Value, indices: Value) -> Value:
    """What static indexing becomes: one slice, or indices along one dimension."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    index_shape, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval
    _need(not dims.operand_batching_dims, eqn, "batched indices")
    _need(indices.array is not None, eqn, "indices that depend on the images")
    table = graph.whole(indices, index_shape).array
    assert table is not None
    rows = table.reshape(-1, index_shape[-1])
    x, left = _fixed_columns(graph, eqn, x, rows)
    if not left:
        return graph.reshape(x, out.shape)
    (axis, *more), rank = left, len(index_shape) - 1
    kept = tuple(i for i in range(len(out.shape)) if not axis <= i < axis + rank)
    is_simple = tuple(dims.collapsed_slice_dims) == (axis,) and tuple(dims.offset_dims) == kept
    _need(not more and is_simple and sizes[axis] == 1, eqn, "indices along several dimensions")
    along = rows[:, dims.start_index_map.index(axis)].reshape(index_shape[:-1])
    chosen = constant(along.astype(np.int64), "indices")
    return graph.node("Gather", x, chosen, shape=out.shape, dtype=out.dtype, axis=axis)


def _reduce(op: str) -> Rule:
    def rule(graph: Graph, eqn: Any, x: Value) -> Value:
        axes = constant(np.asarray(eqn.params["axes"], np.int64), "axes")
        out = eqn.outvars[0].aval
        x = graph.whole(x, eqn.invars[0].aval.shape)
        return graph.node(op, x, axes, shape=out.shape, dtype=out.dtype, keepdims=0)

    return rule


def _dot_general(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    x = graph.whole(x, eqn.invars[0].aval.shape)
    y = graph.whole(y, eqn.invars[1].aval.shape)
    x_free = [i for i in range(len(x.shape)) if i not in (*x_sum, *x_batch)]
    y_free = [i for i in range(len(y.shape)) if i not in (*y_sum, *y_batch)]
    batch, rows = [x.shape[i] for i in x_batch], [x.shape[i] for i in x_free]
    depth, width = (math.prod(y.shape[i] for i in dims) for dims in (y_sum, y_free))
    left = rows if rows and not batch else [math.prod(rows)]  # a plain product takes any rows
    x = graph.reshape(graph.transpose(x, [*x_batch, *x_free, *x_sum]), [*batch, *left, depth])
    y = graph.reshape(graph.transpose(y, [*y_batch, *y_sum, *y_free]), [*batch, depth, width])
    z = graph.node("MatMul", x, y, shape=[*batch, *left, width], dtype=out.dtype)
    return graph.reshape(z, out.shape)


def _conv(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    p, out = eqn.params, eqn.outvars[0].aval
    dims = p["dimension_numbers"]
    _need(set(p["lhs_dilation"]) == {1}, eqn, f"lhs_dilation {p['lhs_dilation']}")
    _need(p["batch_group_count"] == 1, eqn, "batch groups")
    _need(all(a >= 0 and b >= 0 for a, b in p["padding"]), eqn, f"padding {p['padding']}")
    x = graph.transpose(graph.whole(x, eqn.invars[0].aval.shape), dims.lhs_spec)
    kernel = graph.transpose(graph.whole(kernel, eqn.invars[1].aval.shape), dims.rhs_spec)
    y = graph.node(
        "Conv", x, kernel, shape=[out.shape[i] for i in dims.out_spec], dtype=out.dtype,
        strides=list(p["window_strides"]), dilations=list(p["rhs_dilation"]),
        pads=[int(a) for a, _ in p["padding"]] + [int(b) for _, b in p["padding"]],
        group=p["feature_group_count"],
    )  # fmt: skip
    return graph.transpose(y, np.argsort(dims.out_spec).tolist())


def _pool(op: str, **attributes: Any) -> Rule:
    def rule(graph: Graph, eqn: Any, x: Value) -> Value:
        p, out = eqn.params, eqn.outvars[0].aval
        window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
        whole = zip(window, strides, padding, strict=True)
        free = [i for i, (w, s, pad) in enumerate(whole) if w == s == 1 and tuple(pad) == (0, 0)]
        _need(len(free) >= 2, eqn, f"a window of {window}")
        _need(set(p["base_dilation"]) | set(p["window_dilation"]) == {1}, eqn, "dilation")
        first = [free[0], free[-1]]  # ONNX pools over all dimensions but two, which come first
        spatial = [i for i in range(len(window)) if i not in first]
        order = first + spatial
        y = graph.node(
            op, graph.transpose(graph.whole(x, eqn.invars[0].aval.shape), order),
            shape=[out.shape[i] for i in order], dtype=out.dtype,
            kernel_shape=[window[i] for i in spatial], strides=[strides[i] for i in spatial],
            pads=[int(padding[i][side]) for side in (0, 1) for i in spatial], **attributes,
        )  # fmt: skip
        if op == "AveragePool":
            y = _apply(graph, "Mul", y, _scalar(y, math.prod(window)))
        return graph.transpose(y, np.argsort(order).tolist())

    return rule


RULES: dict[str, Rule] = {
    **{name: _elementwise(op) for name, op in ELEMENTWISE.items()},
    **{name: _reduce(op) for name, op in REDUCTIONS.items()},
    **dict.fromkeys(SAME, _same),
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "erfc": _erfc,
    "expm1": _expm1,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "log1p": _log1p,
    "ne": _not_equal,
    "pad": _pad,
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool", count_include_pad=1),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "square": _square,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
