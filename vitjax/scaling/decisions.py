"""What a sweep's laws decide, as report sections: sizes, data, prices, recipes, the next run."""

from pathlib import Path
from typing import Any

import numpy as np

from vitjax.data.sources.noise import noise_floor
from vitjax.errors import InputError
from vitjax.scaling import decide as deciding
from vitjax.scaling import pictures
from vitjax.scaling.crossing import crossing
from vitjax.scaling.parametric import fit_parametric
from vitjax.scaling.shape_law import fit_shape
from vitjax.scaling.sweep_fits import ArmFits, Row, Sweep
from vitjax.scaling.transfer import fit_downstream

Section = tuple[Any, list[str]]
SHAPE_DIMS = ("width", "depth", "mlp_dim")


def _range(estimate: deciding.Estimate, form: str = "{:.4g}", index: int | None = None) -> str:
    low, high = (v if index is None else v[index] for v in (estimate.low, estimate.high))
    return f"{form.format(low)} to {form.format(high)}"


def decide(sweep: Sweep, arms: dict[str, ArmFits], wishes: Any) -> Section:
    """What to train with more compute, what other choices cost, and what to run next."""
    main = next(iter(arms.values()))
    law, k = main.law, main.flops_factor
    assert law is not None
    largest = float(main.column("flops").max())
    budgets = np.array(wishes.budgets or (4 * largest, 10 * largest))
    best = deciding.frontier(law, budgets, k)
    low, high = main.flops_factor_range
    lines = [
        "## Decisions",
        "",
        f"FLOPs = {k:.4g} x parameters x images (median; {low:.3g} to {high:.3g} over the runs). "
        "Intervals are the law's own, 90%, without the noise of a single run.",
        "",
        "| training FLOPs | best N | 90% | images | 90% | loss | 90% | beyond the fitted runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, budget in enumerate(budgets):
        lines.append(
            f"| {budget:.3g} | {best.num_params.value[i]:,.0f} | "
            f"{_range(best.num_params, '{:,.0f}', i)} | {best.num_examples.value[i]:,.0f} | "
            f"{_range(best.num_examples, '{:,.0f}', i)} | {best.loss.value[i]:.4g} | "
            f"{_range(best.loss, index=i)} | {best.reach[i]:.1f}x |"
        )
    target = float(budgets[-1])
    size = float(best.num_params.value[-1])
    content: dict[str, Any] = {"flops_factor": k, "frontier": best.to_dict(), "penalties": []}
    lines += ["", f"Another size at {target:.3g} FLOPs costs:", ""]
    lines += ["| N over the best | loss | paid in loss | compute wasted |", "|---|---|---|---|"]
    for factor in (0.25, 0.5, 2.0, 4.0):
        choice = deciding.penalty(law, target, factor * size, k)
        content["penalties"].append({"factor": factor} | choice.to_dict())
        lines.append(
            f"| {factor:g} | {choice.loss.value:.4g} | {choice.penalty.value:.3g} "
            f"({_range(choice.penalty, '{:.2g}')}) | {choice.wasted.value:.0%} |"
        )
    lines.append("")
    max_images = wishes.max_images or float(max(r["unique_images"] for r in main.rows))
    limits = [("data", deciding.data_limited(law, target, max_images, k), max_images)]
    if wishes.max_params:
        limited = deciding.inference_limited(law, target, wishes.max_params, k)
        limits.append(("inference", limited, wishes.max_params))
    for name, choice, limit in limits:
        content[f"{name}_limited"] = choice.to_dict()
        what = "images seen once" if name == "data" else "parameters"
        lines.append(
            f"- At most {limit:,.0f} {what}: N {choice.num_params:,.0f}, images "
            f"{choice.num_examples:,.0f}, loss {choice.loss.value:.4g}, "
            f"{choice.penalty.value:.3g} above the best ({choice.note})."
        )
    wanted = wishes.target_loss or float(best.loss.value[0])
    content["examples_needed"] = []
    lines += ["", f"Images to reach a loss of {wanted:.4g}:", "", "| N | images | 90% | |"]
    lines += ["|---|---|---|---|"]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        needed = deciding.examples_needed(law, wanted, factor * size)
        content["examples_needed"].append(needed.to_dict())
        lines.append(
            f"| {factor * size:,.0f} | {needed.examples.value:,.0f} | "
            f"{_range(needed.examples, '{:,.0f}')} | {needed.note} |"
        )
    content["next_run"], more = _next_run(sweep, main, target)
    return content, [*lines, "", *more, ""]


def _next_run(sweep: Sweep, main: ArmFits, target: float) -> Section:
    law, k = main.law, main.flops_factor
    assert law is not None
    best = deciding.frontier(law, target, k)
    n_target, d_target = float(best.num_params.value[0]), float(best.num_examples.value[0])
    sizes = np.array(sorted({c.num_params for c in sweep.plan.cells}), np.float64)
    largest = float(main.column("flops").max())
    grid = [(n, f * largest / (k * n)) for n in sizes for f in (0.3, 1.0, 3.0)]
    chosen = deciding.next_run(law, [n for n, _ in grid], [d for _, d in grid], n_target, d_target)
    n, d = grid[chosen.index]
    return chosen.to_dict(), [
        "The next most useful run for the price, of the plan's sizes at 0.3, 1 and 3 times the "
        f"largest fitted compute: N {n:,.0f} with {d:,.0f} images ({k * n * d:.3g} FLOPs). It "
        f"would lower the standard deviation of the predicted ln loss at {target:.3g} FLOPs from "
        f"{chosen.deviation:.2%} to {chosen.deviation_after:.2%}. {chosen.note}",
    ]


def side_questions(
    sweep: Sweep, arms: dict[str, ArmFits], wishes: Any, folder: Path
) -> dict[str, Section]:
    """What the other runs of a sweep answer, as far as there are any."""
    answers: dict[str, Section] = {}
    if len(arms) > 1:
        answers["recipes"] = _recipes(sweep, arms)
    rows = {kind: sweep.chosen(stage="fit", arm="main", kinds=(kind,)) for kind in
            ("star", "lr", "data")}  # fmt: skip
    if rows["star"]:
        pictures.draw_shapes(rows["star"], sweep.metric, folder / "shapes.png")
        answers["shape"] = _shape(rows["star"], sweep.metric, wishes.budgets)
    if rows["lr"]:
        answers["learning_rate"] = _learning_rate(rows["lr"], next(iter(arms.values())))
    if rows["data"]:
        answers["data"] = _data(rows["data"], sweep.metric)
    downstream = _downstream(next(iter(arms.values())))
    if downstream is not None:
        answers["downstream"] = downstream
    return answers


def _recipes(sweep: Sweep, arms: dict[str, ArmFits]) -> Section:
    """Recipes beside each other: known floors against fitted ones, and where curves cross."""
    content: dict[str, Any] = {}
    main = next(iter(arms.values()))
    classes = sweep.plan.sweep["train"]["model"]["num_classes"]
    lines = ["## Recipes", ""]
    for name, fits in list(arms.items())[1:]:
        answer: dict[str, Any] = {}
        share = float(fits.rows[0]["label_noise"] or 0.0)
        if share and fits.law is not None:
            floor = noise_floor(share, classes)
            low, high = fits.law.intervals(0.9)["E"]
            fitted = fits.law.params["E"]
            # No model can come below the noise; without noise the recipe has a floor of its own.
            known = low <= floor <= high
            answer |= {"known_floor": floor, "fitted_floor": fitted, "interval": [low, high],
                       "is_right": bool(known)}  # fmt: skip
            lines.append(
                f"- `{name}`: {share:.0%} of the labels are redrawn, which no model can undo: the "
                f"known floor is {floor:.4g}. Fitted: {fitted:.4g} (90%: {low:.4g} to {high:.4g}), "
                f"**{'right' if known else 'wrong'}**."
            )
        elif share:
            lines.append(f"- `{name}`: no law, so no floor ({fits.missing['law']}).")
        elif main.frontier is not None and fits.frontier is not None:
            span = [f.frontier.points.x for f in (main, fits) if f.frontier is not None]
            low = min(x[0] for x in span)
            high = 10 * max(x[-1] for x in span)
            met = crossing(main.frontier, fits.frontier, float(low), float(high))
            answer["crossing"] = met.to_dict()
            where = met.note if met.x is None else f"they cross at {met.x:.3g} FLOPs ({met.note})"
            lines.append(f"- `{name}` against `{main.arm}`: {where}.")
        content[name] = answer
    return content, [*lines, ""]


def _shape(rows: list[Row], metric: str, budgets: tuple[float, ...]) -> Section:
    """The shape law of each dimension of a star sweep, over compute."""
    content: dict[str, Any] = {}
    largest = max(r["flops"] for r in rows)
    budgets = budgets or (largest, 10 * largest)
    wanted = " | ".join(f"best at {budget:.3g} FLOPs" for budget in budgets)
    lines = ["## Shape", "", "![shapes](shapes.png)", ""]
    lines += [f"| dimension | s | 90% | {wanted} | notes |", "|---" * (4 + len(budgets)) + "|"]
    centre = {d: max({r[d] for r in rows}, key=[r[d] for r in rows].count) for d in SHAPE_DIMS}
    for dim in SHAPE_DIMS:
        ray = [r for r in rows if all(r[d] == centre[d] for d in SHAPE_DIMS if d != dim)]
        values = [np.array([r[name] for r in ray], np.float64) for name in (dim, "flops", metric)]
        try:
            law = fit_shape(*values, groups=[r["trunk"] for r in ray])
        except InputError as error:
            content[dim] = {"missing": str(error)}
            lines.append(f"| {dim} | | {'| ' * (1 + len(budgets))}| {error} |")
            continue
        best = law.optimum(np.array(budgets))
        least, most = law.interval(np.array(budgets), 0.9)
        content[dim] = law.to_dict() | {
            "optima": [
                {"flops": c, "best": float(x), "interval": [float(a), float(b)]}
                for c, x, a, b in zip(budgets, best, least, most, strict=True)
            ]
        }
        shown = " | ".join(
            f"{x:,.0f} ({a:,.0f} to {b:,.0f})" for x, a, b in zip(best, least, most, strict=True)
        )
        low, high = law.exponent_interval(0.9)
        notes = "; ".join([*law.flags, *(f"{n} not identified" for n in law.not_identified)])
        lines.append(
            f"| {dim} | {law.exponent:.3f} | {low:.3f} to {high:.3f} | {shown} | {notes} |"
        )
    lines += ["", "The best value of a dimension, the others at the centre of the star, grows as "
              "FLOPs^s (arXiv 2305.13035).", ""]  # fmt: skip
    return content, lines


def _learning_rate(rows: list[Row], main: ArmFits) -> Section:
    """Whether the rule's learning rate was the best of those tried beside it."""
    content: dict[str, Any] = {}
    lines = ["## Learning rate", "", "| N | images | loss by learning rate | best |"]
    lines += ["|---|---|---|---|"]
    keys = dict.fromkeys((r["num_params"], r["images"]) for r in rows)
    for size, images in keys:
        tried = [r for r in (*main.rows, *rows) if (r["num_params"], r["images"]) == (size, images)]
        means = {
            rate: float(np.mean([r[main.metric] for r in tried if r["learning_rate"] == rate]))
            for rate in sorted({r["learning_rate"] for r in tried})
        }
        ruled = [r["learning_rate"] for r in main.rows if (r["num_params"], r["images"]) ==
                 (size, images)]  # fmt: skip
        best = min(means, key=lambda rate: means[rate])
        factor = best / ruled[0] if ruled else None
        content[f"{size}"] = {"losses": means, "best": best, "best_over_rule": factor}
        shown = ", ".join(f"{rate:.3g}: {loss:.4g}" for rate, loss in means.items())
        over = "" if factor is None else f"{factor:.3g} x the rule"
        lines.append(f"| {size:,} | {images:,} | {shown} | {over} |")
    lines += ["", "A best rate at the edge of those tried may lie beyond it; small sizes differ by "
              "less than their seeds.", ""]  # fmt: skip
    return content, lines


def _data(rows: list[Row], metric: str) -> Section:
    """Fewer different images, seen more often, at the same number of images seen."""
    content = []
    lines = ["## Repeated data", "", "| N | images seen | different | epochs | loss |"]
    lines += ["|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["num_params"], r["images"], r["unique_images"])):
        names = ("num_params", "images", "unique_images", "epochs")
        content.append({n: row[n] for n in (*names, metric)})
        lines.append(
            f"| {row['num_params']:,} | {row['images']:,} | {row['unique_images']:,} | "
            f"{row['epochs']:.2f} | {row[metric]:.4g} |"
        )
    return content, [*lines, ""]


def _downstream(main: ArmFits) -> Section | None:
    """Every other metric of the runs, as an error, over the loss that laws are fitted to."""
    content: dict[str, Any] = {}
    lines = ["## Other metrics over the loss", "", "| error | form | verdict |", "|---|---|---|"]
    names = [
        name
        for name in main.rows[0]
        if name.startswith("eval/") and name.endswith(("accuracy", "auc", "map"))
    ]
    for name in names:
        try:
            fit = fit_downstream(
                main.losses, 1 - main.column(name), groups=[r["trunk"] for r in main.rows]
            )
        except InputError as error:
            content[name] = {"missing": str(error)}
            continue
        content[name] = {"over_loss": fit.to_dict()}
        lines.append(f"| 1 - {name} | {fit.form} | {fit.verdict} |")
        if main.law is not None:
            size, images = main.column("num_params"), main.column("images")
            law = fit_parametric(size, images, 1 - main.column(name), resamples=0)
            content[name]["over_size_and_images"] = law.to_dict()
    return (content, [*lines, ""]) if names else None
