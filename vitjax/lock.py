"""A lock on a folder or a piece of work, which the kernel gives back however its holder ends."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitjax.errors import InputError

NAME = ".lock"  # in a run directory


def take(path: Path) -> Any | None:
    """Locks a file, made if missing, and names this process in it; None if another holds it.

    The lock (flock) ends when the file is closed or its process ends.

    Raises:
      InputError: the file system has no locks.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise InputError(
            f"the file system of {path.parent} has no locks ({error.strerror}); choose a folder "
            "on one that does"
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the name is only for messages
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
    return file


def holder(path: Path) -> tuple[int, str] | None:
    """Process number and host of who holds a lock, or held it last; None if nobody is named."""
    words = path.read_text().split() if path.exists() else []
    return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else None


def is_held(workdir: Path) -> bool:
    """Whether a process trains in this run directory now."""
    path = Path(workdir) / NAME
    if not path.exists():
        return False
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def refusal(workdir: Path) -> str:
    """Why this process may not train in a run directory that another one holds."""
    found = holder(workdir / NAME)
    who = f"process {found[0]} on {found[1]}" if found else "another process"
    return (
        f"{who} is training in {workdir}; wait for it, stop it, or choose another --workdir. "
        "If it is gone and its host has failed, the file server gives the lock back within minutes"
    )


@contextlib.contextmanager
def on_run(workdir: Path, wait_seconds: float = 5.0) -> Iterator[str | None]:
    """Locks a run directory while inside; gives the reason if it cannot be had.

    A launch that is just ending gets a few seconds to leave.
    """
    deadline = time.monotonic() + wait_seconds
    while (file := take(workdir / NAME)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if file is None:
        yield refusal(workdir)
        return
    try:
        yield None
    finally:
        file.close()
