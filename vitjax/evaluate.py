"""`vitjax eval`: scores a run's checkpoint on the sets of its config."""

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from vitjax import cli, experiment
from vitjax import config as config_lib
from vitjax.checkpoints.steps import find_step, weights
from vitjax.checkpoints.store import read_contract, read_verified
from vitjax.errors import InputError
from vitjax.evals import evaluation
from vitjax.progress import logging_to
from vitjax.telemetry import read_config


def evaluate(
    workdir: str | Path, *, step: int | None = None, assignments: list[str] | None = None
) -> dict[str, float]:
    """Runs every evaluator of a run's config on one of its checkpoints; pictures of theirs go into
    the workdir, as in training.

    Args:
      workdir: the run directory.
      step: the newest by default.
      assignments: changes of the config, such as "evals.test.batch_size=64".

    Returns:
      "eval/<set>/<metric>" and "step".
    """
    workdir = Path(workdir)
    recorded = read_config(workdir)
    if recorded is None:
        raise InputError(f"{workdir} is no run directory: it has no config.json")
    folder = find_step(workdir, step)
    config = config_lib.override(
        config_lib.from_json(json.dumps(recorded)).lock(), assignments or []
    )
    exp = experiment.build(config)
    evaluators = experiment.make_evaluators(exp)
    if not evaluators:
        raise InputError(f"the config of {workdir} names no evals")
    target = exp.state_target
    contract = read_contract(folder)
    has_extra = bool(jax.tree.leaves(target.extra))
    train_state = dataclasses.replace(
        target,
        params=read_verified(folder, weights(contract), target.params, contract),
        ema=None,
        extra=read_verified(folder, "extra", target.extra, contract) if has_extra else target.extra,
    )
    found = int(folder.name)
    results, pictures = evaluation.run(evaluators, train_state)
    if jax.process_index() == 0:
        evaluation.write_pictures(workdir, pictures, found)
    return results | {"step": found}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax eval",
        description=__doc__,
        epilog="example: vitjax eval --workdir=runs/quickstart",
    )
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="a step of the run; the newest by default")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override any key of the config")
    arguments, assignments = cli.parse(parser, argv)
    with logging_to(None):
        results = evaluate(arguments.workdir, step=arguments.step, assignments=assignments)
    print(json.dumps(results, indent=2))
    return 0
