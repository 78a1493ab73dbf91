"""Reads a compiled program: which collectives a step runs, how often, over which mesh axes.

The text of XLA's optimised program is the only place that says so. A scan is a `while` whose body
stands there once, so every count is multiplied by the trips of the loops around it.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS; a reduction of which each device keeps its part is a reduce-scatter.
      axes: the mesh axes that its groups run over.
      group_size: devices in a group.
      payload: bytes of the whole result (of the whole input for reduce-scatter) on one device.
      count: runs a step.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    payload: int
    count: int

    @property
    def bytes_moved(self) -> float:
        """Bytes that a device sends in a step, by the bandwidth-optimal ring algorithms."""
        return self.count * ring_bytes(self.kind, self.payload, self.group_size)


def ring_bytes(kind: str, payload: float, group_size: int) -> float:
    """Bytes that each of `group_size` devices sends for one collective."""
    if kind == "collective-permute":
        return payload
    share = (group_size - 1) / group_size
    return payload * share * (2 if kind == "all-reduce" else 1)


def shape_bytes(text: str) -> int:
    """Bytes of all arrays in a type such as "(f32[8,128]{1,0}, bf16[4]{0})"."""
    total = 0.0
    for name, dims in _SHAPE.findall(text):
        digits = re.search(r"\d+", name)
        bits = BITS.get(name, int(digits[0]) if digits else 0)
        total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
    return int(total)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def _instruction(line: str) -> Instruction | None:
    name, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = right.find(" ")
    if right.startswith("("):
        depth = 0
        for end, letter in enumerate(right):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                end += 1
                break
    opcode, _, rest = right[end + 1 :].partition("(")
    return Instruction(name.lstrip("%"), right[:end], opcode, rest)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


def _trips(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """How often a loop's body runs: as XLA states it, or the bound that its condition tests."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
    body = computations[condition[1]] if condition else []
    fused = [computations[c] for i in body if i.opcode == "fusion" for c in _CALLED.findall(i.rest)]
    constants = [
        int(found[1])
        for i in itertools.chain(body, *fused)
        if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.rest))
    ]
    return max(constants, default=1)


def walk(
    computations: Mapping[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that runs: its computation, itself, and how often."""
    waiting = [(entry, 1)]
    while waiting:
        name, count = waiting.pop()
        for instruction in computations.get(name, ()):
            yield name, instruction, count
            called = _CALLED.findall(instruction.rest)
            for branches in _BRANCHES.findall(instruction.rest):
                called += re.findall(r"[\w.\-]+", branches)
            if instruction.opcode == "while":
                trips = _trips(instruction, computations)
                waiting += [(c, count * trips) for c in called]
            elif instruction.opcode not in ("reduce", "all-reduce", "reduce-scatter", "scatter"):
                waiting += [(c, count) for c in called]


def _iota(dims: str, source: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(map(int, source.split(",")))).reshape(
        [int(d) for d in source.split(",")]
    )
    if order:
        ids = ids.transpose([int(d) for d in order.split(",")])
    return ids.reshape([int(d) for d in dims.split(",")])


def first_group(rest: str, num_devices: int) -> list[int]:
    """The devices of one group of a collective, from any of XLA's notations."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        sides = [tuple(map(int, p.split(","))) for p in re.findall(r"\d+,\d+", pairs[1])]
        return list(next(((a, b) for a, b in sides if a != b), (0,)))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(*iota.groups())[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(i) for i in listed[1].split(",")]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", rest):
        sizes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = np.arange(num_devices)
        if order := re.search(r"\(\[([\d,]+)\]T\(([\d,]+)\)\)", named[2]):
            ids = _iota(str(num_devices), order[1], order[2]).ravel()
        ids = ids.reshape([int(n) for _, n in sizes])
        axes = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
        if any(part for _, part, _ in axes):
            raise ValueError(f"cannot read the groups {named[0]}")
        kept = tuple(slice(None) if any(a == n for n, *_ in axes) else 0 for a, _ in sizes)
        return ids[kept].ravel().tolist()
    return list(range(num_devices))


def axes_of(group: list[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    positions = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(
        axis for axis, p in zip(mesh_shape, positions, strict=True) if len(np.unique(p)) > 1
    )


def _between_slices(
    send: Instruction, mesh_shape: Mapping[str, int]
) -> tuple[str, tuple[str, ...], int, int] | None:
    """What a host transfer of a TPU program over several slices stands for: its kind, axes, group
    size and payload. Slices differ along the first mesh axis."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    if transfer is None:
        return None
    name, dims = _SHAPE.findall(send.type)[0]
    payload, axes = shape_bytes(f"{name}[{dims}]"), (next(iter(mesh_shape)),)
    if transfer[1] == "ONE_TO_ONE":
        return "collective-permute", axes, 2, payload
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', send.rest)
    size = len(slices[1].split(",")) if slices else 2
    kind = transfer[1].lower().replace("_", "-")
    return kind, axes, size, payload


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled program, equal ones together, largest first.

    Args:
      text: of the optimised program (`compiled.as_text()`).
      mesh_shape: axis names and sizes in the mesh's order.
    """
    computations, entry = parse(text)
    num_devices = math.prod(mesh_shape.values())
    counts: collections.Counter[tuple[str, tuple[str, ...], int, int]] = collections.Counter()
    channels: set[tuple] = set()
    for where, instruction, count in walk(computations, entry):
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and (between := _between_slices(instruction, mesh_shape)):
            counts[between] += count
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if channel and (channel[1], kind, count) in channels:
            continue  # the steps of one asynchronous collective share its channel
        channels.add((channel[1] if channel else instruction.name, kind, count))
        group = first_group(instruction.rest, num_devices)
        shapes = re.findall(_SHAPE, instruction.type)
        payload = shape_bytes(instruction.type)
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            # The type is (operands, results, ...); a permute's has two counters at its end.
            half = len(shapes) // 2 if kind != "collective-permute" else 1
            payload = sum(shape_bytes(f"{n}[{d}]") for n, d in shapes[half : 2 * half])
        if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # as TPUs print it
        elif kind == "reduce-scatter":
            payload *= len(group)
        axes = axes_of(group, mesh_shape)
        if axes and payload:
            counts[kind, axes, len(group), payload] += count
    found = [Collective(*key, count=count) for key, count in counts.items()]
    return sorted(found, key=lambda c: -c.bytes_moved)
