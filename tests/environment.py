"""The environment of tests and of the processes that they start."""

import importlib.metadata
import os

# Most of the time of small programs is their compilation, and most of that is optimisation: with
# less of it the suite takes half the time. From 0.12 on jaxlib has no second flag.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
if tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 12):
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
CACHE = os.environ.get("VITJAX_TEST_CACHE", "/tmp/vitjax-test-cache")


def of_a_process(flags: str = QUICK_COMPILATION, **variables: str) -> dict[str, str]:
    """For a process on this machine's one CPU device, with the compilation cache of all tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return environment | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **variables,
    }
