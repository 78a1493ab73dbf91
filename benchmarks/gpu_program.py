"""The training step as compiled for an H100 that need not be there: what it calls, what it moves.

    python benchmarks/gpu_program.py [--shapes S/16 B/16] [--out FILE]

For each shape, with attention by cuDNN and by XLA's products: bytes of all kernels beside a floor,
FLOPs, and a prediction: the sum over kernels of the longer of FLOPs at the peak of products, bytes
at the bandwidth, as once measured. Needs `pip install 'vitjax[plan]'`; nothing runs on a GPU,
and XLA cannot try its variants of a kernel, so a prediction is no measurement.

The floor is what a step must move if each product reads its operands and writes its result once, in
bfloat16, attention reads and writes only query, key, value and output, and all else is fused into
them but the optimizer, which reads and writes its float32 state once.
"""

import argparse
import collections
import time

import record

# Measured once on an H100: a bfloat16 product of 8192^3, and a copy.
PRODUCTS, COPY = 798e12, 3.0e12
BATCHES = {"S/16": 1024, "B/16": 1024, "L/16": 384, "So400m/14": 192, "H/14": 128}


def floor_bytes(facts: dict, num_params: int, batch: int) -> float:
    """Bytes of the floor described above."""
    d, f, n, wide = facts["width"], facts["mlp_dim"], facts["num_tokens"], 2
    products = [(d, 3 * d), (d, d), (d, f), (f, d)]
    rows = batch * n
    # Forward one product, backward two, each with the same three arrays.
    moved = sum(3 * (rows * (a + b) + a * b) for a, b in products)
    attention = rows * d * (4 + 8)  # q k v o; and those, the gradient of o, and of q k v
    return facts["depth"] * wide * (moved + attention) + 4.0 * num_params * 7


def measure(shape: str, batch: int, attention: str) -> dict:
    from vitjax import config as config_lib
    from vitjax import experiment
    from vitjax.planning import targets
    from vitjax.profiling.costs import CONTAINERS, Program
    from vitjax.profiling.labels import kind_of

    target = targets.parse_target("gpu:h100:1x1x1")
    targets.prepare(target)
    config = config_lib.base_config()
    config.batch_size = batch
    config.model.update(shape=shape, attention=attention, remat="none")
    config.precision.compute = "bfloat16"
    config.optimizer.update(weight_decay=1e-4, clip_norm=None)
    exp = experiment.build(config, devices=targets.devices(target))
    start = time.process_time()
    compiled = exp.compile()
    seconds = time.process_time() - start
    program = Program(compiled.as_text())
    moved: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    flops = predicted = 0.0
    for instruction in program.computations[program.entry]:
        if instruction.opcode in CONTAINERS:
            raise SystemExit("a loop: its parts would have to be counted")
        kind = kind_of(program, instruction)
        size, work = program.bytes(instruction), program.flops(instruction)
        moved[kind] += size
        calls[kind] += size > 0
        flops += work
        predicted += max(work / PRODUCTS, size / COPY)
    facts = dict(exp.model.description)
    memory = compiled.memory_analysis()
    return {
        "shape": shape,
        "batch": batch,
        "attention": attention,
        "gigabytes": sum(moved.values()) / 1e9,
        "floor_gigabytes": floor_bytes(facts, exp.model.num_params, batch) / 1e9,
        "gigabytes_by_kind": {k: v / 1e9 for k, v in moved.most_common()},
        "kernels_by_kind": dict(calls),
        "tera_flops": flops / 1e12,
        "model_tera_flops": batch * exp.objective.flops_per_image / 1e12,
        "memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "predicted_images_per_second": batch / predicted,
        "predicted_mfu": batch * exp.objective.flops_per_image / predicted / 989e12,
        "compile_cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["S/16", "B/16"], choices=list(BATCHES))
    parser.add_argument("--attention", nargs="+", default=["cudnn", "xla"])
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    options = parser.parse_args()
    head = f"{'shape':10} {'batch':>5} {'attention':9} {'GB':>6} {'floor':>6} {'ratio':>5}"
    print(f"{head} {'TFLOP':>6} {'GiB':>5} {'images/s':>8} {'MFU':>5}")
    rows = []
    for shape in options.shapes:
        for attention in options.attention:
            r = measure(shape, BATCHES[shape], attention)
            rows.append(r)
            print(
                f"{shape:10} {r['batch']:5} {attention:9} {r['gigabytes']:6.0f} "
                f"{r['floor_gigabytes']:6.0f} {r['gigabytes'] / r['floor_gigabytes']:5.2f} "
                f"{r['tera_flops']:6.1f} {r['memory_gib']:5.1f} "
                f"{r['predicted_images_per_second']:8.0f} {r['predicted_mfu']:5.1%}",
                flush=True,
            )
    if options.out:
        record.write(options.out, options, programs=rows)


if __name__ == "__main__":
    main()
