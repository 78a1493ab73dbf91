"""Sets of files: finding them, and reading parts of them from many threads."""

import glob
import os
import re
import threading
from collections.abc import Sequence

from vitjax.errors import InputError, UnreadableImage

MAX_OPEN = 512  # file descriptors; half of what a process may have by default


def expand_braces(pattern: str) -> list[str]:
    """`a{000..002}b` and `a{x,y}b` as the names they stand for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if limits:
        first, last = int(limits[1]), int(limits[2])
        if last < first:
            raise InputError(f"the range {match[0]} of {pattern!r} runs backwards")
        items = [str(n).zfill(len(limits[1])) for n in range(first, last + 1)]
    else:
        items = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for item in items for name in expand_braces(before + item + after)]


def find_files(pattern: str | Sequence[str]) -> list[str]:
    """The files of one glob or several, in the order of their names.

    Args:
      pattern: also with braces, as in `train-{000000..000127}.tar`.

    Raises:
      InputError: a glob, or a name that braces stand for, matches nothing.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns or not all(patterns):
        raise InputError(f"the pattern of the files is not set: {pattern!r}")
    found: set[str] = set()
    for name in (name for one in patterns for name in expand_braces(one)):
        matches = [path for path in (name, *glob.glob(name)) if os.path.isfile(path)]
        if not matches:
            raise InputError(f"no files match {name!r}")
        found.update(matches)
    return sorted(found)


class OpenFiles:
    """Reads from anywhere in a set of files; threads share the descriptors, not a position."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, size: int, least: int | None = None) -> bytes:
        """Bytes of file `number`.

        Args:
          least: fewer than `size` will do, if at least these are there.

        Raises:
          UnreadableImage: the file is gone, cannot be read, or ends before.
        """
        path = self.paths[number]
        try:
            with self._lock:
                descriptor = self._open.get(number)
                is_kept = descriptor is not None or len(self._open) < MAX_OPEN
                if descriptor is None:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    if is_kept:
                        self._open[number] = descriptor
            try:
                data = os.pread(descriptor, size, offset)
            finally:
                if not is_kept:
                    os.close(descriptor)
        except OSError as error:
            raise UnreadableImage(f"cannot read {path}: {error.strerror}") from error
        if len(data) < (size if least is None else least):
            raise UnreadableImage(f"{path} ends before byte {offset + size}, within an image")
        return data

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)
