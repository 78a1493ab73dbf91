"""`vitjax scaling fit|freeze|report`: fits laws to tables of runs and to sweeps."""

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitjax.errors import InputError, suggest

log = logging.getLogger("vitjax")

FIT_EXAMPLE = (
    "vitjax scaling fit --table=runs.csv --x=flops --y=eval/test/loss --where=stage=fit "
    "--predict=1e13 --out=fit"
)
USAGE = """vitjax scaling: fits scaling laws, tests them, and says what to train next

usage: vitjax scaling fit|freeze|report [options]

  fit     a law on any CSV or JSON Lines table
  freeze  write down what a sweep predicts for its hold-out runs, before they are made
  report  everything that a sweep's runs support, as Markdown, JSON and pictures

vitjax scaling fit --help and so on show the options.
example: vitjax scaling fit --table=runs.csv --x=flops --y=loss --predict=1e13 --out=fit
         vitjax scaling freeze --workdir=runs/sweep
         vitjax scaling report --workdir=runs/sweep"""

LAWS = {
    "curve": ("x", "y"),
    "parametric": ("num-params", "num-examples", "loss"),
    "isoflop": ("flops", "num-params", "loss"),
    "shape": ("shape", "num-examples", "loss"),
}


def _parser_fit() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitjax scaling fit",
        description="Fits a law to a table and says how far it can be believed.",
        epilog=f"example: {FIT_EXAMPLE}",
    )
    add = parser.add_argument
    add("--table", required=True, help="a CSV with a header, or JSON Lines")
    add("--law", default="curve", help=f"{', '.join(LAWS)}; default: curve")
    add("--x", metavar="COLUMN[:UNIT]", help="curve: the scale; a unit such as GFLOP or MAC")
    add("--y", metavar="COLUMN", help="curve: the loss or error")
    add("--accuracy", action="store_true", help="y is an accuracy: 1 - y is fitted")
    add("--form", default="auto", help="curve: auto, power, power_floor, zhai, m4, bnsl")
    add("--num-params", metavar="COLUMN", help="N")
    add("--num-examples", metavar="COLUMN", help="D: images or tokens seen")
    add("--flops", metavar="COLUMN[:UNIT]", help="training compute")
    add("--flops-per-param-example", type=float, metavar="K",
        help="parametric: D = FLOPs / (K N), if no column has it; 6 for language")  # fmt: skip
    add("--shape", metavar="COLUMN", help="shape: width, depth or mlp_dim")
    add("--loss", metavar="COLUMN")
    add("--where", action="append", default=[], metavar="COND", help="rows to keep: COLUMN=VALUE")
    add("--hold-out", metavar="COND", help="curve: rows to predict, not to fit")
    add("--groups", metavar="COLUMN", help="the run or trunk that rows share; resampled together")
    add("--drop-highest", type=int, default=0, help="parametric: runs of highest loss to leave out")
    add("--tie-exponents", action="store_true", help="parametric: alpha = beta")
    add("--outliers", default="keep", help="curve: keep, or huber")
    add("--resamples", type=int, default=None, help="of the bootstrap; default 200 or 1000")
    add("--seed", type=int, default=0)
    add("--predict", default="", metavar="X,...", help="curve: predict y at these x")
    add("--out", metavar="FOLDER", help="write fit.json, fit.md and fit.png there")
    return parser


def _fit(argv: list[str]) -> int:
    arguments = _parser_fit().parse_args(argv)
    if arguments.law not in LAWS:
        raise InputError(f"unknown --law {arguments.law!r}; {suggest(arguments.law, LAWS)}")
    from vitjax.scaling import table_fits  # which import JAX

    return table_fits.main(arguments)


def _sweep_parser(verb: str, text: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"vitjax scaling {verb}", description=text, epilog=f"example: {example}"
    )
    parser.add_argument("--workdir", required=True, help="the workdir of vitjax sweep")
    parser.add_argument("--metric", help="a column of runs.csv; default: the first eval/.../loss")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _freeze(argv: list[str]) -> int:
    parser = _sweep_parser(
        "freeze",
        "Writes frozen.json: the predicted loss of every planned hold-out run, with bands.",
        "vitjax scaling freeze --workdir=runs/sweep",
    )
    arguments = parser.parse_args(argv)
    from vitjax.scaling import freeze, sweep_fits

    sweep = sweep_fits.read_sweep(arguments.workdir, arguments.metric)
    fits = sweep_fits.fit_arm(
        sweep, sweep.arms[0], resamples=arguments.resamples, seed=arguments.seed
    )
    content = freeze.freeze(sweep, fits)
    for cell, run in content["runs"].items():
        low, high = run["intervals"]["0.8"]
        log.info("%s  %.4g  (80%%: %.4g to %.4g)", cell, run["predicted"], low, high)
    log.info("frozen: %s", Path(arguments.workdir) / freeze.FILE)
    log.info("now: vitjax sweep run --workdir=%s --stage=holdout", arguments.workdir)
    return 0


def _report(argv: list[str]) -> int:
    parser = _sweep_parser(
        "report",
        "Fits every recipe of a sweep, compares the frozen prediction with the hold-out, "
        "and writes report/report.md, report.json and pictures.",
        "vitjax scaling report --workdir=runs/sweep",
    )
    parser.add_argument("--budget", type=float, action="append", default=[], metavar="FLOPS",
                        help="what to train with this compute; may be repeated")  # fmt: skip
    parser.add_argument("--max-params", type=float, help="the largest model that can be served")
    parser.add_argument("--max-images", type=float, help="how many images there are")
    parser.add_argument("--target-loss", type=float, help="images needed to reach it, by size")
    arguments = parser.parse_args(argv)
    from vitjax.scaling import report

    folder = report.write_report(
        Path(arguments.workdir),
        metric=arguments.metric,
        resamples=arguments.resamples,
        seed=arguments.seed,
        wishes=report.Wishes(
            budgets=tuple(arguments.budget),
            max_params=arguments.max_params,
            max_images=arguments.max_images,
            target_loss=arguments.target_loss,
        ),
    )
    log.info("%s", folder / "report.md")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {"fit": _fit, "freeze": _freeze, "report": _report}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in VERBS:
        raise InputError(f"unknown: vitjax scaling {argv[0]}; {suggest(argv[0], VERBS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # fits are small; no accelerator is waited for
    from vitjax.progress import logging_to

    with logging_to(None):
        return VERBS[argv[0]](argv[1:])


def require(arguments: Any, law: str) -> list[str]:
    """The columns that a law needs, as given.

    Raises:
      InputError: names the options that are missing.
    """
    given = {name: getattr(arguments, name.replace("-", "_")) for name in LAWS[law]}
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing:
        raise InputError(f"--law={law} needs {', '.join(missing)}, naming columns of the table")
    return [str(value) for value in given.values()]
