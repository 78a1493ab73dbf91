"""Several processes as one run: how they meet, and how they agree.

Messages go through the coordinator that JAX starts, not through the devices, so that they can be
sent from any thread and while the devices work or hang.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the coordinator's client has no public name; Orbax does the same

from vitjax.errors import (
    DamagedCheckpointError,
    InputError,
    NonFiniteError,
    Preempted,
    SaveError,
)
from vitjax.watchdog import HUNG

GIVEN = ("VITJAX_COORDINATOR", "VITJAX_NUM_PROCESSES", "VITJAX_PROCESS_ID")
EXPECTED = (InputError, NonFiniteError, DamagedCheckpointError, SaveError)
LOST_PEER = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|remote process|heartbeat|coordination service",
    re.IGNORECASE,
)
KEPT_MESSAGES = 64  # of one kind; older ones are deleted, every process has read them


def _detected() -> str | None:
    """The scheduler that started this process as one of several, if any."""
    e = os.environ
    if int(e.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in e:
        return "SLURM"
    if int(e.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "OpenMPI"
    if "KUBERNETES_SERVICE_HOST" in e and "JOB_COMPLETION_INDEX" in e:
        return "Kubernetes"
    if "," in e.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in e:
        return "TPU"
    return None


def given() -> tuple[str, int, int] | None:
    """Coordinator ("host:port"), number of processes and this one's number, as the user gave them.

    Raises:
      InputError: some of the three are missing or no numbers.
    """
    found = {name: os.environ.get(name) for name in GIVEN}
    if not any(found.values()):
        return None
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise InputError(f"{', '.join(GIVEN)} go together; {', '.join(missing)} is not set")
    coordinator, count, index = (str(value) for value in found.values())
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"VITJAX_COORDINATOR={coordinator!r} is not of the form host:port")
    if not count.isdigit() or not index.isdigit() or not int(index) < int(count):
        raise InputError(
            f"VITJAX_PROCESS_ID={index} must be a number from 0 to VITJAX_NUM_PROCESSES={count} - 1"
        )
    return coordinator, int(count), int(index)


def start(heartbeat_seconds: int = 100) -> None:
    """Joins the other processes of the run, where there are any. Must come before JAX's first use.

    The three variables win; else SLURM, OpenMPI, Kubernetes and TPU pods are recognised, whose
    details JAX reads itself.

    Args:
      heartbeat_seconds: a process that has not been heard of for so long is taken for dead, and
        the others end.
    """
    if heartbeat_seconds < 1:
        raise InputError(f"faults.heartbeat_seconds must be at least 1, got {heartbeat_seconds}")
    timing: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if found := given():
        coordinator, count, index = found
        if count > 1:
            _meet(coordinator, count, index, **timing)
    elif _detected():
        _meet(**timing)


def _meet(*who: Any, **timing: Any) -> None:
    """Programs run in a thread of JAX's (see `vitjax.cpu`): one that waits for a process that has
    gone must not hold the thread that hears of it."""
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    jax.distributed.initialize(*who, **timing)


@contextlib.contextmanager
def joined(heartbeat_seconds: int = 100) -> Iterator[None]:
    """As `start`; and a process that fails while inside leaves at once with its exit status.

    Otherwise it would wait at its end for the others, who wait for it in a computation. Where it
    fails because another has gone, the status is that of a lost peer: the run can go on.
    """
    start(heartbeat_seconds)
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        if jax.process_count() > 1:
            if not isinstance(error, EXPECTED):
                traceback.print_exc()
            print(f"vitjax: {error}", file=sys.stderr, flush=True)
            os._exit(_status(error))
        raise


def _status(error: Exception) -> int:
    """The exit status of a process of several that this error ends."""
    if isinstance(error, InputError):
        return 2
    is_lost = isinstance(error, jax.errors.JaxRuntimeError) and LOST_PEER.search(str(error))
    return HUNG if is_lost else 1


class Messages:
    """What the processes of a run tell each other; every process calls the same methods in turn.

    Args:
      name: of this exchange; two exchanges that run at the same time need different ones.
      timeout_seconds: how long to wait for the others.

    With one process every call returns at once. Each raises `jax.errors.JaxRuntimeError` when
    another process has not answered in time.
    """

    def __init__(self, name: str, timeout_seconds: float = 600.0):
        self._name, self._timeout = name, int(timeout_seconds * 1000)
        self._numbers = itertools.count()

    def from_first(self, value: Any) -> Any:
        """What the first process gave, in all: None, numbers, texts, lists and dicts of them."""
        if jax.process_count() == 1:
            return value
        client, number = _client(), next(self._numbers)
        if jax.process_index() == 0:
            client.key_value_set(self._key(number), json.dumps(value))
            if number >= KEPT_MESSAGES:
                client.key_value_delete(self._key(number - KEPT_MESSAGES))
            return value
        return json.loads(client.blocking_key_value_get(self._key(number), self._timeout))

    def from_all(self, value: Any) -> list[Any]:
        """What each process gave, in the order of their numbers, in all."""
        if jax.process_count() == 1:
            return [value]
        client, number = _client(), next(self._numbers)
        folder = self._key(number)
        client.key_value_set(f"{folder}/{jax.process_index():06d}", json.dumps(value))
        client.wait_at_barrier(f"{folder}/all", self._timeout)
        if jax.process_index() == 0 and number:
            client.key_value_delete(f"{self._key(number - 1)}/")  # all have passed this barrier
        found = sorted(client.key_value_dir_get(folder + "/"))
        return [json.loads(text) for _, text in found]

    def _key(self, number: int) -> str:
        return f"vitjax/{self._name}/{number}"


def _client() -> Any:
    return distributed.global_state.client
