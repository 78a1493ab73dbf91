"""A trained model as one file of StableHLO, program and weights, that JAX runs without vitjax:

    call = jax.export.deserialize(Path("model.stablehlo").read_bytes()).call
    logits = call(images)

`jax.export` alone makes such a file of a function that closes over its weights, in seven times
the file's size of memory (seen with ViT-L/16). Here the program is exported with a single value, a
marker, in the place of each array, and the arrays are then written from where they are into the
gaps: the two formats around them, MLIR's bytecode and a FlatBuffer, only have their lengths and
offsets changed. Where a jaxlib lays these out in another way, the file is made as JAX makes it.

Source: https://mlir.llvm.org/docs/BytecodeFormat, https://flatbuffers.dev/internals.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jaxtyping import Array

from vitjax.errors import InputError

log = logging.getLogger("vitjax")
PyTree = Any
PLATFORMS = ("cpu", "cuda", "tpu")
# What a FlatBuffer may be. JAX read a ViT-H/14 of 2.4 GiB back and ran it on a CPU; whether the
# compilers of GPUs and TPUs take such a program has not been tried.
MAX_BYTES = 2**31 - 2**24
ELEMENTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
FIRST_MARKER = 0x5A5B  # read as a number: large and odd, so no model has it among its constants
HEADER = b"ML\xefR" + b"\x0d"  # the magic number and version 6, the layout that is known here
ATTRIBUTES, OFFSETS = 2, 3  # sections of the bytecode

_placeholder = Primitive("vitjax_placeholder")
_placeholder.def_abstract_eval(lambda *, index, shape, dtype: ShapedArray(shape, dtype))


def _marker(index: int, dtype: np.dtype) -> bytes:
    first = FIRST_MARKER << 8 * (dtype.itemsize - 2)
    return (first + index).to_bytes(dtype.itemsize, "little")


def _lower_placeholder(_, *, index: int, shape: tuple[int, ...], dtype: np.dtype):
    element = ir.Type.parse(ELEMENTS[dtype.name])
    value = ir.FloatAttr.get(element, float(np.frombuffer(_marker(index, dtype), dtype)[0]))
    kind = ir.RankedTensorType.get(shape, element)
    return [stablehlo.constant(ir.DenseElementsAttr.get_splat(kind, value))]


mlir.register_lowering(_placeholder, _lower_placeholder)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of MLIR's bytecode and where the next begins."""
    if data[at] == 0:
        return int.from_bytes(data[at + 1 : at + 9], "little"), at + 9
    size = (data[at] & -data[at]).bit_length()
    return int.from_bytes(data[at : at + size], "little") >> size, at + size


def _varint(value: int) -> bytes:
    size = max(1, -(-value.bit_length() // 7))
    if size > 8:
        return b"\0" + value.to_bytes(8, "little")
    return ((value << 1 | 1) << (size - 1)).to_bytes(size, "little")


class _UnknownLayout(Exception):
    """This jaxlib writes bytecode otherwise than is known here."""


def _check(is_understood: bool, what: str) -> None:
    if not is_understood:
        raise _UnknownLayout(what)


def _sections(module: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at < len(module):
        kind = module[at]
        _check(kind < 0x80, "an aligned section")
        length, at = _read_varint(module, at + 1)
        yield kind, module[at : at + length]
        at += length


def _fill(module: bytes, arrays: list[np.ndarray]) -> list[bytes | np.ndarray]:
    """The pieces of a bytecode module in which the arrays stand where their markers were."""
    _check(module.startswith(HEADER), f"bytecode that begins with {module[:5]!r}")
    start = module.index(b"\0", len(HEADER)) + 1  # after the producer's name
    sections = dict(_sections(module, start))
    ends = {_varint(len(m)) + m: i for i, m in enumerate(_marker(i, a.dtype)
            for i, a in enumerate(arrays))}  # fmt: skip
    encoded, table = sections[ATTRIBUTES], sections[OFFSETS]
    num_attributes, at = _read_varint(table, 0)
    num_types, at = _read_varint(table, at)
    offsets, pieces, seen, done, left = [table[:at]], [], set(), 0, 0
    while done < num_attributes + num_types:
        group = at
        _, at = _read_varint(table, at)  # a dialect
        count, at = _read_varint(table, at)
        offsets.append(table[group:at])
        for _ in range(count):
            entry, at = _read_varint(table, at)
            one, left = encoded[left : left + (entry >> 1)], left + (entry >> 1)
            index = next((ends[one[-n:]] for n in (3, 5) if one[-n:] in ends), None)
            pieces.append(one)
            if index is not None and done < num_attributes:
                _check(index not in seen, f"the marker of array {index} twice")
                seen.add(index)
                array = arrays[index]
                size = _varint(array.nbytes)
                pieces[-1:] = [one[: -1 - array.itemsize] + size, array]
                entry += (len(size) - 1 + array.nbytes - array.itemsize) << 1
            offsets.append(_varint(entry))
            done += 1
    _check(len(seen) == len(arrays), f"{len(seen)} markers of {len(arrays)}")
    out: list[bytes | np.ndarray] = [module[:start]]
    for kind, content in sections.items():
        parts = {ATTRIBUTES: pieces, OFFSETS: offsets}.get(kind, [content])
        out += [bytes([kind]) + _varint(_size(parts)), *parts]
    return out


def _size(parts: list[Any]) -> int:
    return sum(part.nbytes if isinstance(part, np.ndarray) else len(part) for part in parts)


def _move_to_end(file: bytes, module: bytes) -> bytes:
    """Makes a FlatBuffer's field that holds a module point at the end of the buffer instead."""
    out = bytearray(file) + bytes(-len(file) % 4)
    vector = file.index(module) - 4
    root = int.from_bytes(file[:4], "little")
    fields = root - int.from_bytes(file[root : root + 4], "little", signed=True)
    length = int.from_bytes(file[fields : fields + 2], "little")
    for slot in range(fields + 4, fields + length, 2):
        field = root + int.from_bytes(file[slot : slot + 2], "little")
        if field > root and field + int.from_bytes(file[field : field + 4], "little") == vector:
            out[field : field + 4] = (len(out) - field).to_bytes(4, "little")
            return bytes(out)
    raise _UnknownLayout("no field that points at the module")


def write_stablehlo(
    path: Path,
    function: Callable[[PyTree, Array], Array],
    params: PyTree,
    image_shape: tuple[int, int, int],
) -> None:
    """Writes a function of images, with its weights inside, for CPUs, CUDA GPUs and TPUs.

    The file takes float32 images `[b, Y, X, C]`, already normalised, for any b from 1, and gives
    one float32 array. Beside the parameters themselves, no memory of their size is needed.

    Args:
      path: replaced if there is one.
      function: of the parameters and the images, to one array. Its products are computed in what
        it was built for, so a bfloat16 model stays one.
      params: float32, bfloat16 or float16 arrays of JAX or NumPy; what is not used is left out.
      image_shape: (Y, X, C).

    Raises:
      InputError: the weights do not fit into one file, are not floating-point numbers, or
        `flatbuffers` is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise InputError(
            "StableHLO files need the package flatbuffers: pip install flatbuffers"
        ) from None
    leaves, tree = jax.tree.flatten(params)
    for leaf in leaves:
        if str(leaf.dtype) not in ELEMENTS:
            raise InputError(
                f"weights of type {leaf.dtype} do not go into StableHLO; allowed: "
                f"{', '.join(ELEMENTS)}"
            )
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if total > MAX_BYTES:
        raise InputError(
            f"{total / 2**30:.2f} GiB of weights do not fit into a StableHLO file, which holds "
            f"at most {MAX_BYTES / 2**30:.2f} GiB; --dtype=bfloat16 halves float32 weights"
        )

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)

    def program(leaves: list[Any], images: Array) -> Array:
        return function(jax.tree.unflatten(tree, leaves), images).astype(jnp.float32)

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)  # for any batch, JAX keeps them all
    used = jax.export.export(jax.jit(program))(shapes, one).module_kept_var_idx
    used = [index for index in used if index < len(leaves)]

    def with_markers(images: Array) -> Array:
        stand_ins: list[Array] = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        for place, index in enumerate(used):
            shape, dtype = tuple(leaves[index].shape), np.dtype(leaves[index].dtype)
            stand_ins[index] = _placeholder.bind(index=place, shape=shape, dtype=dtype)
        return program(stand_ins, images)

    exported = jax.export.export(jax.jit(with_markers), platforms=PLATFORMS)(images)
    module = exported.mlir_module_serialized
    try:
        pieces = _fill(module, [np.asarray(leaves[index]) for index in used])
        head = _move_to_end(bytes(exported.serialize()), module)
        head += _size(pieces).to_bytes(4, "little")
    except _UnknownLayout as error:
        log.warning("jaxlib %s: %s; needs more memory", jax.lib.__version__, error)
        whole = jax.jit(lambda images: program(leaves, images))
        exported = jax.export.export(whole, platforms=PLATFORMS)(images)
        head, pieces = bytes(exported.serialize()), []
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(head)
        for piece in pieces:
            is_array = isinstance(piece, np.ndarray)
            file.write(
                np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data if is_array else piece
            )
    os.replace(temporary, path)
