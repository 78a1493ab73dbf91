"""Attention alone, forward and backward: vitjax's kernels beside torch's SDPA.

    python benchmarks/attention.py [--shapes S/16 B/16 H/14] [--size 224] [--batch 64]
        [--rounds 10] [--out FILE.json]

Every kernel of `vitjax.models.attention` that is made for this device computes the attention of one
layer of each shape and the gradients of queries, keys and values, all [B, H, N, K]; torch's picks
its own kernel. Float32 on CPUs, bfloat16 on accelerators. All live side by side, as the arrays are
small, and take turns; a round of an accelerator is half a second of calls.
"""

import argparse
import importlib.util
import statistics
import sys

import interleave
import record

from vitjax import bench

TORCH, PLAIN = "torch SDPA", "xla"
SECONDS = 0.5
SMALL_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def sizes_of(shape: str, size: int, batch: int) -> tuple[int, int, int, int]:
    """The lengths of [B, H, N, K]."""
    from vitjax.models.shapes import parse_shape

    s, patch = parse_shape(shape)
    return batch, s.num_heads, (size // patch) ** 2, s.width // s.num_heads


def run_kernel(name: str, sizes: tuple[int, ...]) -> None:
    import jax
    import jax.numpy as jnp

    from vitjax.models.attention import KERNELS

    is_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if is_cpu else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    *given, weight = (jax.random.normal(key, sizes, dtype) for key in keys)

    @jax.jit
    def work(query, key, value, weight):
        def loss(*given):
            return (KERNELS[name](*given, False) * weight).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    last = None

    def run():
        nonlocal last
        last = work(*given, weight)

    interleave.serve(run, wait=lambda: jax.block_until_ready(last), seconds=None if is_cpu else 0.5)


def run_torch(sizes: tuple[int, ...]) -> None:
    import torch

    is_cuda = torch.cuda.is_available()
    place, dtype = ("cuda", torch.bfloat16) if is_cuda else ("cpu", torch.float32)
    *given, weight = (torch.randn(sizes, dtype=dtype, device=place) for _ in range(4))
    for x in given:
        x.requires_grad_()

    def work():
        mixed = torch.nn.functional.scaled_dot_product_attention(*given)
        torch.autograd.grad(mixed, given, weight)

    wait = torch.cuda.synchronize if is_cuda else lambda: None
    interleave.serve(work, wait=wait, seconds=SECONDS)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", default=["S/16", "B/16", "H/14"])
    parser.add_argument("--size", type=int, default=224, help="of the image, in pixels")
    parser.add_argument("--batch", type=int, help="8 on CPUs, 64 on accelerators")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = bench.device() if not options.worker else {}
    batch = options.batch or (8 if device.get("platform") == "cpu" else 64)
    sizes = sizes_of(options.shapes[0], options.size, batch)
    if options.worker:
        run_torch(sizes) if options.worker == TORCH else run_kernel(options.worker, sizes)
        return
    from vitjax.models.attention import available

    record.warn_if_busy()
    workers = available(device["platform"])
    if importlib.util.find_spec("torch") is not None:
        workers.append(TORCH)
    else:
        print("torch is not installed: its row is left out", file=sys.stderr)
    found, rows, failed = {}, [], {}
    for shape in options.shapes:
        base = [sys.executable, __file__, f"--shapes={shape}", f"--size={options.size}"]
        commands = {k: [*base, f"--batch={batch}", f"--worker={k}"] for k in workers}
        reasons: dict[str, str] = {}
        reports = interleave.compare(
            commands, options.rounds, environment=SMALL_MEMORY, failed=reasons
        )
        failed |= {f"{shape} {name}": why for name, why in reasons.items()}
        found[shape] = reports
        print(f"{shape}, [B, H, N, K] = {list(sizes_of(shape, options.size, batch))}, forward and "
              "backward")  # fmt: skip
        print(interleave.table(reports, TORCH if TORCH in reports else PLAIN))
        key = "cpu" if device["platform"] == "cpu" else "wall"
        ours = [name for name in reports if name != TORCH]
        best = min(ours, key=lambda name: statistics.median(reports[name][key]))
        if TORCH in reports:
            over = interleave.ratios(reports[best][key], reports[TORCH][key])
            rows.append(record.row(f"{shape} attention: {best} over {TORCH}, {key}", over))
        if best != PLAIN:
            over = interleave.ratios(reports[PLAIN][key], reports[best][key])
            rows.append(record.row(f"{shape} attention: {best}, times faster than xla", over))
    for name, why in failed.items():
        print(f"not measured: {name}: {why}")
    record.write(options.out, options, rows=rows, used=["torch"], on=device, reports=found,
                 not_measured=failed)  # fmt: skip


if __name__ == "__main__":
    main()
