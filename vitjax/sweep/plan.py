"""From a sweep's config to its cells: budgets, runs, trunks and branches, totals."""

import dataclasses
import math
from typing import Any

from vitjax import config as config_lib
from vitjax.errors import InputError
from vitjax.sweep import config as sweep_config
from vitjax.sweep import draft as drafts
from vitjax.sweep.cells import Cell
from vitjax.sweep.config import Sweep
from vitjax.sweep.draft import Draft, Drafter
from vitjax.sweep.shapes import Ladder

UNITS = "training FLOPs = 3 x forward, 2 x MAC, with patch embedding, attention and head"

MAX_WARMUP = 0.1  # of a run's steps, above which the plan warns (arXiv 2406.19146)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole sweep.

    Attributes:
      sweep: its config as plain values.
      cells: every run, those to fit first.
      totals: FLOPs by stage, as if each run stood alone and as paid; what trunks save.
      notes: what to know before running it.
    """

    sweep: dict[str, Any]
    cells: tuple[Cell, ...]
    totals: dict[str, float]
    notes: tuple[str, ...]

    def cell(self, cell_id: str) -> Cell:
        return next(cell for cell in self.cells if cell.id == cell_id)

    def group(self, number: int) -> list[Cell]:
        """A trunk and its branches, the trunk first."""
        return sorted((c for c in self.cells if c.group == number), key=lambda c: c.is_branch)


def make_cells(sweep: Sweep, runs: list[Draft]) -> tuple[Cell, ...]:
    """Numbers the runs; the longest of those that differ in length alone is the others' trunk."""
    longest: dict[tuple, Draft] = {}
    for run in runs:
        known = longest.get(run.trunk_key)
        if known is None or run.steps > known.steps:
            longest[run.trunk_key] = run
    names = {run: _name(number, run) for number, run in enumerate(runs, 1)}
    groups = {key: number for number, key in enumerate(longest)}
    plain, cells = config_lib.plain(sweep.train), []
    for number, run in enumerate(runs, 1):
        size, trunk = run.size, longest[run.trunk_key]
        cooldown = drafts.cooldown_steps(sweep, run.steps)
        images = run.steps * run.batch
        paid = images if trunk is run else cooldown * run.batch
        cells.append(
            Cell(
                number=number,
                id=names[run],
                stage=run.stage,
                kind=run.kind,
                arm=run.arm,
                trunk=names[trunk],
                group=groups[run.trunk_key],
                seed=run.seed,
                budget=run.budget,
                **dataclasses.asdict(size.shape),
                patch_size=plain["model"]["patch_size"],
                image_size=plain["data"]["image_size"],
                num_params=size.num_params,
                num_body_params=size.num_body_params,
                batch_size=run.batch,
                steps=run.steps,
                warmup_steps=drafts.warmup_steps(sweep, run.batch),
                cooldown_steps=cooldown,
                branch_step=0 if trunk is run else run.steps - cooldown,
                images=images,
                unique_images=min(images, run.pool),
                epochs=images / run.pool,
                flops_per_image=size.forward_flops,
                flops=float(size.train_flops) * images,
                flops_paid=float(size.train_flops) * paid,
                learning_rate=run.lr,
                label_noise=0.0 if run.arm == "main" else sweep.arms[run.arm]["label_noise"],
            )
        )
    return tuple(cells)


def _name(number: int, run: Draft) -> str:
    shape = run.size.shape
    arm = "" if run.arm == "main" else f"-{run.arm}"
    return f"{number:03}-{run.kind}{arm}-w{shape.width}-d{shape.depth}-n{run.steps}-s{run.seed}"


def count(cells: tuple[Cell, ...]) -> dict[str, float]:
    """The totals of a plan."""
    totals: dict[str, float] = {}
    for stage in ("fit", "holdout"):
        own = [c for c in cells if c.stage == stage]
        totals[f"{stage}_cells"] = len(own)
        totals[f"{stage}_flops"] = sum(c.flops for c in own)
        totals[f"{stage}_flops_paid"] = sum(c.flops_paid for c in own)
    alone = totals["fit_flops"] + totals["holdout_flops"]
    paid = totals["fit_flops_paid"] + totals["holdout_flops_paid"]
    return totals | {
        "flops": alone,
        "flops_paid": paid,
        "flops_saved": alone - paid,
        "saved_share": 1 - paid / alone,
        "holdout_share": totals["holdout_flops_paid"] / paid,
        "trunks": len({c.group for c in cells}),
    }


def choose_budgets(
    sweep: Sweep, drafter: Drafter, total: float | None
) -> tuple[tuple[float, ...], list[Draft]]:
    """The isoFLOP budgets and all runs; as given, or as large as the total allows.

    Raises:
      InputError: the total is too small for the runs that are asked for.
    """
    given = sweep.isoflop.budgets

    def paid(runs: list[Draft]) -> float:
        return count(make_cells(sweep, runs))["flops_paid"]

    if given is not None or total is None:
        budgets = tuple(float(c) for c in given or ())
        runs = drafter.all(budgets)
        if total is not None and paid(runs) > total * (1 + 1e-6):
            raise InputError(
                f"the runs asked for cost {paid(runs):.4g} training FLOPs, more than the whole "
                f"budget of {total:.4g}: raise it, or leave isoflop.budgets to be chosen (None)"
            )
        return budgets, runs

    def budgets_up_to(largest: float) -> tuple[float, ...]:
        iso = sweep.isoflop
        return tuple(largest / iso.ratio**i for i in reversed(range(iso.count)))

    def try_largest(largest: float) -> list[Draft] | InputError:
        try:
            return drafter.all(budgets_up_to(largest))
        except InputError as error:
            return error

    best: tuple[float, list[Draft]] | None = None
    low, high, refusal = math.log(total) - 20.0, math.log(total), None
    for _ in range(60):  # the cost rises with the largest budget, but for rounding to steps
        middle = (low + high) / 2
        runs = try_largest(math.exp(middle))
        if isinstance(runs, InputError):
            low, refusal = middle, runs
        elif paid(runs) > total:
            high = middle
        else:
            low, best = middle, (math.exp(middle), runs)
    if best is None:
        raise InputError(
            f"a whole budget of {total:.4g} training FLOPs is too small for this sweep: with less "
            f"than {math.exp(high):.4g} for its largest isoFLOP runs, {refusal}"
        )
    return budgets_up_to(best[0]), best[1]


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _notes(sweep: Sweep, cells: tuple[Cell, ...], totals: dict[str, float]) -> list[str]:
    notes, held = [], sweep.holdout
    share, most = totals["holdout_share"], held.share
    if share > most:
        notes.append(
            f"hold-out takes {share:.0%} of the FLOPs, more than holdout.share={most:.0%}: "
            f"{totals['holdout_cells']:.0f} runs at {', '.join(f'{f:g}x' for f in held.factors)} "
            f"the largest fitted run do not fit in it; fewer or smaller factors, or more sizes and "
            "seeds to fit, would"
        )
    elif share < 0.1:
        notes.append(
            f"hold-out takes {share:.0%} of the FLOPs, less than the usual 10 to 20%: add "
            "holdout.factors, sizes or seeds"
        )
    for cell in cells:
        if cell.kind in ("isoflop", "holdout") and cell.budget:
            off = abs(cell.flops / cell.budget - 1)
            if off > 0.05:
                notes.append(f"{cell.id}: whole steps miss its budget by {off:.0%}")
    warming = [c for c in cells if c.warmup_steps > MAX_WARMUP * c.steps]
    if warming:
        worst = max(warming, key=lambda c: c.warmup_steps / c.steps)
        notes.append(
            f"{len(warming)} runs spend more than {MAX_WARMUP:.0%} of their steps on warm-up, "
            f"{worst.id} most ({worst.warmup_steps / worst.steps:.0%}): their loss tells more of "
            "the schedule than of size and data, and laws through them fall too fast"
        )
    repeated = [c for c in cells if c.epochs > 1]
    if repeated:
        worst = max(repeated, key=lambda c: c.epochs)
        notes.append(
            f"{len(repeated)} runs repeat data, {worst.id} most ({worst.epochs:.2g} epochs): a law "
            "of fresh data need not hold for them"
        )
    for budget in sorted({c.budget for c in cells if c.budget and c.kind != "lr"}):
        own = [c.num_params for c in cells if c.budget == budget and c.kind != "lr"]
        wanted = drafts.guess(sweep, budget)
        if not min(own) / 1.5 <= wanted <= max(own) * 1.5:
            notes.append(
                f"at {budget:.3g} FLOPs the guess is {wanted:,.0f} parameters, but the sizes are "
                f"{min(own):,} to {max(own):,}: widen shapes.widths or isoflop.max_epochs"
            )
    checked = [c.num_params for c in cells if c.kind == "lr"] or [round(sweep.lr.params)]
    outside = [c for c in cells if not min(checked) / 3 <= c.num_params <= max(checked) * 3]
    if outside:
        notes.append(
            f"the learning rate is by the rule alone for {len(outside)} runs of "
            f"{_span([c.num_params for c in outside])} parameters, beyond 3x of where it is "
            f"checked ({_span(checked)})"
        )
    return notes


def make_plan(sweep: Sweep) -> Plan:
    """Plans a sweep; builds descriptions of models, computes nothing, touches no data.

    Raises:
      InputError: what is asked for cannot work; says what would.
    """
    sweep_config.check(sweep)
    total, origin = sweep_config.total_flops(sweep)
    drafter = Drafter(sweep, Ladder(sweep))
    _, runs = choose_budgets(sweep, drafter, total)
    cells = make_cells(sweep, runs)
    totals = count(cells)
    notes = [origin, *_notes(sweep, cells, totals)]
    return Plan(config_lib.plain(sweep), cells, totals, tuple(notes))
