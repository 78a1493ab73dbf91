"""`vitjax train`: the command line of `vitjax.train`."""

import argparse

from vitjax import cli, determinism, processes
from vitjax import config as config_lib
from vitjax.train import train

EXAMPLE = "vitjax train --config=quickstart --workdir=runs/quickstart --config.seed=1"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax train",
        description="Trains a model, or goes on with the run that the workdir holds.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "--config", required=True, help="a config file, or the name of a shipped one"
    )
    parser.add_argument("--workdir", help="the run directory")
    parser.add_argument(
        "--check_determinism",
        type=int,
        nargs="?",
        const=5,
        metavar="STEPS",
        help="instead: train so many steps twice and compare every bit; nothing is written",
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=5,
        metavar="STEPS",
        help="trace so many steady steps, and print which kernels they spend their time in",
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="override any key of the config")
    arguments, assignments = cli.parse(parser, argv)
    config = config_lib.override(config_lib.load_config(arguments.config), assignments)
    if arguments.check_determinism is None and arguments.workdir is None:
        parser.error("the following arguments are required: --workdir")
    with processes.joined(config.faults.heartbeat_seconds):
        if arguments.check_determinism is not None:
            return determinism.report(config, arguments.check_determinism)
        train(config, arguments.workdir, profile=arguments.profile)
    return 0
