"""A plan as text."""

import math
from typing import Any

from vitjax.parallel import FSDP


def size(num_bytes: float) -> str:
    """Bytes in decimal units: "1.04 GB"."""
    if not math.isfinite(num_bytes):
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _span(low: float, high: float, form: str = ",.0f") -> str:
    return f"{low:{form}} to {high:{form}}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%"


def one_line(plan: Any) -> str:
    """A compiled candidate of a search."""
    mesh = " x ".join(str(n) for n in plan.mesh.values())
    fit = f"{size(plan.memory['peak'])}, " + ("fits" if plan.fits else "does not fit")
    rate = _span(plan.run["images_per_second_low"], plan.run["images_per_second_high"])
    return f"mesh {mesh}  batch {plan.batch_size}  remat {plan.remat}: {fit}, {rate} images/s"


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 2
    return [f"  {name:{width}}{value}" for name, value in rows]


def table(plan: Any) -> str:
    """The whole plan."""
    mesh = ", ".join(f"{k} {v}" for k, v in plan.mesh.items())
    lines = [f"{plan.config} on {plan.target}: {plan.num_devices} devices, {mesh}"]
    lines += _rows(
        [
            ("parameters", f"{plan.num_params:,}"),
            ("batch", f"{plan.batch_size:,} images, recomputation {plan.remat}"),
            ("state, all devices", size(plan.state_total)),
            ("compiled in", f"{plan.compile_seconds:.0f} CPU-seconds"),
        ]
    )
    lines += ["", "memory of one device"]
    rows = [(name, size(value)) for name, value in plan.state.items() if value]
    if plan.available is None:
        rows.append(("peak", "not known: virtual CPU devices hold temporaries in another way"))
    else:
        rows += [("temporaries", size(plan.memory["temporary"]))]
        rows += [("peak", size(plan.memory["peak"]))]
        rows += [("available", f"{size(plan.available)}, headroom {_percent(plan.headroom)}")]
    lines += _rows(rows)
    if plan.whole[0]:
        lines.append(
            f"  note: {size(plan.whole[0])} of parameters stay whole, as {FSDP}="
            f"{plan.mesh[FSDP]} divides none of their dimensions; {plan.whole[1]} would"
        )
    if plan.fits is False:
        excess = plan.memory["peak"] - plan.available
        lines += ["", f"DOES NOT FIT, by {size(excess)}. What would make it fit, by estimate:"]
        lines += [f"  {line}" for line in plan.advice]
    lines += ["", "network: bytes that one device sends in a step"]
    if plan.collectives:
        lines += _rows([(f"{kind} over {axes}", size(n)) for kind, axes, n in plan.collectives[:8]])
        found, least = sum(n for *_, n in plan.collectives), sum(n for *_, n in plan.least)
        over = f" ({found / least:.2f} of it)" if least else ""
        lines += _rows([("in all", f"{size(found)}; this sharding needs {size(least)}{over}")])
    else:
        least = sum(n for *_, n in plan.least)
        lines += _rows([("this sharding needs", size(least))])
    lines += ["", "compute of a step"]
    model, hardware = plan.flops["model"], plan.flops["hardware"]
    lines += _rows([("model FLOPs", f"{model:.3g}"), ("hardware FLOPs", f"{hardware:.3g}")])
    if plan.roofline and plan.run:
        r, run = plan.roofline, plan.run
        lines += ["", "roofline estimate (all overlapped, to nothing overlapped)"]
        times = ", ".join(f"{k} {1e3 * r[k]:.1f}" for k in ("compute", "memory", "network"))
        lines += _rows(
            [
                ("ms a step", f"{times}: {r['binds']} binds"),
                ("step", f"{_span(1e3 * r['fastest'], 1e3 * r['slowest'], ',.1f')} ms"),
                ("images/s", _span(run["images_per_second_low"], run["images_per_second_high"])),
                ("MFU", f"{_percent(run['mfu_low'])} to {_percent(run['mfu_high'])}"),
                ("whole run", f"{_span(run['hours_low'], run['hours_high'], ',.3g')} hours, "
                 f"at most {run['device_hours_high']:,.0f} device-hours"),
            ]
        )  # fmt: skip
        if "cost_high" in run:
            lines += _rows([("at most", f"{run['cost_high']:,.0f} of the price's currency")])
    return "\n".join(lines)


def ranking(plans: list[Any]) -> str:
    """A search's compiled candidates, best first, as a table."""
    head = f"{'mesh r x f x t':>16} {'batch':>7} {'remat':>6} {'peak':>9} {'free':>5} "
    lines = [head + f"{'images/s':>18} {'MFU':>11}  binds"]
    for plan in plans:
        mesh = " x ".join(str(n) for n in plan.mesh.values())
        run = plan.run
        rate = _span(run["images_per_second_low"], run["images_per_second_high"])
        mfu = f"{_percent(run['mfu_low'])} to {_percent(run['mfu_high'])}"
        free = _percent(plan.headroom) if plan.fits else "NO"
        lines.append(
            f"{mesh:>16} {plan.batch_size:>7} {plan.remat:>6} {size(plan.memory['peak']):>9} "
            f"{free:>5} {rate:>18} {mfu:>11}  {plan.roofline['binds']}"
        )
    return "\n".join(lines)
