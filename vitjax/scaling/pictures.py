"""Pictures of fits, for people who would rather look than read."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitjax.curves import COLOURS
from vitjax.scaling.curve import CurveFit
from vitjax.scaling.freeze import Outcome
from vitjax.scaling.sweep_fits import ArmFits, Row

GREY, BAND = "#888888", 0.18


def _axes(columns: int, width: float = 5.2, height: float = 3.9) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, columns, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _few_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis that spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _log_y(axes: Any, values: Any) -> None:
    axes.set_yscale("log")
    values = np.asarray(values, np.float64)
    if values.max() < 8 * values.min():
        _few_ticks(axes.yaxis)


def draw_curve(
    fit: CurveFit,
    path: Path,
    *,
    names: tuple[str, str] = ("x", "y"),
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """The points, the law with its 80% band, and points that the fit has not seen."""
    figure, (left, right) = _axes(2)
    points = fit.points
    far = points.x[-1] * max(fit.reach, 3.0)
    if held_out is not None:
        far = max(far, float(held_out[0].max()))
    x = np.geomspace(points.x[0], far, 200)
    low, high = fit.interval(x, 0.8)
    left.fill_between(x, low, high, color=COLOURS[0], alpha=BAND, linewidth=0, label="80% band")
    left.plot(x, fit.predict(x), color=COLOURS[0], label=f"prediction ({fit.form} leads)")
    left.plot(points.x, points.y, ".", color="black", markersize=5, label="fitted")
    if held_out is not None:
        left.plot(*held_out, ".", color=COLOURS[1], markersize=4, label="held out")
    left.axvline(points.x[-1], color=GREY, linewidth=0.8, linestyle=":")
    left.set_xscale("log")
    _log_y(left, np.concatenate([points.y, fit.predict(x)]))
    left.set_xlabel(names[0])
    left.set_ylabel(names[1])
    left.legend(frameon=False, fontsize=8)
    left.set_title(_wrap(fit.verdict), loc="left", fontsize=8)
    right.axhline(0, color=GREY, linewidth=0.8)
    residual = np.log(points.y) - np.log(fit.predict(points.x))
    right.plot(points.x, residual, ".", color="black", label="fitted")
    if held_out is not None:
        beyond = np.log(held_out[1]) - np.log(fit.predict(held_out[0]))
        right.plot(held_out[0], beyond, ".", color=COLOURS[1], label="held out")
    right.set_xscale("log")
    right.set_xlabel(names[0])
    right.set_title("ln measured - ln predicted", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _wrap(text: str, width: int = 70) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])


def draw_isoflop(fits: ArmFits, path: Path) -> None:
    """Loss over size at each budget with its parabola, and the optima over compute."""
    law = fits.isoflop
    assert law is not None
    figure, (left, right) = _axes(2)
    for colour, budget in zip(_ramp(len(law.budgets)), law.budgets, strict=True):
        size = fits.column("num_params")[list(budget.rows)]
        left.plot(size, fits.losses[list(budget.rows)], "o", color=colour, markersize=4)
        x = np.geomspace(size.min(), size.max(), 80)
        parabola = np.polyval(budget.coefficients, np.log(x))
        left.plot(x, parabola, color=colour, label=f"{budget.flops:.2g} FLOPs")
        if budget.is_used:
            left.plot(budget.optimum, budget.loss, "*", color=colour, markersize=11,
                      markeredgecolor="black", markeredgewidth=0.5)  # fmt: skip
    left.set_xscale("log")
    _log_y(left, fits.losses)
    left.set_xlabel("parameters")
    left.set_ylabel(fits.metric)
    left.legend(frameon=False, fontsize=8)
    left.set_title("each budget's best size", loc="left", fontsize=10)
    used = [b for b in law.budgets if b.is_used]
    flops = np.array([b.flops for b in used])
    x = np.geomspace(flops.min() / 1.5, flops.max() * 12, 60)
    low, high = law.interval(x, 0.9)
    right.fill_between(x, low, high, color=COLOURS[0], alpha=BAND, linewidth=0)
    right.plot(x, law.predict(x), color=COLOURS[0], label=f"parabolas: N* ~ C^{law.exponent:.2f}")
    right.plot(flops, [b.optimum for b in used], "*", color="black", markersize=9)
    if fits.law is not None:
        from vitjax.scaling.decide import frontier

        best = frontier(fits.law, x, fits.flops_factor)
        right.plot(x, best.num_params.value, color=COLOURS[1], linestyle="--",
                   label=f"parametric law: N* ~ C^{fits.law.exponent:.2f}")  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("training FLOPs")
    right.set_ylabel("best number of parameters")
    right.legend(frameon=False, fontsize=8)
    right.set_title("what to train with more compute (90% band)", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


def _ramp(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.1 + 0.75 * i / max(count - 1, 1)) for i in range(count)]


def draw_frontier(fits: ArmFits, results: list[Outcome], path: Path) -> None:
    """Loss over compute: all runs, the law's frontier, and the hold-out with what was predicted."""
    from vitjax.scaling.decide import frontier

    assert fits.law is not None
    figure, (left, right) = _axes(2)
    flops = fits.column("flops")
    left.plot(flops, fits.losses, ".", color=GREY, markersize=4, label="runs fitted")
    far = max([o.flops for o in results], default=flops.max() * 10)
    x = np.geomspace(flops.min(), far, 80)
    best = frontier(fits.law, x, fits.flops_factor)
    left.fill_between(x, best.loss.low, best.loss.high, color=COLOURS[0], alpha=BAND, linewidth=0)
    left.plot(x, best.loss.value, color=COLOURS[0], label="best of the law (90% band)")
    left.axhline(fits.law.params["E"], color=GREY, linestyle=":", linewidth=1, label="fitted floor")
    for o in results:
        left.plot([o.flops] * len(o.measured), o.measured, "x", color=COLOURS[1], markersize=5)
    if results:
        left.plot([], [], "x", color=COLOURS[1], label="hold-out, measured")
    left.set_xscale("log")
    _log_y(left, [*fits.losses, fits.law.params["E"], *best.loss.value])
    left.set_xlabel("training FLOPs")
    left.set_ylabel(fits.metric)
    left.legend(frameon=False, fontsize=8)
    if not results:
        right.set_axis_off()
        right.text(0.05, 0.5, "no hold-out runs yet", fontsize=10)
    for i, o in enumerate(results):
        low80, high80 = o.intervals["0.8"]
        right.plot([i, i], o.intervals["0.9"], color=COLOURS[0], linewidth=1)
        right.plot([i, i], [low80, high80], color=COLOURS[0], linewidth=5, alpha=0.4)
        right.plot(i, o.predicted, "_", color=COLOURS[0], markersize=14)
        right.plot([i] * len(o.measured), o.measured, "x", color=COLOURS[1])
    if results:
        labels = [f"{o.factor:.3g}x\nN {o.num_params:,}" for o in results]
        right.set_xticks(range(len(results)), labels, fontsize=8)
        right.set_title("hold-out: frozen 80 and 90% bands, measured x", loc="left", fontsize=10)
        right.set_xlim(-0.6, len(results) - 0.4)
    figure.savefig(path, dpi=130)


def draw_residuals(fits: ArmFits, path: Path) -> None:
    """What the parametric law leaves over, by size, by images and by compute."""
    assert fits.law is not None
    figure, all_axes = _axes(3, 4.2, 3.4)
    size, images = fits.column("num_params"), fits.column("images")
    residual = np.log(fits.losses) - np.log(fits.law.predict(size, images))
    named = (("parameters", size), ("images", images), ("training FLOPs", fits.column("flops")))
    for axes, (name, x) in zip(all_axes, named, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.plot(x, residual, ".", color=COLOURS[0])
        axes.set_xscale("log")
        axes.set_xlabel(name)
    all_axes[0].set_title("ln measured - ln fitted", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_shapes(rows: list[Row], metric: str, path: Path) -> None:
    """The star sweep: loss over width, depth and MLP width, a line for each number of images."""
    dims = ("width", "depth", "mlp_dim")
    centre = {d: _commonest([r[d] for r in rows]) for d in dims}
    figure, all_axes = _axes(3, 4.2, 3.4)
    images = sorted({r["images"] for r in rows})
    for axes, dim in zip(all_axes, dims, strict=True):
        others = [d for d in dims if d != dim]
        for colour, count in zip(_ramp(len(images)), images, strict=True):
            ray = [r for r in rows if r["images"] == count and
                   all(r[d] == centre[d] for d in others)]  # fmt: skip
            means = {v: np.mean([r[metric] for r in ray if r[dim] == v]) for v in
                     sorted({r[dim] for r in ray})}  # fmt: skip
            axes.plot(list(means), list(means.values()), "o-", color=colour, markersize=4,
                      label=f"{count:,} images")  # fmt: skip
        axes.set_xscale("log")
        values = sorted({r[dim] for r in rows})
        axes.set_xticks(values, [f"{v:,}" for v in values], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(dim)
    all_axes[0].set_ylabel(metric)
    all_axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def _commonest(values: list[Any]) -> Any:
    return max(set(values), key=values.count)
