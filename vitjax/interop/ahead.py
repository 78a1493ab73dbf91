"""Doing the next piece of work while the last one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of calls, in order, each computed in a thread while the one before is used.

    Copying, reading and checksums all let Python's lock go, so two cores share the work; at most
    two results exist at a time.
    """
    with ThreadPoolExecutor(1) as pool:
        coming: Future[T] | None = None
        for call in calls:
            done, coming = coming, pool.submit(call)
            if done is not None:
                yield done.result()
        if coming is not None:
            yield coming.result()
