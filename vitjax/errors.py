"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong: the command line prints the message and exits with 2.

    Messages name the offending value and what is allowed.
    """


class NonFiniteError(RuntimeError):
    """The loss or the gradient stopped being a number."""


class UnreadableImage(Exception):
    """One example cannot be decoded; the loader counts these and goes on."""


class DamagedCheckpointError(RuntimeError):
    """What was read from a checkpoint is not what was written."""


class SaveError(RuntimeError):
    """The run cannot be written to disk any more; what was saved before is whole."""


class Preempted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
      step: the step that was saved.
      exit_code: what the process should exit with.
    """

    def __init__(self, step: int, exit_code: int):
        super().__init__(f"preempted: step {step} is saved; start the same command to go on")
        self.step = step
        self.exit_code = exit_code


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A sentence that names the closest allowed value and lists all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed) if allowed else '(nothing)'}"
