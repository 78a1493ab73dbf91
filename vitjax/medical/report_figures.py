"""The pictures of a transfer report."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitjax.medical.report_style import (
    BAND,
    BLACK,
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    SERIES,
    YELLOW,
    Report,
    clean,
    level,
    make_axes,
    make_panels,
    numbers,
    plain_text,
    short_name,
)  # fmt: skip

MAX_PANELS = 16
MAX_AUDITED = 6
CAPTIONS = {
    "methods.png": "Test AUROC of every preset and floor.",
    "roc.png": "ROC curves of the chosen preset on the test split, of the mean score over seeds.",
    "froc.png": "Lesions found at so many false positives a slide; dots: the rates of the score.",
    "reliability.png": "Predicted and observed frequency, before and after the temperature.",
    "subgroups.png": "AUROC by subgroup.",
    "robustness.png": "AUROC by family and severity of corruption; above, each method's mean drop.",
    "corruptions.png": "One image under every corruption.",
    "low_data.png": "AUROC over the number of labelled images.",
}


def draw(report: Report, folder: Path, images: Sequence[np.ndarray] | None = None) -> list[str]:
    """Draws each picture whose part the report has; one that it has not is removed.

    Args:
      report: see `vitjax.medical.report.make`.
      folder: made if missing.
      images: uint8 `[Y, X, C]`: the first is shown under every corruption. None shows none, since
        it is somebody's.

    Returns:
      The names of the files that are there, in the report's order.
    """
    drawers: dict[str, Callable[[], Figure | None]] = {
        "methods.png": lambda: _methods(report),
        "roc.png": lambda: _roc(report.get("curves") or []),
        "froc.png": lambda: _froc(report.get("froc") or {}),
        "reliability.png": lambda: _reliability(report.get("calibration") or []),
        "subgroups.png": lambda: _subgroups(report.get("audit") or []),
        "robustness.png": lambda: _robustness(report.get("robustness") or {}),
        "corruptions.png": lambda: _corruptions(images),
        "low_data.png": lambda: _low_data(report.get("low_data") or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, drawer in drawers.items():
        with plain_text():
            figure = drawer()
            if figure is None:
                (folder / name).unlink(missing_ok=True)
                continue
            part = folder / f"{name}.part"
            figure.savefig(part, dpi=130, format="png", facecolor="white")
        os.replace(part, folder / name)
        found.append(name)
    return found


def _methods(report: Report) -> Figure | None:
    rows = [m for m in report.get("methods") or [] if not np.isnan(numbers(m["test_auroc"])[0])]
    if not rows:
        return None
    rows.sort(key=lambda m: numbers(m["test_auroc"])[0])
    chosen = report.get("chosen")
    figure, all_axes = make_axes(1, 1, 7.6, 1.5 + 0.3 * len(rows))
    axes = all_axes[0, 0]
    lows = [v for m in rows for v in (*numbers(m["test_auroc"]), *_seeds(m)) if np.isfinite(v)]
    for place, row in enumerate(rows):
        value, low, high = numbers(row["test_auroc"])
        is_chosen = row["method"] == chosen
        colour = BLUE if row.get("kind") == "preset" else YELLOW
        if is_chosen:
            axes.axhspan(place - 0.45, place + 0.45, color=BLUE, alpha=0.12, linewidth=0)
            axes.axvline(value, color=BLUE, linewidth=0.9, linestyle=":")
        axes.plot([low, high], [place, place], color=colour, linewidth=2.6, alpha=0.75)
        seeds = _seeds(row)
        if len(seeds) > 1:
            axes.plot(seeds, [place - 0.24] * len(seeds), ".", color=BLACK, markersize=3.5)
        shape = "o" if row.get("kind") == "preset" else "s"
        axes.plot(value, place, shape, color=colour, markersize=9 if is_chosen else 6.5,
                  markeredgecolor=BLACK, markeredgewidth=1.4 if is_chosen else 0.5)  # fmt: skip
        axes.text(1.01, place, f"{value:.3f}", va="center", fontsize=9,
                  weight="bold" if is_chosen else "normal",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    labels = [
        short_name(m["method"]) + (" (chosen)" if m["method"] == chosen else "") for m in rows
    ]
    axes.set_yticks(range(len(rows)), labels)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_weight("bold" if row["method"] == chosen else "normal")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(max(0.0, min(lows) - 0.03), min(1.02, max(lows) + 0.03))
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"AUROC on the test split, {level(report)} interval; small dots: seeds")
    for marker, colour, label in (("o", BLUE, "preset"), ("s", YELLOW, "floor")):
        axes.plot([], [], marker, color=colour, markeredgecolor=BLACK, markeredgewidth=0.5,
                  label=label)  # fmt: skip
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2,
                  frameon=False)  # fmt: skip
    return figure


def _seeds(row: Mapping[str, Any]) -> list[float]:
    return [float(v) for v in row.get("test_by_seed") or [] if v is not None]


def _roc(curves: Sequence[Mapping[str, Any]]) -> Figure | None:
    shown = []
    for curve in curves:
        fpr, tpr = (
            np.array([np.nan if v is None else v for v in curve.get(k) or []], float)
            for k in ("fpr", "tpr")
        )
        known = np.isfinite(fpr) & np.isfinite(tpr) if len(fpr) == len(tpr) else np.zeros(0, bool)
        if known.sum() > 1:
            shown.append((curve["question"], fpr[known], tpr[known]))
    if not shown:
        return None
    left_out = len(shown) - MAX_PANELS
    figure, panels = make_panels(min(len(shown), MAX_PANELS), 4, 3.1, 3.2)
    for axes, (name, fpr, tpr) in zip(panels, shown, strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        axes.fill_between(fpr, tpr, color=BLUE, alpha=BAND / 2, linewidth=0)
        axes.plot(fpr, tpr, color=BLUE, linewidth=1.8)
        axes.set_title(f"{short_name(name)}\narea {np.trapezoid(tpr, fpr):.2f}")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_aspect("equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("sensitivity", fontsize=9)
    if left_out > 0:
        figure.suptitle(f"the first {MAX_PANELS} of {len(shown)} questions", fontsize=9)
    return figure


def _froc(part: Mapping[str, Any]) -> Figure | None:
    if not part:
        return None
    figure, all_axes = make_axes(1, 1, 4.6, 3.4)
    axes = all_axes[0, 0]
    rates = [row["false_positives"] for row in part["sensitivities"]]
    curve = np.array([[c["false_positives"], c["sensitivity"]] for c in part["curve"]], float)
    end = max(2 * rates[-1], 1e-9)  # it goes on level
    shown = np.vstack([curve[curve[:, 0] <= end], [end, curve[curve[:, 0] <= end][-1, 1]]])
    axes.plot(np.maximum(shown[:, 0], rates[0] / 4), shown[:, 1], color=BLUE, linewidth=1.8)
    axes.plot(rates, [row["sensitivity"] for row in part["sensitivities"]], "o", color=ORANGE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("false positives a slide")
    axes.set_ylabel("share of lesions found")
    return figure


def _reliability(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    rows = [r for r in rows if any((r.get("reliability") or {}).values())][:MAX_PANELS]
    if not rows:
        return None
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(max(4.2, 3.2 * columns), 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 1] * lines
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=ratios)
    for number in range(lines * columns):
        upper = grid[2 * (number // columns), number % columns]
        lower = grid[2 * (number // columns) + 1, number % columns]
        if number >= len(rows):
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        clean(upper)
        clean(lower)
        _reliability_of(rows[number], upper, lower)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _reliability_of(row: Mapping[str, Any], upper: Any, lower: Any) -> None:
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--", label="ideal")
    looks = (("before", ORANGE, "s", -1, "before temperature"), ("after", BLUE, "o", 1, "after"))
    for when, colour, marker, side, label in looks:
        bins = [b for b in row["reliability"].get(when) or [] if b["count"]]
        x, y = ([b[k] for b in bins] for k in ("mean_probability", "observed"))
        upper.plot(x, y, color=colour, linewidth=1.2, alpha=0.7)
        sizes = [12 + 60 * (b["count"] / max(c["count"] for c in bins)) ** 0.5 for b in bins]
        upper.scatter(x, y, sizes, color=colour, marker=marker, label=label, alpha=0.85,
                      edgecolors="white", linewidths=0.5, zorder=3)  # fmt: skip
        centres = [(b["low"] + b["high"]) / 2 for b in bins]
        widths = [0.4 * (b["high"] - b["low"]) for b in bins]
        at = [c + side * w / 2 for c, w in zip(centres, widths, strict=True)]
        lower.bar(at, [b["count"] for b in bins], widths, color=colour)
    before, after = (row.get(k) for k in ("ece", "ece_after"))
    errors = "" if before is None or after is None else f"\nECE {before:.3f} to {after:.3f}"
    upper.set_title(short_name(row.get("label_set", "")) + errors)
    upper.set_ylabel("observed frequency")
    upper.set_xticks([0, 0.25, 0.5, 0.75, 1], [])
    lower.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    for axes in (upper, lower):
        axes.set_xlim(-0.03, 1.03)
    upper.set_ylim(-0.03, 1.03)
    lower.set_ylabel("cases")
    lower.set_xlabel("predicted probability")


def _worst_gap(audited: Mapping[str, Any]) -> float:
    gaps = [numbers(g["gap"])[0] for g in audited.get("gaps") or [] if g["metric"] == "auroc"]
    return max((g for g in gaps if np.isfinite(g)), default=-1.0)


def _subgroups(audit: Sequence[Mapping[str, Any]]) -> Figure | None:
    audit = [a for a in audit if a.get("subgroups")]
    if not audit:
        return None
    shown = sorted(audit, key=_worst_gap, reverse=True)[:MAX_AUDITED]
    names = list(dict.fromkeys((r["column"], r["value"]) for a in shown for r in a["subgroups"]))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    size = 2.2 + 2.9 * columns, lines * (0.9 + 0.26 * len(names)) + 0.3
    figure, grid = make_axes(lines, columns, max(6.4, size[0]), size[1])
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    values = [v for a in shown for r in a["subgroups"] for v in numbers(r["auroc"])]
    known = [v for v in values if np.isfinite(v)] or [0.0]
    limits = max(0.0, min(known) - 0.04), 1.02
    for number, (axes, audited) in enumerate(zip(grid.flat, shown, strict=False)):
        rows = {(r["column"], r["value"]): r for r in audited["subgroups"]}
        is_first = number % columns == 0
        labels = [
            f"{short_name(c, 18)}: {short_name(v, 22)}" if c != "all" else "all" for c, v in names
        ]
        axes.set_yticks(range(len(names)), labels if is_first else [])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(*limits)
        axes.set_title(short_name(audited["question"]))
        for place, key in enumerate(names):
            if key in rows:
                _subgroup(axes, place, rows[key], limits, is_first)
    figure.supxlabel("AUROC on the test split, with its interval; grey: too few cases", fontsize=9)
    if len(shown) < len(audit):
        figure.suptitle(f"{len(shown)} of {len(audit)} questions: the largest gaps", fontsize=9)
    return figure


def _subgroup(
    axes: Any, place: int, row: Mapping[str, Any], limits: tuple[float, float], is_first: bool
) -> None:
    value, low, high = numbers(row["auroc"])
    if np.isnan(value):
        axes.axhspan(place - 0.42, place + 0.42, color=GREY, alpha=0.13, linewidth=0)
        axes.text(limits[0] + 0.02 * (limits[1] - limits[0]), place,
                  f"insufficient: {row['n']} cases, {row['positives']} positive",
                  color="#5a5a5a", fontsize=7.5, va="center")  # fmt: skip
        if is_first:
            axes.get_yticklabels()[place].set_color(GREY)
        return
    is_all = row["column"] == "all"
    if is_all:
        axes.axvline(value, color=BLACK, linewidth=0.8, linestyle=":")
    colour = BLACK if is_all else BLUE
    axes.plot([low, high], [place, place], color=colour, linewidth=2.2, alpha=0.7)
    axes.plot(value, place, "D" if is_all else "o", color=colour, markersize=5.5)


def _robustness(part: Mapping[str, Any]) -> Figure | None:
    methods = [m for m in part.get("methods") or [] if m.get("families")]
    if not methods:
        return None
    names = [f["family"] for f in methods[0]["families"]]
    figure, panels = make_panels(len(names), 4, 2.6, 2.3)
    for number, (axes, name) in enumerate(zip(panels, names, strict=True)):
        drops = []
        for method, colour, marker in zip(methods, SERIES, MARKERS, strict=False):
            of = {f["family"]: f for f in method["families"]}.get(name)
            if of is None:
                continue
            rows = [(0, method["clean"]), *((s["severity"], s["auroc"]) for s in of["severities"])]
            value, low, high = np.array([numbers(i) for _, i in rows]).T
            x = [severity for severity, _ in rows]
            axes.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)
            axes.plot(x, value, color=colour, marker=marker, markersize=4,
                      label=short_name(method["method"]))  # fmt: skip
            drops.append(f"{numbers(of['mean_drop'])[0]:.2f}")
        axes.set_title(f"{short_name(name.replace('_', ' '), 26)}\ndrop {' / '.join(drops)}")
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        axes.sharey(panels[0])
        axes.set_xticks(range(6))
        if number % 4:
            axes.tick_params(labelleft=False)
    figure.supxlabel("severity (0: the image as it is)", fontsize=9)
    figure.supylabel("AUROC on the test split (above: mean drop by method)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left",
                  ncols=len(methods), frameon=False)  # fmt: skip
    return figure


def _corruptions(images: Sequence[np.ndarray] | None) -> Figure | None:
    from vitjax.medical.corruptions import FAMILIES, SEVERITIES, corrupt

    if images is None or not len(images):
        return None
    image = images[0]
    figure, grid = make_axes(len(FAMILIES), 1 + len(SEVERITIES), 7.2, 1.2 * len(FAMILIES))
    for line, name in zip(grid, FAMILIES, strict=True):
        shown = [image, *(corrupt(image, name, s, 0) for s in SEVERITIES)]
        for axes, picture in zip(line, shown, strict=True):
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center")
    for axes, title in zip(grid[0], ("as it is", *SEVERITIES), strict=True):
        axes.set_title(str(title))
    return figure


def _low_data(part: Mapping[str, Any]) -> Figure | None:
    curves = [c for c in part.get("curves") or [] if c.get("points")]
    if not curves:
        return None
    figure, all_axes = make_axes(1, 1, 7.2, 4.4)
    axes = all_axes[0, 0]
    for number, curve in enumerate(curves):
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        points = sorted(curve["points"], key=lambda p: p["images"])
        shift = 1.025 ** (number - (len(curves) - 1) / 2)  # so that intervals stand side by side
        x = np.array([p["images"] for p in points]) * shift
        value, low, high = np.array([numbers(p) for p in points]).T
        axes.vlines(x, low, high, color=colour, alpha=0.45, linewidth=2)
        axes.plot(
            x, value, color=colour, marker=marker, markersize=6, label=short_name(curve["method"])
        )
    images = sorted({p["images"] for c in curves for p in c["points"]})
    axes.set_xscale("log")
    told: list[int] = []
    for count in images:  # so that no label lies on another
        told += [count] if not told or count > 1.15 * told[-1] else []
    axes.set_xticks(told, [f"{n:,}" for n in told])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labelled images")
    metric = str(part.get("metric") or "auroc")
    axes.set_ylabel(f"{'AUROC' if metric == 'auroc' else short_name(metric)} on the test split")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left",
                  ncols=min(len(curves), 5), frameon=False)  # fmt: skip
    return figure
