"""From a function's jaxpr to the nodes of an ONNX graph.

Loops over layers are unrolled, calls are inlined, what depends on constants alone is computed
here, and what the result does not need is dropped. The rules, one a primitive, are in
`onnx_rules.py`.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from vitjax.errors import InputError

SMALL = 2**16  # bytes: constants of this size and of one name are stored once if they are equal
DTYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
NARROW = ("bfloat16", "float16")
LAYOUT = (  # these only move or store numbers, so their type does not matter
    "broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "slice",
    "dynamic_slice", "split", "iota", "copy", "copy_p", "name", "optimization_barrier",
    "sharding_constraint", "stop_gradient",
)  # fmt: skip
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold what a primitive calls


@dataclasses.dataclass(frozen=True)
class Value:
    """A result of the graph, or a constant.

    Attributes:
      shape: of its dimensions, those that a broadcast only repeats may still be 1, since the
        operators of ONNX repeat them themselves; `Graph.whole` gives all of it.
      name: in the graph; for a constant, what to call it once it is needed there.
      array: a constant's value.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    name: str
    array: np.ndarray | None = None


def constant(array: Any, name: str = "constant") -> Value:
    """A constant, which only becomes part of the graph when a node takes it."""
    array = np.asarray(array)
    return Value(tuple(array.shape), array.dtype, name, array)


def is_static(dim: Any) -> bool:
    return isinstance(dim, int | np.integer)


def broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape of an elementwise result: all of one rank, or scalars."""
    rank = max(len(shape) for shape in shapes)
    full = [shape if len(shape) == rank else (1,) * rank for shape in shapes]
    return tuple(
        next((d for d in dims if not (is_static(d) and d == 1)), 1)
        for dims in zip(*full, strict=True)
    )


class Graph:
    """Nodes and constants, gathered.

    Attributes:
      nodes: (operator, inputs, output, attributes), in an order that can be run.
      constants: the arrays that nodes take.
    """

    def __init__(self, batch: Any, images: str):
        self.nodes: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}
        self._batch, self._images = batch, images
        self._names: dict[Any, str] = {}
        self._shapes: dict[str, Value] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def _unique(self, name: str) -> str:
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}_{self._counts[name]}"

    def name(self, value: Value) -> str:
        """The value's name in the graph, to which a constant is added."""
        if value.array is None:
            return value.name
        x = value.array
        if x.nbytes <= SMALL:
            key: Any = (value.name, x.shape, x.dtype.name, x.tobytes())
        else:
            key = (x.shape, x.dtype.name, x.strides, x.__array_interface__["data"][0])
        if key not in self._names:
            self._names[key] = self._unique(value.name)
            self.constants[self._names[key]] = x
        return self._names[key]

    def node(
        self, op: str, *inputs: Value, shape: Sequence[Any], dtype: Any, **attributes: Any
    ) -> Value:
        """Adds a node with one output."""
        name = self._unique(op)
        self.nodes.append((op, tuple(self.name(v) for v in inputs), name, attributes))
        return Value(tuple(shape), np.dtype(dtype), name)

    def _dims(self, shape: Sequence[Any]) -> Value:
        """The shape as a value, the batch size read from the images."""
        if all(is_static(d) for d in shape):
            return constant(np.asarray(shape, np.int64), "shape")
        key = str(shape)
        if key in self._shapes:
            return self._shapes[key]
        parts = []
        for dim in shape:
            if is_static(dim):
                parts.append(constant(np.asarray([dim], np.int64), "shape"))
                continue
            factor = dim // self._batch
            assert is_static(factor) and factor * self._batch == dim, dim
            images = Value((), np.dtype(np.float32), self._images)
            part = self.node("Shape", images, shape=(1,), dtype=np.int64, start=0, end=1)
            if factor != 1:
                times = constant(np.asarray([factor], np.int64), "shape")
                part = self.node("Mul", part, times, shape=(1,), dtype=np.int64)
            parts.append(part)
        joined = self.node("Concat", *parts, shape=(len(parts),), dtype=np.int64, axis=0)
        return self._shapes.setdefault(key, joined)

    def whole(self, value: Value, shape: Sequence[Any]) -> Value:
        """The value with every dimension as long as it should be."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if value.array is not None and all(is_static(d) for d in shape):
            return constant(np.broadcast_to(value.array, shape), value.name)
        missing = [1 if d == have else d for d, have in zip(shape, value.shape, strict=True)]
        return self.node("Expand", value, self._dims(missing), shape=shape, dtype=value.dtype)

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if value.array is not None:
            return constant(value.array.reshape(shape), value.name)
        dims = [d if is_static(d) else -1 for d in shape]
        if dims.count(-1) > 1:
            raise InputError(f"ONNX cannot reshape to {shape}: the batch is in it twice")
        new = constant(np.asarray(dims, np.int64), "shape")
        return self.node("Reshape", value, new, shape=shape, dtype=value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = [int(i) for i in order]
        if order == sorted(order):
            return value
        if value.array is not None:
            return constant(value.array.transpose(order), value.name)
        shape = [value.shape[i] for i in order]
        return self.node("Transpose", value, shape=shape, dtype=value.dtype, perm=order)

    def slice(
        self, value: Value, starts: Sequence[int], limits: Sequence[Any], steps: Sequence[int]
    ) -> Value:
        cut = [
            i
            for i, (first, last, step) in enumerate(zip(starts, limits, steps, strict=True))
            if not (first == 0 and step == 1 and last == value.shape[i])
        ]
        if not cut:
            return value
        if value.array is not None:
            spans = zip(starts, limits, steps, strict=True)
            return constant(value.array[tuple(slice(*s) for s in spans)], value.name)
        shape = list(value.shape)
        for i in cut:
            shape[i] = -(-(limits[i] - starts[i]) // steps[i])
        columns = ([starts[i] for i in cut], [limits[i] for i in cut], cut, [steps[i] for i in cut])
        numbers = [constant(np.asarray(c, np.int64), "slice") for c in columns]
        return self.node("Slice", value, *numbers, shape=shape, dtype=value.dtype)

    def item(self, value: Value, index: int) -> Value:
        """One layer of what is stacked on a first dimension."""
        if value.array is not None:
            return constant(value.array[index], f"{value.name}/{index}")
        number = constant(np.asarray(index, np.int64), "index")
        return self.node("Gather", value, number, shape=value.shape[1:], dtype=value.dtype, axis=0)

    def prune(self, outputs: Sequence[str]) -> None:
        """Drops the nodes and constants that the outputs do not need."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node[2] in needed:
                needed.update(node[1])
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in needed}


Rule = Callable[..., Value | list[Value]]


def _fold(eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    """An equation's results where it has only constants, unless they would be larger than those.

    Casts of stored weights stay in the graph: the file would grow with them.
    """
    if any(v.array is None for v in values) or not values:
        return None
    shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    if not all(is_static(d) for shape in shapes for d in shape):
        return None
    size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
    if size > max(SMALL, sum(v.array.nbytes for v in values if v.array is not None)):
        return None
    arrays = [
        np.broadcast_to(v.array, var.aval.shape)  # type: ignore[arg-type]
        for v, var in zip(values, eqn.invars, strict=True)
    ]
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(*arrays, **eqn.params)
    out = out if eqn.primitive.multiple_results else [out]
    return [constant(x, values[0].name) for x in out]


def _scan(graph: Graph, rules: Mapping[str, Rule], eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    if "num_consts" in p:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    else:  # from jax 0.12 on
        num_consts, num_carry = (len(part) for part in p["ft_in"].unpack()[:2])
    fixed, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    stacked = values[num_consts + num_carry :]
    in_vars = eqn.invars[num_consts + num_carry :]
    stacked = [graph.whole(v, var.aval.shape) for v, var in zip(stacked, in_vars, strict=True)]
    layers: dict[int, list[Value]] = {}
    indices = range(p["length"])
    for i in reversed(indices) if p["reverse"] else indices:
        inputs = [*fixed, *carry, *(graph.item(v, i) for v in stacked)]
        out = convert(graph, rules, p["jaxpr"], inputs)
        carry, layers[i] = out[:num_carry], out[num_carry:]
    ends = []
    for k, var in enumerate(eqn.outvars[num_carry:]):
        shape = var.aval.shape
        parts = [graph.whole(layers[i][k], shape[1:]) for i in indices]
        parts = [graph.reshape(v, (1, *shape[1:])) for v in parts]
        ends.append(graph.node("Concat", *parts, shape=shape, dtype=var.aval.dtype, axis=0))
    return [*carry, *ends]


def convert(
    graph: Graph, rules: Mapping[str, Rule], closed: Any, inputs: Sequence[Value]
) -> list[Value]:
    """Adds a jaxpr to the graph.

    Args:
      rules: by a primitive's name, a function of (graph, equation, *values).
      closed: a jaxpr, with its constants if it has any.
      inputs: of the jaxpr.

    Raises:
      InputError: there is no rule, or something is computed in fewer than 32 bits.
    """
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(var: Any) -> Value:
        if isinstance(var, core.Literal):
            aval: Any = var.aval
            return constant(np.asarray(var.val, aval.dtype))
        return values[var]

    for eqn in jaxpr.eqns:
        name, args = eqn.primitive.name, [read(v) for v in eqn.invars]
        called = next((eqn.params[k] for k in CALLS if k in eqn.params), None)
        if name == "scan":
            out = _scan(graph, rules, eqn, args)
        elif called is not None and name not in rules:
            out = convert(graph, rules, called, args)
        elif name not in rules:
            raise InputError(
                f"no ONNX for the operation {name!r} of this model; "
                f"allowed: {', '.join(sorted(rules))}"
            )
        elif name in LAYOUT:
            out = rules[name](graph, eqn, *args)
        elif (out := _fold(eqn, args)) is None:
            for var in eqn.invars:
                if var.aval.dtype.name in NARROW:
                    raise InputError(
                        f"the model computes in {var.aval.dtype} ({name}), which ONNX runtimes "
                        'do not on CPUs; give it precision.compute="float32" (its weights may '
                        "be bfloat16)"
                    )
            out = rules[name](graph, eqn, *args)
        out = [out] if isinstance(out, Value) else out
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]
