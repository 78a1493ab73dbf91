"""`vitjax scaling fit`: one law on one table, printed, and written as JSON, Markdown and PNG."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.scaling import verb
from vitjax.scaling.curve import CurveFit, fit_curve
from vitjax.scaling.flops_factor import flops_factor
from vitjax.scaling.isoflop import fit_isoflop
from vitjax.scaling.law_check import check_law
from vitjax.scaling.parametric import fit_parametric
from vitjax.scaling.pictures import draw_curve
from vitjax.scaling.shape_law import fit_shape
from vitjax.scaling.table import Table, read_table, split_unit
from vitjax.telemetry import write_whole

log = logging.getLogger("vitjax")


def _table(arguments: argparse.Namespace) -> tuple[Table, Table | None]:
    """The rows to fit and those to predict.

    Raises:
      InputError: a sweep's hold-out runs are among the rows to fit.
    """
    table = read_table(arguments.table).where(arguments.where)
    is_sweep = "stage" in table.names and any(s == "holdout" for s in table.texts("stage"))
    held_out = None
    if arguments.hold_out:
        held_out = table.where([arguments.hold_out])
        kept = [
            (n, row)
            for n, row in zip(table.numbers, table.rows, strict=True)
            if n not in set(held_out.numbers)
        ]
        if not kept:
            raise InputError(f"--hold-out={arguments.hold_out} leaves no row to fit")
        table = Table(table.path, tuple(r for _, r in kept), tuple(n for n, _ in kept))
    elif is_sweep:
        raise InputError(
            f"{table.path} holds hold-out runs, which must not leak into a fit: add "
            "--where=stage=fit, or --hold-out=stage=holdout to score them"
        )
    if "status" in table.names and any(s != "done" for s in table.texts("status")):
        log.info("%s: rows that are not done are left out", table.path)
        table = table.where(["status=done"])
    return table, held_out


def _y(table: Table, name: str, is_accuracy: bool) -> np.ndarray:
    values = table.column(name)
    if not is_accuracy:
        return values
    if values.max() >= 1:
        row = table.numbers[int(values.argmax())]
        raise InputError(
            f"--accuracy: column {name!r} holds {values.max():g} in row {row}; accuracies lie "
            "below 1 (percent / 100)"
        )
    return 1 - values


def _curve(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    table, held_out = _table(arguments)
    x_text, y_name = verb.require(arguments, "curve")
    x_name, unit = split_unit(x_text)
    x, y = table.column(x_name, unit), _y(table, y_name, arguments.accuracy)
    groups = table.texts(arguments.groups) if arguments.groups else None
    try:
        wanted = np.array([float(v) for v in arguments.predict.split(",") if v])
    except ValueError as error:
        raise InputError(f"--predict={arguments.predict!r} must be numbers: {error}") from error
    unseen = None
    if held_out is not None:
        unseen = (held_out.column(x_name, unit), _y(held_out, y_name, arguments.accuracy))
        shared = set(zip(x, y, strict=True)) & set(zip(*unseen, strict=True))
        if shared:
            raise InputError(f"{len(shared)} points are both fitted and held out: a leak")
    fit = fit_curve(
        x, y, arguments.form, groups=groups, outliers=arguments.outliers,
        resamples=arguments.resamples or 200, seed=arguments.seed,
    )  # fmt: skip
    content, lines = fit.to_dict(), curve_lines(fit)
    if len(wanted):
        low, high = fit.interval(wanted, 0.8)
        mean = fit.predict(wanted)
        lines += ["", "| x | predicted | 80% band | times the largest x |", "|---|---|---|---|"]
        lines += [
            f"| {a:.4g} | {m:.4g} | {lo:.4g} to {hi:.4g} | {a / x.max():.2g} |"
            for a, m, lo, hi in zip(wanted, mean, low, high, strict=True)
        ]
        content["predictions"] = [
            {"x": float(a), "y": float(m), "interval_80": [float(lo), float(hi)]}
            for a, m, lo, hi in zip(wanted, mean, low, high, strict=True)
        ]
    if unseen is not None:
        error = np.log(fit.predict(unseen[0])) - np.log(unseen[1])
        low, high = fit.interval(unseen[0], 0.8)
        covered = float(np.mean((low <= unseen[1]) & (unseen[1] <= high)))
        content["held_out"] = {
            "num_points": len(error),
            "log_rmse": float(np.sqrt(np.mean(error**2))),
            "covered_by_80": covered,
        }
        lines += [
            "",
            f"Held out: {len(error)} points, log-RMSE {content['held_out']['log_rmse']:.4f}, "
            f"{covered:.0%} inside the 80% band.",
        ]
    if arguments.out:
        draw_curve(fit, _folder(arguments.out) / "fit.png", names=(x_name, y_name), held_out=unseen)
    return content, lines


def curve_lines(fit: CurveFit) -> list[str]:
    """A curve's fit in Markdown."""
    lines = [
        f"**{fit.verdict}**",
        "",
        f"{len(fit.points)} points, {fit.points.num_scales} different x; leading form "
        f"`{fit.form}`: {fit.best.form.formula}",
        "",
        "| parameter | value | 90% interval (bootstrap) |",
        "|---|---|---|",
    ]
    intervals = fit.param_intervals
    lines += [
        f"| {n} | {v:.5g} | {intervals[n][0]:.4g} to {intervals[n][1]:.4g} |"
        for n, v in fit.params.items()
    ]
    lines += ["", "| form | fit error | hold-out error | weight |", "|---|---|---|---|"]
    lines += [
        f"| {r.form} | {r.train_error:.4f} | {r.hold_out_error:.4f} | {r.weight:.2f} |"
        for r in fit.leaderboard
    ]
    seeds = "none repeat" if fit.seed_noise is None else f"{fit.seed_noise:.2%}"
    lines += [
        "",
        f"Errors are root mean squares of ln y. Noise {fit.noise:.2%}, between runs of the same x "
        f"{seeds}. Of {fit.num_starts} starts {fit.num_agreeing} agree; condition number "
        f"{fit.condition_number:.1e}; not identified: {', '.join(fit.not_identified) or 'none'}.",
    ]
    lines += [f"Warning: {w}." for w in fit.warnings]
    return lines


def _law(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    table, held_out = _table(arguments)
    if held_out is not None:
        raise InputError("--hold-out goes with --law=curve; for others use --where")
    groups = table.texts(arguments.groups) if arguments.groups else None
    resamples = 1000 if arguments.resamples is None else arguments.resamples
    options: dict[str, Any] = {"groups": groups, "resamples": resamples, "seed": arguments.seed}
    if arguments.law == "parametric" and arguments.flops and arguments.flops_per_param_example:
        arguments.num_examples = arguments.num_examples or "derived"
    names, verdict = verb.require(arguments, arguments.law), None
    if arguments.law == "parametric":
        size, loss = table.column(names[0]), table.column(names[2])
        if names[1] == "derived":
            column, unit = split_unit(arguments.flops)
            flops = table.column(column, unit or "FLOP")
            examples = flops / (arguments.flops_per_param_example * size)
        else:
            examples = table.column(names[1])
        if arguments.flops and names[1] != "derived":  # three columns must agree on their units
            column, unit = split_unit(arguments.flops)
            flops_factor(size, examples, table.column(column, unit or "FLOP"), max_spread=10.0)
        law: Any = fit_parametric(
            size, examples, loss, drop_highest=arguments.drop_highest,
            tie_exponents=arguments.tie_exponents, **options,
        )  # fmt: skip
        verdict = str(check_law(size, examples, loss))
    elif arguments.law == "isoflop":
        column, unit = split_unit(names[0])
        flops = table.column(column, unit or "FLOP")
        size = table.column(names[1])
        if arguments.num_examples:
            options["num_examples"] = table.column(arguments.num_examples)
            flops_factor(size, options["num_examples"], flops, max_spread=10.0)
        law = fit_isoflop(flops, size, table.column(names[2]), **options)
    else:
        law = fit_shape(*(table.column(name) for name in names), **options)
    content = law.to_dict()
    if verdict is None:
        return content, law_lines(content)
    return {"verdict": verdict} | content, [f"**{verdict}**", "", *law_lines(content)]


def law_lines(content: dict[str, Any]) -> list[str]:
    """Any law's plain values in Markdown, nested ones as JSON."""
    lines = ["| what | value |", "|---|---|"]
    for name, value in content.items():
        shown = f"{value:.5g}" if isinstance(value, float) else json.dumps(value, default=str)
        lines.append(f"| {name} | {shown} |")
    return lines


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out={path}: {error.strerror}") from error
    return folder


def main(arguments: argparse.Namespace) -> int:
    content, lines = (_curve if arguments.law == "curve" else _law)(arguments)
    print("\n".join(lines))
    if arguments.out:
        folder = _folder(arguments.out)
        write_whole(folder / "fit.json", json.dumps(content, indent=1) + "\n")
        write_whole(folder / "fit.md", "\n".join(lines) + "\n")
        log.info("%s", folder / "fit.md")
    return 0
