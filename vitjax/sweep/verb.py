"""`vitjax sweep`: plan, run and collect the runs of a scaling law."""

import argparse
import logging
import signal
from pathlib import Path

import jax

from vitjax import cli
from vitjax.errors import InputError, suggest
from vitjax.sweep.cells import PREEMPTED, STAGES
from vitjax.sweep.collect import collect
from vitjax.sweep.config import Sweep, load_sweep
from vitjax.sweep.plan import Plan, make_plan
from vitjax.sweep.table import read_plan, write_plan

log = logging.getLogger("vitjax")
ACTIONS = {
    "plan": "from a budget to a table of runs: workdir/plan.json and plan.csv",
    "run": "train the cells of the plan, here or as a job array; resumable",
    "collect": "append what has ended to workdir/runs.csv",
}
EXAMPLES = {
    "plan": "vitjax sweep plan --config=scaling/digits --workdir=runs/sweep",
    "run": "vitjax sweep run --workdir=runs/sweep --workers=2",
    "collect": "vitjax sweep collect --workdir=runs/sweep",
}
USAGE = "\n".join(
    ["usage: vitjax sweep ACTION [options]", ""]
    + [f"  {name:9} {text}" for name, text in ACTIONS.items()]
    + ["", "vitjax sweep ACTION --help shows an action's options and an example."]
    + [f"example: {EXAMPLES['plan']}"]
    + [f"         {EXAMPLES[name]}" for name in ("run", "collect")]
)


def _parser(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"vitjax sweep {action}",
        description=ACTIONS[action],
        epilog=f"example: {EXAMPLES[action]}",
    )
    is_plan = action == "plan"
    parser.add_argument(
        "--config", required=is_plan, help="a sweep's file, or the name of a shipped one"
    )
    parser.add_argument("--workdir", required=True, help="the sweep's directory")
    parser.add_argument("--sweep.KEY", metavar="VALUE", help="override any key of the sweep")
    return parser


def _workdir_plan(arguments: argparse.Namespace, assignments: list[str]) -> Plan:
    """The plan of the workdir; made first, or checked to be the same, where a config is given."""
    workdir = Path(arguments.workdir)
    if arguments.config is not None:
        write_plan(workdir, make_plan(load_sweep(arguments.config, assignments)))
    elif assignments:
        raise InputError(f"--sweep.{assignments[0]} needs --config: the plan is made already")
    return read_plan(workdir)


def _plan(argv: list[str]) -> int:
    parser = _parser("plan")
    parser.add_argument("--target", help="the same as --sweep.budget.target: gpu:h100:1x1x8, ...")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile each shape for the target instead of estimating its memory and hours",
    )
    parser.add_argument(
        "--check-memory", action="store_true", help="exit with 2 if a cell does not fit the target"
    )
    arguments, assignments = cli.parse(parser, argv, "sweep")
    if arguments.target is not None:
        assignments.append(f"budget.target={arguments.target}")
    sweep = load_sweep(arguments.config, assignments)
    plan = _planned(sweep, arguments.compile)
    workdir = Path(arguments.workdir)
    write_plan(workdir, plan)
    from vitjax.sweep.show import show

    show(plan, workdir)
    if arguments.check_memory:
        if sweep.budget.target is None:
            raise InputError("--check-memory needs --target, such as gpu:h100:1x1x8")
        unfit = [cell.id for cell in plan.cells if cell.fits is False]
        if unfit:
            raise InputError(f"{len(unfit)} cells do not fit {sweep.budget.target}: {unfit[0]}")
    return cli.DONE


def _planned(sweep: Sweep, compile_programs: bool) -> Plan:
    name = sweep.budget.target
    if name is None:
        if compile_programs:
            raise InputError("--compile needs --target, such as gpu:h100:1x1x8")
        return make_plan(sweep)
    from vitjax.planning import targets
    from vitjax.sweep.targets import with_estimates

    target = targets.parse_target(name)
    targets.prepare(target)  # before JAX starts
    jax.config.update("jax_optimization_level", "O0")  # as vitjax plan: quick to compile
    plan, devices = make_plan(sweep), targets.devices(target)
    return with_estimates(plan, target, devices, compile_programs=compile_programs)


def _run(argv: list[str]) -> int:
    parser = _parser("run")
    parser.add_argument("--cells", help="only these, by number: 1-4,7")
    parser.add_argument("--group", type=int, help="only this trunk with its branches, from 0")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, each with its share of the cores (CPU)"
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="fit")
    parser.add_argument("--retry", action="store_true", help="try failed and diverged cells again")
    parser.add_argument(
        "--array", choices=("slurm", "k8s"), help="write a job array to the workdir instead"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # started by the above
    arguments, assignments = cli.parse(parser, argv, "sweep")
    from vitjax.sweep import attempts, run

    if arguments.cells is not None and arguments.group is not None:
        raise InputError("give --cells or --group, not both")
    plan, workdir = _workdir_plan(arguments, assignments), Path(arguments.workdir)
    if arguments.array:
        from vitjax.launcher import sweeps

        print(sweeps.write(workdir, arguments.array, arguments.stage, arguments.workers))
        return cli.DONE
    cells = run.select(
        workdir, plan, stage=arguments.stage, cells=arguments.cells, group=arguments.group
    )
    if arguments.worker is not None:
        from vitjax.sweep import worker

        signal.signal(signal.SIGTERM, _stop)
        worker.prepare(run.parse_numbers(arguments.worker), workdir / "jax-cache")
        worker.work(workdir, plan, cells)
        return cli.DONE
    from vitjax.progress import logging_to

    run.check_data(plan)
    with logging_to(None) as console:
        if arguments.retry:
            collect(workdir, plan)
            for cell in cells:
                attempts.retry(workdir, cell.id)
        status = run.Sweep(workdir, plan, cells, console).go(arguments.workers)
        log.info("%d rows added to %s", collect(workdir, plan), workdir / "runs.csv")
    return status


def _stop(*_) -> None:
    raise SystemExit(PREEMPTED)  # between two cells; during one, training saves it and leaves


def _collect(argv: list[str]) -> int:
    arguments, assignments = cli.parse(_parser("collect"), argv, "sweep")
    plan, workdir = _workdir_plan(arguments, assignments), Path(arguments.workdir)
    print(f"{collect(workdir, plan)} rows added to {workdir / 'runs.csv'}")
    return cli.DONE


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return cli.DONE if argv else cli.WRONG_INPUT
    actions = {"plan": _plan, "run": _run, "collect": _collect}
    if argv[0] not in actions:
        raise InputError(f"unknown action {argv[0]!r} of vitjax sweep; {suggest(argv[0], ACTIONS)}")
    return actions[argv[0]](argv[1:])
