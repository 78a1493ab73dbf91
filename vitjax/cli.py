"""The command line: one command, a table of verbs, one place for exit codes."""

import argparse
import importlib
import os
import sys

from vitjax import __version__, cpu
from vitjax.errors import (
    DamagedCheckpointError,
    InputError,
    NonFiniteError,
    Preempted,
    SaveError,
    suggest,
)

# Each verb is a module with main(argv) -> exit status.
VERBS = {
    "train": ("vitjax.train_verb", "train a model, or go on with an interrupted run"),
    "eval": ("vitjax.evaluate", "score a run's checkpoint on the sets of its config"),
    "plan": ("vitjax.planning.plan", "prove a run for a pod, with no accelerator attached"),
    "sweep": ("vitjax.sweep.verb", "plan, run and collect many runs for a scaling law"),
    "launch": ("vitjax.launcher.verb", "start it here in processes, on SLURM, Kubernetes, TPUs"),
    "scaling": ("vitjax.scaling.verb", "fit laws, test them, and say what to train next"),
    "import": ("vitjax.interop.import_verb", "read weights of another library"),
    "export": ("vitjax.interop.export_verb", "write weights for another library or a runtime"),
    "runs": ("vitjax.runs", "a table of runs: state, step, metric, speed, goodput"),
    "checkpoints": ("vitjax.checkpoints.verb", "list, verify, compare and remove saved steps"),
    "data": ("vitjax.data.verb", "prepare, look at and measure image data"),
    "transfer": ("vitjax.medical.verb", "fine-tune on labelled medical images, with a report"),
    "predict": ("vitjax.predict", "classify a folder or a file of images into a CSV"),
    "bench": ("vitjax.bench", "measure this machine beside torch and timm, against the goals"),
    "explain": ("vitjax.explain.verb", "show which parts of an image a prediction rests on"),
}

DONE, FAILED, WRONG_INPUT = 0, 1, 2


def usage() -> str:
    lines = [f"vitjax {__version__}: Vision Transformer pretraining, from one core to a pod", ""]
    lines += ["usage: vitjax VERB [options]", ""]
    lines += [f"  {verb:10} {text}" for verb, (_, text) in VERBS.items()]
    lines += ["", "vitjax VERB --help shows a verb's options and an example."]
    return "\n".join(lines)


def set_aside(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Splits the words of a command into the others and every --FLAG.KEY=VALUE as "KEY=VALUE"."""
    prefix = f"--{flag}."
    rest, assignments = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        assignment = word.removeprefix(prefix)
        assignments.append(assignment if "=" in assignment else f"{assignment}={next(words, '')}")
    return rest, assignments


def parse(
    parser: argparse.ArgumentParser, argv: list[str], flag: str = "config"
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a verb's options; every --config.KEY=VALUE is set aside as "KEY=VALUE"."""
    rest, assignments = set_aside(argv, flag)
    return parser.parse_args(rest), assignments


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status (0 done, 2 wrong input, 75 preempted, 1 else)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if argv else WRONG_INPUT
    if argv[0] == "--version":
        print(__version__)
        return DONE
    if argv[0] not in VERBS:
        print(f"vitjax: unknown verb {argv[0]!r}; {suggest(argv[0], VERBS)}", file=sys.stderr)
        return WRONG_INPUT
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on the machine
    cpu.give_virtual_devices_threads()
    cpu.remember_compilations()
    try:
        verb = importlib.import_module(VERBS[argv[0]][0])
        if "jax" in sys.modules:  # a verb that computes
            cpu.keep_freed_memory()
        return verb.main(argv[1:])
    except InputError as error:
        print(f"vitjax: {error}", file=sys.stderr)
        return WRONG_INPUT
    except (NonFiniteError, DamagedCheckpointError, SaveError) as error:
        print(f"vitjax: {error}", file=sys.stderr)
        return FAILED
    except Preempted as error:
        print(f"vitjax: {error}", file=sys.stderr)
        return error.exit_code
