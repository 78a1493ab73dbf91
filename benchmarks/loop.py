"""What the loop adds to the bare jitted step. (What a start costs: startup.py.)

    python benchmarks/loop.py [--rounds 7] [--width 64] [--out FILE.json]

A round runs the quickstart's step 60 times by itself, on one batch, and `vitjax train` over as many
steps (between its first and last log line: data, metrics, logging; no evaluation, no checkpoint).
"""

import argparse
import tempfile
import time
from pathlib import Path

import record

from vitjax import bench

STEPS = 60


def bare(exp, step, loader) -> float:
    """Wall seconds a step, the step alone."""
    import jax

    from vitjax import parallel

    state = exp.fresh_state()
    batch = parallel.to_global(
        loader.train_batch(0, exp.config.batch_size, 0), exp.mesh, exp.config.batch_size
    )
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / STEPS


def looped(config, folder: str) -> tuple[float, float]:
    """Wall seconds a step within `train`, and the share of them spent waiting for data."""
    from vitjax import train
    from vitjax.telemetry import read_metrics

    train.train(config, folder)
    row = read_metrics(Path(folder))[-1]
    return config.batch_size / row["perf/images_per_second"], row["perf/data_wait_fraction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=64, help="of the quickstart's model")
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    options = parser.parse_args()
    record.warn_if_busy()
    from vitjax import cpu

    cpu.keep_freed_memory()
    from vitjax import config as config_lib
    from vitjax import experiment

    config = config_lib.load_config("quickstart")
    config.total_steps, config.log_every = 2 * STEPS, STEPS
    config.eval_every = config.checkpoint_every = 0
    with config.unlocked():
        config.evals = {}
    config.checkpoint.metric = None
    config.model.update(width=options.width, mlp_dim=4 * options.width)
    exp = experiment.build(config)
    step = exp.compile()
    loader = experiment.make_loader(config, config.data.source, exp.preprocess, training=True)
    pairs, waits, steps = [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            alone = bare(exp, step, loader)
            inside, wait = looped(config, folder)
            after = bare(exp, step, loader)
        pairs.append(inside / ((alone + after) / 2))
        waits.append(wait)
        steps.append([alone, inside, after])
        print(f"step {alone * 1e3:.1f} and {after * 1e3:.1f} ms, in the loop {inside * 1e3:.1f} ms")
    rows = [
        record.row(f"loop over bare step, quickstart {options.width} wide", pairs, at_most=1.02),
        record.row("share of the loop that waits for data", waits),
    ]
    print(bench.table(rows))
    record.write(options.out, options, rows=rows, ratios=pairs, waits=waits, steps=steps)


if __name__ == "__main__":
    main()
