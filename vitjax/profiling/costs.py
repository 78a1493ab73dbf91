"""What one call of an instruction of a compiled program must do at least: products and bytes.

Everything is read from the text of XLA's optimised program. FLOPs are 2 x multiply-accumulate of
matrix products, convolutions and fused attention; other arithmetic counts as none, as memory binds
it. Bytes are those that the instruction reads and writes if nothing is in a cache already.
"""

import collections
import functools
import math
import re

import numpy as np

from vitjax.planning import program
from vitjax.planning.program import Instruction

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
CONTAINERS = ("while", "conditional", "call", "async-start")
_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "get-tuple-element", "tuple", "parameter", "constant", "after-all")

# Products of a fused attention kernel: query-key and weights-value; backward the first again, and
# the gradients of query, key, value and weights.
_ATTENTION_PRODUCTS = {"forward": 2, "backward": 5}


def dims_of(text: str) -> list[list[int]]:
    """The dimensions of each array in a type such as "(f32[8,128]{1,0}, s8[4]{0})"."""
    return [[int(d) for d in dims.split(",") if d] for _, dims in _ARRAY.findall(text)]


def _numbers(name: str, text: str) -> list[int]:
    """Of `name={0,2}` or, in a backend's JSON, `"name":["0","2"]`."""
    found = re.search(rf'\b{name}"?[=:] ?[{{\[]([\d", ]*)[}}\]]', text)
    return [int(d) for d in re.findall(r"\d+", found[1])] if found else []


class Program:
    """A compiled program by the names of its instructions, which profilers know.

    Args:
      text: of the optimised program (`compiled.as_text()`).
    """

    def __init__(self, text: str):
        self.computations, self.entry = program.parse(text)
        header = re.match(r"HloModule ([\w.\-]+)", text)
        self.module = header[1] if header else ""
        self.instructions = {i.name: i for body in self.computations.values() for i in body}

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How often a step runs each instruction, for loops whose trips are known."""
        counts: dict[str, int] = {}
        for _, instruction, count in program.walk(self.computations, self.entry):
            counts[instruction.name] = counts.get(instruction.name, 0) + count
        return counts

    def called(self, instruction: Instruction) -> list[str]:
        """The computations that an instruction names."""
        names = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
            names += re.findall(r"[\w.\-]+", branches)
        return names

    def inside(self, instruction: Instruction) -> list[tuple[Instruction, int]]:
        """Every instruction of the computations that one calls, and how often each runs."""
        alone = collections.ChainMap({"": [instruction]}, self.computations)
        return [(inner, count) for _, inner, count in program.walk(alone, "")][1:]

    def operands(self, instruction: Instruction) -> list[str]:
        """The names of its operands."""
        depth, end = 1, len(instruction.rest)
        for position, letter in enumerate(instruction.rest):
            depth += (letter in "({[") - (letter in ")}]")
            if depth == 0:
                end = position
                break
        text = re.sub(r"/\*.*?\*/", "", instruction.rest[:end])
        return [n for n in re.findall(r"%([\w.\-]+)", text) if n in self.instructions]

    def types(self, instruction: Instruction) -> list[str]:
        """The types of its operands."""
        return [self.instructions[name].type for name in self.operands(instruction)]

    def flops(self, instruction: Instruction) -> float:
        """FLOPs of one call, of what it calls included."""
        inner = sum(self._own_flops(i) * count for i, count in self.inside(instruction))
        return self._own_flops(instruction) + inner

    def _own_flops(self, instruction: Instruction) -> float:
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "dot":
            left = dims_of(self.types(instruction)[0])[0]
            contracted = math.prod(left[d] for d in _numbers("lhs_contracting_dims", rest))
            return 2.0 * math.prod(dims_of(instruction.type)[0]) * contracted
        if opcode == "convolution":
            left, right = self.types(instruction)[:2]
            return _convolution(left, right, instruction.type, rest)
        target = target_of(instruction)
        if target.startswith("__cublas$"):
            left = dims_of(self.types(instruction)[0])[0]
            contracted = math.prod(left[d] for d in _numbers("lhs_contracting_dimensions", rest))
            return 2.0 * math.prod(dims_of(instruction.type)[0]) * contracted
        if target.startswith("__onednn$matmul"):
            left, right = (dims_of(t)[0] for t in self.types(instruction)[:2])
            return _matmul(left, right, dims_of(instruction.type)[0])
        if target.startswith("__cudnn$fmha"):
            query, key = (dims_of(t)[0] for t in self.types(instruction)[:2])
            way = "backward" if "Backward" in target else "forward"
            return _ATTENTION_PRODUCTS[way] * _attention(query, key, rest)
        if target.startswith("__cudnn$conv"):
            first, second = self.types(instruction)[:2]
            if target.endswith("BackwardFilter"):
                return _convolution(first, instruction.type, second, rest)
            if target.endswith("BackwardInput"):
                return _convolution(instruction.type, second, first, rest)
            return _convolution(first, second, instruction.type, rest)
        return 0.0

    def bytes(self, instruction: Instruction) -> float:
        """Bytes that one call reads and writes: operands and results, but of arrays of which it
        touches a slice only that."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode.endswith("-done") or opcode in _VIEWS:
            return 0.0
        bodies = self.called(instruction) if opcode == "fusion" else []
        if len(bodies) == 1 and bodies[0] in self.computations:
            return self._fusion_bytes(self.computations[bodies[0]])
        if opcode in _SLICES:
            return 2.0 * program.shape_bytes(instruction.type)
        types = self.types(instruction)
        if opcode == "dynamic-update-slice":
            return 2.0 * program.shape_bytes(types[1])
        read = sum(program.shape_bytes(t) for t in types)
        if opcode != instruction.opcode:  # the type of a start repeats the operands
            return float(max(2 * read, program.shape_bytes(instruction.type)))
        return float(read + program.shape_bytes(instruction.type))

    def _fusion_bytes(self, body: list[Instruction]) -> float:
        users: dict[str, list[Instruction]] = {}
        for instruction in body:
            for name in self.operands(instruction):
                users.setdefault(name, []).append(instruction)
        read = sum(self._read(i, users) for i in body if i.opcode == "parameter")
        return read + self._written(body[-1])

    def _read(self, value: Instruction, users: dict[str, list[Instruction]]) -> float:
        """Bytes of a fusion's parameter that its users touch."""
        total = 0.0
        for user in users.get(value.name, ()):
            if user.opcode in _SLICES:
                is_index = self.operands(user)[0] != value.name
                total += program.shape_bytes((value if is_index else user).type)
            elif user.opcode == "bitcast":
                total += self._read(user, users)
            elif user.opcode != "dynamic-update-slice" or self.operands(user)[0] != value.name:
                return float(program.shape_bytes(value.type))
        return min(total, float(program.shape_bytes(value.type)))

    def _written(self, root: Instruction) -> float:
        """Bytes of a fusion's result that it writes; an update in place leaves the rest."""
        if root.opcode == "tuple":
            return sum(self._written(self.instructions[n]) for n in self.operands(root))
        if root.opcode == "bitcast" and self.operands(root):
            return self._written(self.instructions[self.operands(root)[0]])
        if root.opcode == "dynamic-update-slice":
            return float(program.shape_bytes(self.types(root)[1]))
        return float(program.shape_bytes(root.type))


def target_of(instruction: Instruction) -> str:
    """The target of a custom call, or ""."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found[1] if found and instruction.opcode == "custom-call" else ""


def _matmul(left: list[int], right: list[int], out: list[int]) -> float:
    """FLOPs of a product of which only shapes are known: [.., M, K] and [.., K, N], or any of them
    transposed, so that K^2 is what the operands have more than the result."""
    batch = math.prod(right[:-2])
    squared = math.prod(left) * math.prod(right) / (math.prod(out) * batch)
    return 2.0 * math.prod(out) * round(math.sqrt(squared))


def _attention(query: list[int], key: list[int], rest: str) -> float:
    """FLOPs of one of the products of a fused attention: the batch, heads, queries and keys stand
    in the kernel's settings, as [B, H, N, M]; without them JAX's order [B, N, H, K] is assumed."""
    shape = re.search(r'intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([\d", ]*)\]', rest)
    if shape:
        batch, heads, rows, cols = (int(d) for d in re.findall(r"\d+", shape[1]))
    else:
        batch, rows, heads, cols = query[0], query[1], query[2], key[1]
    head_dim = math.prod(query) / (batch * heads * rows)
    return 2.0 * batch * heads * rows * cols * head_dim


def _convolution(image: str, kernel: str, out: str, rest: str) -> float:
    """FLOPs of a convolution. What falls on padding, or on the zeros between dilated pixels, does
    not count."""
    labels = _LABELS.search(rest)
    if labels is None:
        return 0.0
    x, w, y = (dims_of(text)[0] for text in (image, kernel, out))
    products = w[labels[2].index("i")] * y[labels[3].index("b")] * y[labels[3].index("f")]
    window = _WINDOW.search(rest)
    settings = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    num_spatial = len(w) - 2

    def setting(name: str, default: str) -> list[str]:
        return settings.get(name, "x".join([default] * num_spatial)).split("x")

    strides, pads = setting("stride", "1"), setting("pad", "0_0")
    spread, apart = setting("lhs_dilate", "1"), setting("rhs_dilate", "1")
    for d in range(num_spatial):
        letter = str(d)
        size = x[labels[1].index(letter)]
        rows = np.arange(y[labels[3].index(letter)])[:, None] * int(strides[d])
        cols = np.arange(w[labels[2].index(letter)])[None] * int(apart[d])
        place, step = rows + cols - int(pads[d].split("_")[0]), int(spread[d])
        is_pixel = (place >= 0) & (place <= (size - 1) * step) & (place % step == 0)
        products *= int(is_pixel.sum())
    return 2.0 * products
