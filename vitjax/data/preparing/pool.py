"""Processes that share work, count it together, and end when the one that started them does."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vitjax.errors import SaveError

DONE, UNREADABLE, STOP = range(3)  # places in the numbers that the processes share
WATCH_SECONDS = 0.25

_shared: Any = None


def _start(shared: Any) -> None:
    """Readies a process: it leaves Ctrl-C to its parent, and ends when that does."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel] if parent else [])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def count(place: int) -> None:
    """Adds one to a shared number: DONE or UNREADABLE."""
    if _shared is not None:
        with _shared.get_lock():
            _shared[place] += 1


def is_stopped() -> bool:
    return _shared is not None and bool(_shared[STOP])


def in_processes(
    function: Callable[..., Any],
    arguments: Sequence[tuple],
    num_workers: int,
    watch: Callable[[Any], bool] = lambda _: False,
) -> list[Any]:
    """Calls a function with each of the arguments in new processes; the results in that order.

    Args:
      watch: called several times a second with the shared numbers; True asks the function, by
        `is_stopped`, to return early, and begins no other call.

    Raises:
      SaveError: a process died.
    """
    context = multiprocessing.get_context("spawn")  # threads of ours do not survive a fork
    shared = context.Array("q", 3)
    with ProcessPoolExecutor(
        min(num_workers, len(arguments)), context, initializer=_start, initargs=(shared,)
    ) as pool:
        try:
            futures = [pool.submit(function, *each) for each in arguments]
            waiting = set(futures)
            while waiting:
                _, waiting = wait(waiting, WATCH_SECONDS, return_when=FIRST_COMPLETED)
                for future in futures:
                    if future.done() and not future.cancelled():
                        future.result()
                if watch(shared):
                    shared[STOP] = 1
                    for future in futures:
                        future.cancel()
            return [future.result() for future in futures if not future.cancelled()]
        except BrokenProcessPool as error:
            raise SaveError(
                "a worker process died, perhaps for want of memory; what is finished stays: start "
                "the same command again to go on, with fewer --workers"
            ) from error
        finally:
            shared[STOP] = 1
            pool.shutdown(cancel_futures=True)
