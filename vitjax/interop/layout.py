"""Tables of names: where a format keeps each of our arrays, and in which layout.

One table serves both ways: it only renames, reshapes, transposes, splits and stacks, so what is
read and written again is the same to the last bit.
"""

import dataclasses
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import einops
import jax
import numpy as np

from vitjax.errors import InputError
from vitjax.interop.ahead import ahead
from vitjax.parallel import path_name

PyTree = Any
STACKED = "blocks/"  # our arrays under this name are stacked over the blocks


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, and where a format keeps it.

    Attributes:
      ours: its path, such as "blocks/mlp/up/kernel".
      theirs: its name there; "{i}" stands for the block's number. Several names are stacked on a
        new first dimension, "s" in the pattern. A name without "{i}" for one of our stacked
        arrays means that they are stacked there too.
      pattern: an einops pattern from their layout to ours, of one block; "" for the same.
      rows: (start, stop, total): the array there holds several of ours one above the other; this
        one is the rows from start to stop, of total, in units of a total-th of its length. Never
        stacked.
    """

    ours: str
    theirs: str | tuple[str, ...]
    pattern: str = ""
    rows: tuple[int, int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def is_stacked(self) -> bool:
        return self.ours.startswith(STACKED)

    @property
    def is_numbered(self) -> bool:
        return "{i}" in self.names[0]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what it is, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    produce: Callable[[], np.ndarray]


def _rearrange(x: Any, pattern: str, sizes: Mapping[str, int], *, back: bool) -> Any:
    if not pattern:
        return x
    left, right = (side.strip() for side in pattern.split("->"))
    if back:
        left, right = right, left
    split = re.findall(r"\w+", " ".join(re.findall(r"\(.*?\)", left)))
    known = {name: sizes[name] for name in split if name in sizes}
    return einops.rearrange(x, f"{left} -> {right}", **known)


def _to_ours(leaf: Leaf, parts: Sequence[Any], sizes: Mapping[str, int]) -> Any:
    x = parts[0] if isinstance(leaf.theirs, str) else np.stack(parts)
    if leaf.rows is not None:
        start, stop, total = leaf.rows
        unit = x.shape[0] // total
        x = x[start * unit : stop * unit]
    return _rearrange(x, leaf.pattern, sizes, back=False)


def _to_theirs(leaf: Leaf, x: Any, sizes: Mapping[str, int]) -> list[Any]:
    x = _rearrange(x, leaf.pattern, sizes, back=True)
    return [x] if isinstance(leaf.theirs, str) else list(x)


def _their_shape(leaf: Leaf, ours: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape there of each name, of one block where ours is stacked."""
    block = ours[1:] if leaf.is_stacked else ours
    there = jax.eval_shape(
        lambda x: _rearrange(x, leaf.pattern, sizes, back=True),
        jax.ShapeDtypeStruct(block, np.float32),
    ).shape
    there = there if isinstance(leaf.theirs, str) else there[1:]
    if leaf.rows is not None:
        start, stop, total = leaf.rows
        there = (there[0] // (stop - start) * total, *there[1:])
    return (ours[0], *there) if leaf.is_stacked and not leaf.is_numbered else there


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that JAX on CPUs takes as its own without a copy: it starts at a page.

    In huge pages where the system has them: the first touch of 1.2 GB takes 0.3 s, not 2.4 s.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 2**21:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)


def copy_into(out: np.ndarray, x: np.ndarray) -> None:
    """Copies; where `x` is transposed by blocks that a cache holds, nine times as fast.

    A block is 64 wide along the dimension that is contiguous in `out`, and as long as the one that
    is contiguous in `x`.
    """
    if x.ndim < 2 or x.strides[-1] == x.itemsize:
        out[...] = x
        return
    line = int(np.argmin(x.strides))
    others = [dim for dim in range(x.ndim - 1) if dim != line]
    for place in np.ndindex(*(x.shape[dim] for dim in others)):
        index: list[Any] = [slice(None)] * x.ndim
        for dim, at in zip(others, place, strict=True):
            index[dim] = at
        for start in range(0, x.shape[-1], 64):
            index[-1] = slice(start, start + 64)
            out[tuple(index)] = x[tuple(index)]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> PyTree:
    """A nested dict from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def expected_shapes(
    leaves: Iterable[Leaf], abstract_params: PyTree, sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Every name that a format must hold for the model, with its shape there."""
    ours, found = named_leaves(abstract_params), {}
    for leaf in leaves:
        shape = ours[leaf.ours].shape
        there = _their_shape(leaf, tuple(shape), sizes)
        numbers = range(shape[0]) if leaf.is_stacked and leaf.is_numbered else (0,)
        found |= {name.format(i=i): there for i in numbers for name in leaf.names}
    return found


def check_complete(leaves: Sequence[Leaf], abstract_params: PyTree) -> None:
    """Our own invariant: a table names every array of the model exactly once."""
    listed = [leaf.ours for leaf in leaves]
    wanted = set(named_leaves(abstract_params))
    assert len(set(listed)) == len(listed) and set(listed) == wanted, (
        f"the table and the model differ in {set(listed) ^ wanted or listed}"
    )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raises InputError where a file lacks an array of the model or has it in another shape."""
    lines = [f"{name}: missing, {shape} wanted" for name, shape in expected.items()
             if name not in found]  # fmt: skip
    lines += [
        f"{name}: {tuple(found[name])} in the file, {shape} wanted"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if lines:
        shown = "\n  ".join(lines[:5])
        raise InputError(
            f"{where} does not hold the model that it describes; "
            f"{len(lines)} of {len(expected)} arrays differ:\n  {shown}"
        )


class Deferred:
    """One of our arrays that is still in a file: read when NumPy asks, a block at a time by index.

    What is only copied from one file to another never lies in memory whole.
    """

    def __init__(self, leaf: Leaf, like: Any, read: Callable, sizes: Mapping[str, int]):
        self.shape, self.dtype = tuple(like.shape), np.dtype(like.dtype)
        self.size, self.ndim = like.size, like.ndim
        self._leaf, self._read, self._sizes = leaf, read, sizes
        self._last: tuple[int, Any] = (-1, None)

    def __getitem__(self, i: int) -> np.ndarray:
        if not (self._leaf.is_stacked and self._leaf.is_numbered):
            return np.asarray(self)[i]
        if self._last[0] != i:  # one block of ours may be several arrays elsewhere
            parts = [self._read(name.format(i=i)) for name in self._leaf.names]
            self._last = i, _to_ours(self._leaf, parts, self._sizes).astype(self.dtype, copy=False)
        return self._last[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        found = _read_leaf(self._leaf, self, self._read, self._sizes)
        return found if dtype is None else found.astype(dtype, copy=False)


def _read_leaf(
    leaf: Leaf, like: Any, read: Callable[[str], np.ndarray], sizes: Mapping[str, int]
) -> np.ndarray:
    out = empty(tuple(like.shape), like.dtype)
    if leaf.is_stacked and leaf.is_numbered:

        def block(i: int) -> list[np.ndarray]:
            return [read(name.format(i=i)) for name in leaf.names]

        blocks = ahead(partial(block, i) for i in range(like.shape[0]))
        for row, parts in zip(out, blocks, strict=True):
            copy_into(row, _to_ours(leaf, parts, sizes))
        return out
    whole = [read(name) for name in leaf.names]
    rows = zip(out, *whole, strict=True) if leaf.is_stacked else [(out, *whole)]
    for row, *parts in rows:
        copy_into(row, _to_ours(leaf, parts, sizes))
    return out


def read_params(
    leaves: Sequence[Leaf],
    abstract_params: PyTree,
    read: Callable[[str], np.ndarray],
    sizes: Mapping[str, int],
    place: Callable[[np.ndarray], Any] = lambda x: x,
) -> PyTree:
    """The parameters, with one array of the file in memory beside them at a time.

    Args:
      leaves: a complete table, checked against the file's shapes.
      read: gives an array of the file by its name.
      sizes: lengths of the axes that patterns split, such as {"h": heads}.
      place: what is done with each finished array, such as `jax.device_put`.
    """
    ours, params = named_leaves(abstract_params), {}
    for leaf in leaves:
        params[leaf.ours] = place(_read_leaf(leaf, ours[leaf.ours], read, sizes))
    return nested(params)


def defer_params(
    leaves: Sequence[Leaf],
    abstract_params: PyTree,
    read: Callable[[str], np.ndarray],
    sizes: Mapping[str, int],
) -> PyTree:
    """As `read_params`, with nothing read yet."""
    ours = named_leaves(abstract_params)
    return nested({x.ours: Deferred(x, ours[x.ours], read, sizes) for x in leaves})


def _joined(
    leaves: Sequence[Leaf], ours: Mapping[str, Any], sizes: Mapping[str, int], dtype: str
) -> Callable[[], np.ndarray]:
    def produce() -> np.ndarray:
        parts = sorted(leaves, key=lambda leaf: leaf.rows or (0, 0, 0))
        made = [_to_theirs(leaf, np.asarray(ours[leaf.ours]), sizes)[0] for leaf in parts]
        return np.concatenate(made).astype(dtype, copy=False)

    return produce


def tensors(
    leaves: Sequence[Leaf], params: PyTree, sizes: Mapping[str, int], dtype: str
) -> Iterator[Tensor]:
    """What a format writes for the parameters, each array made when it is asked for."""
    ours = named_leaves(params)
    for leaf in leaves:
        x = ours[leaf.ours]
        there = _their_shape(leaf, tuple(x.shape), sizes)
        if leaf.rows is not None:
            if leaf.rows[0] == 0:  # the first of those that share the name writes all of them
                shared = [other for other in leaves if other.theirs == leaf.theirs]
                yield Tensor(leaf.names[0], there, dtype, _joined(shared, ours, sizes, dtype))
            continue
        numbers = range(x.shape[0]) if leaf.is_stacked and leaf.is_numbered else (None,)
        for i in numbers:
            for part, name in enumerate(leaf.names):

                def produce(leaf=leaf, x=x, i=i, part=part, there=there) -> np.ndarray:
                    is_deferred = isinstance(x, Deferred) and i is not None
                    whole = x if is_deferred else np.asarray(x)
                    kept = not leaf.pattern and isinstance(leaf.theirs, str)
                    if kept and whole.dtype == dtype:
                        return np.asarray(whole if i is None else whole[i])
                    out = np.empty(there, dtype)
                    if leaf.is_stacked and i is None:
                        for row, block in zip(out, np.asarray(whole), strict=True):
                            copy_into(row, _to_theirs(leaf, block, sizes)[part])
                    else:
                        block = np.asarray(whole) if i is None else whole[i]
                        copy_into(out, _to_theirs(leaf, block, sizes)[part])
                    return out

                yield Tensor(name.format(i=i), there, dtype, produce)
