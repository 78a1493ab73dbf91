"""A plan as tables for people."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vitjax.sweep.cells import Cell
from vitjax.sweep.plan import UNITS, Plan


def _short(number: float) -> str:
    """A count in three digits: 810, 6.17k, 38.7M."""
    for letter, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:g}"


def _span(values: Iterable[float], show: Callable[[float], str] = _short) -> str:
    """The smallest and the largest of some values, or the one that all have."""
    found = sorted(set(values))
    low, high = show(found[0]), show(found[-1])
    return low if low == high else f"{low} to {high}"


def _groups(cells: tuple[Cell, ...]) -> dict[tuple, list[Cell]]:
    """Cells by stage, kind, arm and budget, in the order of the plan."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.stage, cell.kind, cell.arm, cell.budget), []).append(cell)
    return groups


def table(plan: Plan) -> Table:
    """A row for each budget of each question."""
    found = Table(title=UNITS, title_justify="left", title_style="", pad_edge=False, box=None)
    for name in ("runs", "budget"):
        found.add_column(name)
    columns = ("cells", "parameters", "images", "epochs", "batch", "learning rate", "FLOPs", "paid")
    for name in columns:
        found.add_column(name, justify="right", overflow="fold")
    has_target = any(c.memory_gib is not None for c in plan.cells)
    if has_target:
        for name in ("GiB", "hours", "fits"):
            found.add_column(name, justify="right")
    for (stage, kind, arm, budget), cells in _groups(plan.cells).items():
        what = "hold-out" if stage == "holdout" else kind
        row = [
            what if arm == "main" else f"{what}, {arm}",
            "" if budget is None else f"{budget:.3g}",
            str(len(cells)),
            _span(c.num_params for c in cells),
            _span(c.images for c in cells),
            f"{max(c.epochs for c in cells):.2g}",
            _span((c.batch_size for c in cells), str),
            _span((c.learning_rate for c in cells), "{:.2g}".format),
            f"{sum(c.flops for c in cells):.3g}",
            f"{sum(c.flops_paid for c in cells):.3g}",
        ]
        if has_target:
            fits = [c.fits for c in cells]
            known = [c.memory_gib for c in cells if c.memory_gib is not None]
            hours = [c.hours for c in cells if c.hours is not None]
            row += [
                f"{max(known):.3g}" if known else "",
                f"{sum(hours):,.3g}" if hours else "",
                "" if None in fits else "yes" if all(fits) else f"{fits.count(False)} DO NOT",
            ]
        found.add_row(*row)
    return found


def summary(plan: Plan) -> list[str]:
    """The totals and the notes, a line each."""
    t = plan.totals
    lines = [
        f"{len(plan.cells)} cells from {t['trunks']:.0f} trunks: {t['fit_cells']:.0f} to fit "
        f"({t['fit_flops_paid']:.3g} FLOPs), {t['holdout_cells']:.0f} hold-out "
        f"({t['holdout_flops_paid']:.3g} FLOPs, {t['holdout_share']:.0%} of the sweep)",
        f"in all {t['flops_paid']:.3g} training FLOPs; as separate runs {t['flops']:.3g}: "
        f"cooldown branches save {t['flops_saved']:.3g} ({t['saved_share']:.0%})",
    ]
    hours = [c.hours for c in plan.cells if c.hours is not None]
    if hours:
        lines.append(f"{sum(hours):,.4g} hours of {plan.sweep['budget']['target']} in all")
    unfit = [c for c in plan.cells if c.fits is False]
    if unfit:
        lines.append(
            f"{len(unfit)} cells DO NOT FIT in memory, such as {unfit[0].id}: "
            "set train.model.remat, train.optimizer.accumulation_steps or more devices"
        )
    return lines + [f"note: {note}" for note in plan.notes]


def show(plan: Plan, workdir: Path) -> None:
    """Prints a plan on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # of a pipe nothing is known; no line is broken
    console.print(table(plan))
    for line in summary(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"every cell: {workdir / 'plan.csv'}", markup=False, soft_wrap=True)
