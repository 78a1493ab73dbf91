"""Settings that make JAX faster on CPUs; nothing here changes a number."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed memory for the next step instead of giving it back.

    XLA takes and frees its temporary buffers at every step. By default glibc maps and unmaps large
    ones, and the kernel clears every page again: up to half of a small model's step (LOG.md).

    Returns:
      Whether the C library took the settings; others than glibc have none.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
