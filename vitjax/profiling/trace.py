"""Reads a profiler's trace: which instruction of the step ran when, on one device.

Formats (tsl/profiler/utils/xplane_schema.h and xla/backends/profiler of OpenXLA):
  CPU: plane "/host:CPU", a line a thread. An event with the stats `hlo_op` and `hlo_module` begins
    an instruction; where others finish its work, an "end: NAME" event marks the end, with `_c` the
    number that the first has as `_p`.
  GPU: plane "/device:GPU:N", lines "Stream #..."; a kernel has `hlo_op` (with scopes before it,
    divided by "::") and `hlo_module`. The plane's other lines are derived from these.
  TPU: plane "/device:TPU:N", line "XLA Ops" with events named as the instruction, or as its whole
    text; the line "XLA Modules" says which program ran when.
"""

import bisect
import dataclasses
import heapq
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitjax.profiling.costs import CONTAINERS, Program


@dataclasses.dataclass(frozen=True)
class Span:
    """One run of an instruction; times in ns."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Times:
    """What the instructions of a program took in a trace.

    Attributes:
      seconds: by instruction. Where k of them ran at the same time each is charged 1/k of it, so
        that they add up to `busy`.
      spans: by instruction, seconds from begin to end, others at the same time or not.
      calls: by instruction.
      busy: seconds in which any ran.
    """

    seconds: Mapping[str, float]
    spans: Mapping[str, float]
    calls: Mapping[str, int]
    busy: float


def newest(folder: Path) -> Path | None:
    """The newest trace that JAX's profiler wrote below a folder."""
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def read(path: Path, program: Program) -> Times:
    """The times of a program's instructions in a trace."""
    from jax.profiler import ProfileData

    return times(ProfileData.from_file(str(path)).planes, program)


def times(planes: Iterable[Any], program: Program) -> Times:
    """As `read`, of planes with the attributes of `jax.profiler.ProfileData`'s.

    Of several devices it is the first; virtual CPU devices, which share the cores, are all.
    """
    planes, names = list(planes), program.instructions
    devices: dict[tuple[str, int], Any] = {}
    for plane in planes:
        if found := re.fullmatch(r"/device:(GPU|TPU):(\d+)", plane.name):
            devices[found[1], int(found[2])] = plane
    spans: list[Span] = []
    for platform, index in sorted(devices):
        reader = _gpu if platform == "GPU" else _tpu
        spans = list(reader(devices[platform, index], program.module, names))
        if spans:
            break
    if not spans:
        hosts = [plane for plane in planes if plane.name == "/host:CPU"]
        spans = [span for plane in hosts for span in _cpu(plane, program.module, names)]
    return charge(_without_containers(spans, program))


def _module(stats: Mapping[str, Any]) -> str:
    return str(stats.get("hlo_module", "")).split("(")[0]


def _cpu(plane: Any, module: str, names: Container[str]) -> Iterator[Span]:
    begun: list[tuple[Any, str, float, float]] = []
    ends: dict[Any, float] = {}
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if event.name.startswith("end: "):
                ends[stats.get("_c")] = event.start_ns
            elif "hlo_op" in stats and _module(stats) == module and stats["hlo_op"] in names:
                end = event.start_ns + event.duration_ns
                begun.append((stats.get("_p", object()), stats["hlo_op"], event.start_ns, end))
    for number, name, start, end in begun:
        yield Span(name, start, max(end, ends.get(number, end)))


def _gpu(plane: Any, module: str, names: Container[str]) -> Iterator[Span]:
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        last: Span | None = None
        for event in sorted(line.events, key=lambda e: e.start_ns):
            stats = dict(event.stats)
            name = str(stats.get("hlo_op", "")).split("::")[-1]
            if name not in names or _module(stats) != module:
                continue
            start, end = event.start_ns, event.start_ns + event.duration_ns
            if last and last.name == name:  # one call of a library is several kernels in a row
                start = last.start
            elif last:
                yield last
            last = Span(name, start, end)
        if last:
            yield last


def _tpu(plane: Any, module: str, names: Container[str]) -> Iterator[Span]:
    lines = {line.name: line for line in plane.lines}
    runs = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for event in (lines["XLA Modules"].events if "XLA Modules" in lines else ())
        if event.name.split("(")[0] == module
    )
    starts = [start for start, _ in runs]
    for event in lines["XLA Ops"].events if "XLA Ops" in lines else ():
        name = event.name.split(" = ")[0].lstrip("%")
        run = bisect.bisect_right(starts, event.start_ns) - 1
        if name in names and run >= 0 and event.start_ns < runs[run][1]:
            yield Span(name, event.start_ns, event.start_ns + event.duration_ns)


def _without_containers(spans: list[Span], program: Program) -> list[Span]:
    """Leaves out loops, branches and calls of which the parts were seen themselves."""
    seen, left_out = {span.name for span in spans}, set()
    for name in seen:
        instruction = program.instructions[name]
        if instruction.opcode in CONTAINERS and any(
            inner.name in seen for inner, _ in program.inside(instruction)
        ):
            left_out.add(name)
    return [span for span in spans if span.name not in left_out]


def charge(spans: Iterable[Span]) -> Times:
    """Sorts time into the instructions that ran, in equal parts where several did at once."""
    seconds: dict[str, float] = {}
    length: dict[str, float] = {}
    calls: dict[str, int] = {}
    busy, now = 0.0, 0.0
    running: list[tuple[float, str]] = []  # by their ends

    def advance(until: float) -> None:
        nonlocal busy, now
        while running and now < until:
            stop = min(until, running[0][0])
            for _, name in running:
                seconds[name] = seconds.get(name, 0.0) + (stop - now) / len(running) / 1e9
            busy, now = busy + (stop - now) / 1e9, stop
            while running and running[0][0] <= now:
                heapq.heappop(running)
        now = until

    last = 0.0
    for span in sorted(spans, key=lambda s: s.start):
        advance(span.start)
        calls[span.name] = calls.get(span.name, 0) + 1
        length[span.name] = length.get(span.name, 0.0) + (span.end - span.start) / 1e9
        seconds.setdefault(span.name, 0.0)
        last = max(last, span.end)
        if span.end > span.start:
            heapq.heappush(running, (span.end, span.name))
    advance(last)
    return Times(seconds, length, calls, busy)
