"""The schedulers' own clients: found, called, and what they say passed on."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from vitjax.errors import InputError
from vitjax.launcher.sweeps import Tasks

# Where each comes from.
SOURCES = {
    "sbatch": "SLURM's clients: log in to the cluster, or apt-get install slurm-client",
    "squeue": "SLURM's clients: log in to the cluster, or apt-get install slurm-client",
    "sacct": "SLURM's clients: log in to the cluster, or apt-get install slurm-client",
    "scontrol": "SLURM's clients: log in to the cluster, or apt-get install slurm-client",
    "kubectl": "Kubernetes' client: https://kubernetes.io/docs/tasks/tools",
    "gcloud": "Google Cloud's client: https://cloud.google.com/sdk/docs/install",
}


def require(client: str) -> str:
    """The client's path.

    Raises:
      InputError: it is not installed; says where it comes from.
    """
    found = shutil.which(client)
    if found is None:
        raise InputError(
            f"{client} is not installed here; it belongs to {SOURCES[client]}. With --dry-run "
            "vitjax launch prints what it would submit, and needs no client"
        )
    return found


def ask(words: Sequence[str], text: str | None = None) -> str:
    """Runs a client and returns what it prints.

    Raises:
      InputError: it is missing, or it refused; with its own words.
    """
    path = require(words[0])
    done = subprocess.run([path, *words[1:]], input=text, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise InputError(f"{words[0]} ended with status {done.returncode}: {said}")
    return done.stdout


def deliver(
    text: str, send: Callable[[], int], *, dry_run: bool, tasks: Tasks | None, retry: bool
) -> int:
    """Prints what would be submitted, or submits it; returns the exit status.

    Args:
      text: what is submitted; `send` submits it.
      tasks: of a sweep: they are reported, and with `retry` the failed ones set free first.
    """
    if tasks:
        print(tasks.report(retry), file=sys.stderr)
    if dry_run:
        print(text, end="")
        return 0
    if tasks and not tasks.groups:
        return 0
    return send()


def show(words: Sequence[str]) -> int:
    """Runs a client on this terminal; returns its exit status."""
    return subprocess.run([require(words[0]), *words[1:]]).returncode
