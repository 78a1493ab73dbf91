"""What a device can do, for model FLOPs utilisation."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device, as JAX names it. Sources: the vendors' data sheets. A TPU v4
# or v5p is one device a chip (megacore); v2 and v3 are two.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def _measure(size: int = 1024, repeats: int = 3) -> float:
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a).lower(x).compile()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / len(jax.local_devices())


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the number is from: "data sheet" or "measured".

    A device that is not in the table (CPUs, above all) is measured with a float32 matrix product
    of 1024^3, shared among the virtual devices of a host.
    """
    if device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind], "data sheet"
    return _measure(), "measured"
