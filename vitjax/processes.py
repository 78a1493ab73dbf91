"""Several processes as one run: found from the scheduler, or given by three variables."""

import os

import jax

from vitjax.errors import InputError

GIVEN = ("VITJAX_COORDINATOR", "VITJAX_NUM_PROCESSES", "VITJAX_PROCESS_ID")


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


def start() -> None:
    """Joins the other processes of the run, where there are any. Must come before JAX's first use.

    The three variables win; else SLURM, OpenMPI, Kubernetes and TPU pods are recognised, whose
    details JAX reads itself.
    """
    if found := given():
        coordinator, count, index = found
        if count > 1:
            jax.distributed.initialize(coordinator, count, index)
    elif _detected():
        jax.distributed.initialize()


def must_stop(step: int) -> bool:
    """Whether one of several processes was told to end; all learn it at the same step."""
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
