"""Settings for JAX on CPUs, made before its first use, which change no number; its cores."""

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def keep_freed_memory() -> bool:
    """Keeps memory that a program for CPUs frees for its next call, instead of giving it back.

    XLA takes and frees its temporary buffers at every step. By default glibc maps and unmaps large
    ones, and the kernel clears every page again: up to half of a small model's step (LOG.md). What
    is larger than 64 MiB glibc can keep for the main thread alone; so programs of one device run in
    the thread that calls them, and not in one of JAX's (but see `vitjax.processes`).

    Returns:
      Whether the C library took the settings; others than glibc have none.
    """
    import jax  # here: the other settings must come before

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_virtual_devices_threads() -> None:
    """Gives XLA's thread pool several threads for each virtual CPU device.

    Collectives hold their thread until every device has arrived. With as many threads as devices,
    two collectives of one program can wait for each other until XLA aborts the process.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    found = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    if found and int(found[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(found[1])))


def remember_compilations() -> None:
    """Keeps compiled programs for later starts: JAX's cache, in a folder of this kind of processor.

    Programs for CPUs use what instructions the processor has, and a home directory may be seen from
    several kinds. `JAX_COMPILATION_CACHE_DIR` names another folder;
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [f"flags: {platform.processor()} {platform.machine()}"]
    flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "vitjax" / f"compiled-{kind}"))
    # Those of less than a second as well, JAX's default: a start has several (LOG.md).
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
