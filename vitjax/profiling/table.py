"""The kernels of a step with their share of its time and their distance from the roofline."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from vitjax.devices import peak_flops
from vitjax.planning.targets import CHIPS, DEVICE_KINDS
from vitjax.profiling.costs import Program
from vitjax.profiling.labels import KINDS, Scopes, kind_of
from vitjax.profiling.trace import Times

TOP = 20


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a device can do at best: FLOP/s, bytes/s, and where the two numbers are from."""

    flops: float
    bandwidth: float
    origin: str


def speeds(device: jax.Device) -> Speeds:
    """The speeds of an accelerator, or of all cores of a CPU together (measured, float32)."""
    peak, origin = peak_flops(device)
    chip = CHIPS.get(DEVICE_KINDS.get(device.device_kind, ""))
    if device.platform == "cpu":
        peak *= len(jax.local_devices())
    if chip is None:
        return Speeds(peak, _copy_bandwidth(device), f"{origin}, bandwidth measured")
    return Speeds(peak, chip.memory_bandwidth, origin)


def _copy_bandwidth(device: jax.Device, megabytes: int = 128, repeats: int = 5) -> float:
    """Bytes/s read and written together, of an array larger than caches.

    It is changed in place: memory that is new to a process costs a CPU more than the copy.
    """
    x = jax.device_put(jnp.zeros((megabytes * 2**18,), jnp.float32), device)
    change = jax.jit(lambda a: a + 1.0, donate_argnums=0).lower(x).compile()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        x = change(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction of the step, or several that do the same in different layers.

    Attributes:
      names: of the instructions.
      kind: one of `labels.KINDS`.
      scope: where in the model it stands.
      type: of its result.
      calls, seconds, flops, bytes: a step, all calls together.
      span: seconds a step from begin to end, with what ran at the same time.
      roofline: seconds a step at the device's speeds; 0 for collectives, which the network binds,
        and for what has neither products nor bytes.
      binds: "compute" or "memory"; "" without a roofline.
    """

    names: tuple[str, ...]
    kind: str
    scope: str
    type: str
    calls: float
    seconds: float
    span: float
    flops: float
    bytes: float
    roofline: float
    binds: str

    @property
    def times_roofline(self) -> float | None:
        return self.seconds / self.roofline if self.roofline else None


@dataclasses.dataclass(frozen=True)
class Profile:
    """The kernels of a step, the longest first; seconds are those of one step.

    Attributes:
      wall: a step in all, without evaluations and checkpoints.
      busy: of it, the time in which any kernel ran: what shares are shares of.
    """

    kernels: tuple[Kernel, ...]
    steps: int
    wall: float
    busy: float
    device: str
    speeds: Speeds

    @property
    def idle(self) -> float:
        return max(self.wall - self.busy, 0.0)


def profile(
    text: str, times: Times, *, steps: int, wall: float, device: str, speeds: Speeds
) -> Profile:
    """Puts the times of a trace of several steps together with what the program must do.

    Args:
      text: of the optimised program.
      wall: seconds of the traced steps together.
    """
    program = Program(text)
    scopes = Scopes(text)
    found = []
    for name, seconds in times.seconds.items():
        instruction = program.instructions[name]
        calls = times.calls[name] / steps
        kind = kind_of(program, instruction)
        flops, moved = calls * program.flops(instruction), calls * program.bytes(instruction)
        bounds = {"compute": flops / speeds.flops, "memory": moved / speeds.bandwidth}
        binds = max(bounds, key=lambda k: bounds[k])
        has_roofline = kind != "collective" and bounds[binds] > 0
        found.append(
            Kernel(
                names=(name,),
                kind=kind,
                scope=scopes.of(program, instruction),
                type=instruction.type,
                calls=calls,
                seconds=seconds / steps,
                span=times.spans[name] / steps,
                flops=flops,
                bytes=moved,
                roofline=bounds[binds] if has_roofline else 0.0,
                binds=binds if has_roofline else "",
            )
        )
    kernels = tuple(sorted(found, key=lambda k: -k.seconds))
    return Profile(kernels, steps, wall / steps, times.busy / steps, device, speeds)


def grouped(kernels: tuple[Kernel, ...]) -> list[Kernel]:
    """Puts those together that do the same at the same place of the model in several layers."""
    groups: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        calls = max(kernel.calls, 1e-9)
        work = round(kernel.flops / calls), round(kernel.bytes / calls)
        key = (kernel.kind, kernel.scope, kernel.type, *work) if kernel.scope else kernel.names
        groups.setdefault(key, []).append(kernel)
    return sorted((_together(group) for group in groups.values()), key=lambda k: -k.seconds)


def _together(group: list[Kernel]) -> Kernel:
    sums = {
        name: sum(getattr(k, name) for k in group)
        for name in ("calls", "seconds", "span", "flops", "bytes", "roofline")
    }
    names = tuple(name for k in group for name in k.names)
    return dataclasses.replace(group[0], names=names, **sums)


def _reached(kernel: Kernel) -> str:
    """The rate at what binds the kernel."""
    if not kernel.seconds or not (kernel.flops or kernel.bytes):
        return ""
    if kernel.binds == "compute":
        return f"{kernel.flops / kernel.seconds / 1e9:,.1f} GFLOP/s"
    return f"{kernel.bytes / kernel.seconds / 1e9:,.1f} GB/s"


def _rows(found: Profile) -> list[list[str]]:
    rows = []
    for kernel in grouped(found.kernels)[:TOP]:
        far, more = kernel.times_roofline, len(kernel.names) - 1
        rows.append(
            [
                f"{1e3 * kernel.seconds:.3f}",
                f"{100 * kernel.seconds / found.busy:.1f}",
                f"{kernel.calls:,.4g}",
                kernel.kind,
                _reached(kernel),
                "" if far is None else f"{far:,.1f}",
                kernel.binds,
                kernel.names[0] + (f" +{more}" if more else ""),
                kernel.scope,
            ]
        )
    return rows


_HEAD = ["ms", "share %", "calls", "kind", "reached", "x roofline", "bound by", "kernel", "where"]
_KIND_HEAD = ["ms", "share %", "kind", "GFLOP", "GB", "x roofline"]


def _kind_rows(found: Profile) -> list[list[str]]:
    rows = []
    for kind in (*KINDS, "all kernels"):
        group = [k for k in found.kernels if kind in (k.kind, "all kernels")]
        seconds, roofline = sum(k.seconds for k in group), sum(k.roofline for k in group)
        if group:
            rows.append(
                [
                    f"{1e3 * seconds:.3f}",
                    f"{100 * seconds / found.busy:.1f}",
                    kind,
                    f"{sum(k.flops for k in group) / 1e9:,.3f}",
                    f"{sum(k.bytes for k in group) / 1e9:,.3f}",
                    f"{seconds / roofline:,.1f}" if roofline and kind != "collective" else "",
                ]
            )
    return [*sorted(rows[:-1], key=lambda r: -float(r[0])), *rows[-1:]]


def _summary(found: Profile) -> tuple[str, ...]:
    speeds = found.speeds
    idle = 100 * found.idle / found.wall
    return (
        f"{found.steps} steps of {1e3 * found.wall:.3f} ms on {found.device}: kernels ran in "
        f"{1e3 * found.busy:.3f} ms of it, {1e3 * found.idle:.3f} ms ({idle:.1f}%) idle",
        f"roofline: {speeds.flops / 1e9:,.4g} GFLOP/s, {speeds.bandwidth / 1e9:,.4g} GB/s "
        f"({speeds.origin}); where kernels ran at once each is charged an equal part of the time",
    )


def plain(found: Profile) -> str:
    """The profile as aligned text for the terminal."""
    top, kinds = (
        _aligned([h, *r]) for h, r in ((_HEAD, _rows(found)), (_KIND_HEAD, _kind_rows(found)))
    )
    return "\n".join([*_summary(found), *top, *kinds])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [
        all(c == "" or c[0].isdigit() for c in column[1:]) for column in zip(*rows, strict=True)
    ]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown(found: Profile) -> str:
    """The same as Markdown."""

    def lines(head: list[str], rows: list[list[str]]) -> list[str]:
        body = [head, ["---"] * len(head), *rows]
        return ["", *("| " + " | ".join(row).replace("->", "→") + " |" for row in body)]

    parts = [*_summary(found), *lines(_HEAD, _rows(found)), *lines(_KIND_HEAD, _kind_rows(found))]
    return "\n".join(parts) + "\n"


def as_json(found: Profile) -> dict[str, Any]:
    """All of it, every instruction by itself; times in ms a step."""
    kernels = []
    for kernel in found.kernels:
        kernels.append(
            {
                "name": kernel.names[0],
                "kind": kernel.kind,
                "where": kernel.scope,
                "type": kernel.type,
                "calls": kernel.calls,
                "ms": 1e3 * kernel.seconds,
                "share": kernel.seconds / found.busy,
                "span_ms": 1e3 * kernel.span,
                "flops": kernel.flops,
                "bytes": kernel.bytes,
                "roofline_ms": 1e3 * kernel.roofline,
                "times_roofline": kernel.times_roofline,
                "bound_by": kernel.binds or None,
            }
        )
    return {
        "steps": found.steps,
        "step_ms": 1e3 * found.wall,
        "busy_ms": 1e3 * found.busy,
        "idle_ms": 1e3 * found.idle,
        "device": found.device,
        "peak_flops": found.speeds.flops,
        "bandwidth": found.speeds.bandwidth,
        "speeds_from": found.speeds.origin,
        "kernels": kernels,
    }
