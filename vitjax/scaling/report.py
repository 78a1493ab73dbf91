"""`vitjax scaling report`: everything that a sweep's runs support, in one folder."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.scaling import decisions, pictures
from vitjax.scaling.checklist import checklist
from vitjax.scaling.freeze import Outcome, check_rows, outcomes, read_frozen
from vitjax.scaling.law_check import check_law
from vitjax.scaling.sweep_fits import ArmFits, Sweep, fit_arm, read_sweep
from vitjax.scaling.validate import MIN_SKILL, Verdict
from vitjax.telemetry import write_whole

log = logging.getLogger("vitjax")


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the reader wants decided; None or empty where nothing was asked.

    Attributes:
      budgets: training FLOPs. max_params: what can be served. max_images: what there is.
      target_loss: to be reached.
    """

    budgets: tuple[float, ...] = ()
    max_params: float | None = None
    max_images: float | None = None
    target_loss: float | None = None


def write_report(
    workdir: Path, *, metric: str | None, resamples: int, seed: int, wishes: Wishes
) -> Path:
    """Writes report/report.md, report.json and pictures; returns the folder.

    Raises:
      InputError: no sweep there, or nothing that can be fitted.
    """
    sweep = read_sweep(workdir, metric)
    arms = {}
    for arm in sweep.arms:
        rows = sweep.to_fit(arm)
        if rows:
            log.info("fitting %s: %d runs, %d resamples", arm, len(rows), resamples)
            arms[arm] = fit_arm(sweep, arm, resamples=resamples, seed=seed)
    if not arms:
        raise InputError(f"{workdir}: no finished isoFLOP or star runs to fit")
    main = next(iter(arms.values()))
    frozen = read_frozen(workdir)
    results: list[Outcome] = []
    if frozen is not None:
        check_rows(sweep, main, frozen)
        results = outcomes(sweep, frozen)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    verdict = judge_sweep(main, results)
    content: dict[str, Any] = {
        "metric": sweep.metric,
        "verdict": str(verdict),
        "reach": verdict.reach,
        "arms": {arm: _arm_content(fits) for arm, fits in arms.items()},
        "hold_out": [dataclasses.asdict(o) for o in results],
        "seed_noise": main.seed_noise(),
        "checklist": checklist(sweep, main, frozen),
    }
    lines = [f"# Scaling report: {workdir.name}", "", f"**{verdict}**", ""]
    lines += _runs_lines(sweep)
    lines += _law_lines(main)
    if main.isoflop is not None:
        pictures.draw_isoflop(main, folder / "isoflop.png")
        lines += _isoflop_lines(main)
    if main.law is not None:
        pictures.draw_frontier(main, results, folder / "frontier.png")
        pictures.draw_residuals(main, folder / "residuals.png")
        lines += ["## Loss over compute", "", "![frontier](frontier.png)", ""]
        lines += _hold_out_lines(results, main, frozen)
        lines += ["## Residuals", "", "![residuals](residuals.png)", ""]
        decided, more = decisions.decide(sweep, arms, wishes)
        content["decisions"] = decided
        lines += more
    for name, (answer, more) in decisions.side_questions(sweep, arms, wishes, folder).items():
        content[name] = answer
        lines += more
    lines += ["## Checklist", ""]
    lines += ["Questions after (Mis)Fitting (arXiv 2502.18969).", "", "| question | answer |"]
    lines += ["|---|---|", *(f"| {q} | {a} |" for q, a in content["checklist"].items()), ""]
    text = json.dumps(_finite(content), indent=1) + "\n"
    write_whole(folder / "report.json", text)
    write_whole(folder / "report.md", "\n".join(lines) + "\n")
    return folder


def _finite(value: Any) -> Any:
    """Plain values, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def judge_sweep(main: ArmFits, results: list[Outcome]) -> Verdict:
    """By the hold-out runs where there are any, else by cuts through the fitted runs.

    With hold-out runs: supported up to the largest factor in compute such that at it and at every
    smaller one the law errs by at most MIN_SKILL of the last value's error, and the mean over seeds
    lies inside the frozen 90% band.
    """
    if main.law is None:
        return Verdict(0.0, main.missing["law"])
    if not results:
        return check_law(main.column("num_params"), main.column("images"), main.losses)
    reach, why = 0.0, ""
    for o in results:
        last = abs(o.naive_errors["last_value"])
        low, high = o.intervals["0.9"]
        mean = float(np.exp(np.mean(np.log(o.measured))))
        place = "lies inside" if low <= mean <= high else "misses"
        why = (
            f"at {o.factor:.2g}x, N {o.num_params:,}, the law is off by {abs(o.error):.2%}, the "
            f"last value by {last:.2%}, and the mean of the seeds {place} the frozen 90% band"
        )
        if abs(o.error) > MIN_SKILL * last or not low <= mean <= high:
            break
        reach = o.factor
    return Verdict(reach, why, "fitted compute")


def _arm_content(fits: ArmFits) -> dict[str, Any]:
    return {
        "num_runs": len(fits.rows),
        "law": None if fits.law is None else fits.law.to_dict(),
        "isoflop": None if fits.isoflop is None else fits.isoflop.to_dict(),
        "frontier": None if fits.frontier is None else fits.frontier.to_dict(),
        "missing": fits.missing,
    }


def _runs_lines(sweep: Sweep) -> list[str]:
    lines = [
        "## Runs",
        "",
        "| stage | kind | arm | done | diverged | failed | training FLOPs paid |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    keys = dict.fromkeys((r["stage"], r["kind"], r["arm"]) for r in sweep.rows)
    for key in keys:
        rows = [r for r in sweep.rows if (r["stage"], r["kind"], r["arm"]) == key]
        counts = [sum(r["status"] == s for r in rows) for s in ("done", "diverged", "failed")]
        paid = sum(r["flops_paid"] or 0 for r in rows)
        lines.append(f"| {' | '.join(map(str, (*key, *counts)))} | {paid:.3g} |")
    bad = [r for r in sweep.rows if r["status"] != "done"]
    lines += [f"- {r['cell']}: {r['status']}, {r['reason']}" for r in bad[:20]]
    return [*lines, ""]


def _law_lines(fits: ArmFits) -> list[str]:
    lines = ["## Loss by size and images", ""]
    law = fits.law
    if law is None:
        return [*lines, f"Not fitted: {fits.missing['law']}", ""]
    intervals = law.intervals(0.9)
    lines += [f"L = E + A/N^alpha + B/D^beta, {law.num_runs} runs, L is `{fits.metric}`.", ""]
    lines += ["| parameter | value | standard error | 90% interval | |", "|---|---|---|---|---|"]
    for name, value in law.params.items():
        low, high = intervals[name]
        mark = "not identified" if name in law.not_identified else ""
        lines.append(
            f"| {name} | {value:.4g} | {law.standard_errors[name]:.3g} | {low:.4g} to {high:.4g} "
            f"| {mark} |"
        )
    low, high = law.exponent_interval(0.9)
    lines += [
        "",
        f"N* ~ C^{law.exponent:.3f} (90%: {low:.3f} to {high:.3f}). Noise around the law "
        f"{law.noise:.2%}; between seeds {_percent(fits.seed_noise())}. {law.num_agreeing} of "
        f"{law.num_starts} starts agree; condition number {law.condition_number:.1e}.",
        "",
    ]
    return lines


def _percent(value: float | None) -> str:
    return "unknown (no repeats)" if value is None else f"{value:.2%}"


def _isoflop_lines(fits: ArmFits) -> list[str]:
    law = fits.isoflop
    assert law is not None
    low, high = law.exponent_interval(0.9)
    lines = ["## Best size by budget", "", "![isoFLOP curves](isoflop.png)", ""]
    lines += ["| training FLOPs | sizes | best N | 90% interval | images | loss | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for b in law.budgets:
        ends = (
            "" if b.optimum_interval is None else "{:,.0f} to {:,.0f}".format(*b.optimum_interval)
        )
        lines.append(
            f"| {b.flops:.3g} | {b.num_sizes} | {b.optimum:,.0f} | {ends} | {b.examples:,.0f} | "
            f"{b.loss:.4g} | {'; '.join(b.flags)} |"
        )
    lines += [
        "",
        f"N* ~ C^{law.exponent:.3f} (90%: {low:.3f} to {high:.3f}) by parabolas; by the parametric "
        f"law {'unknown' if fits.law is None else f'{fits.law.exponent:.3f}'}. Both are shown, "
        "since methods differ on the same data.",
        "",
    ]
    return lines


def _hold_out_lines(
    results: list[Outcome], main: ArmFits, frozen: dict[str, Any] | None
) -> list[str]:
    lines = ["## Hold-out", ""]
    if frozen is None:
        return [*lines, "No prediction was frozen. `vitjax scaling freeze` writes one.", ""]
    lines += [f"Frozen {frozen['time']} from {frozen['num_rows']} runs.", ""]
    if not results:
        return [*lines, "No hold-out run has finished yet.", ""]
    lines += [
        "| compute | N | images | predicted | 80% band | measured (seeds) | inside 80% | "
        "law's error | last value's | power law's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in results:
        low, high = o.intervals["0.8"]
        measured = ", ".join(f"{v:.4g}" for v in o.measured)
        power = o.naive_errors.get("power")
        lines.append(
            f"| {o.factor:.3g}x | {o.num_params:,} | {o.images:,} | {o.predicted:.4g} | "
            f"{low:.4g} to {high:.4g} | {measured} | "
            f"{o.held['0.8']} of {len(o.measured)} | {o.error:+.2%} | "
            f"{o.naive_errors['last_value']:+.2%} | {'' if power is None else f'{power:+.2%}'} |"
        )
    total = sum(len(o.measured) for o in results)
    inside = sum(o.held["0.8"] for o in results)
    inside90 = sum(o.held["0.9"] for o in results)
    rms = {
        "law": np.sqrt(np.mean([o.error**2 for o in results])),
        "last value": np.sqrt(np.mean([o.naive_errors["last_value"] ** 2 for o in results])),
    }
    lines += [
        "",
        f"{inside} of {total} runs lie inside the 80% bands, {inside90} inside the 90% bands. Root "
        f"mean square error of ln L: the law {rms['law']:.2%}, the last value "
        f"{rms['last value']:.2%}; seeds differ by {_percent(main.seed_noise())}.",
        "",
    ]
    return lines
