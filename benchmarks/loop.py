"""What the loop adds to the bare jitted step, and what a start costs.

    python benchmarks/loop.py [--rounds 7]

A round runs the quickstart's step 60 times by itself, on one batch, and `vitjax train` over as many
steps (between its first and last log line: data, metrics, logging; no evaluation, no checkpoint).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def start_costs() -> dict[str, float]:
    """CPU seconds of `vitjax --help`, and from the command to the first step, nothing cached."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "vitjax", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = ["train", "--config=quickstart", f"--workdir={folder}/run"]
        argv += ["--config.total_steps=3", "--config.optimizer.schedule.warmup_steps=1"]
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "vitjax", *argv]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        lines = Path(folder, "run", "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
    return {
        "help": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "to the first step": next(e["cpu_seconds"] for e in events if e["event"] == "first_step"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=64, help="of the quickstart's model")
    options = parser.parse_args()
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
    pairs, waits = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            alone = bare(exp, step, loader)
            inside, wait = looped(config, folder)
            after = bare(exp, step, loader)
        pairs.append(inside / ((alone + after) / 2))
        waits.append(wait)
        print(f"step {alone * 1e3:.1f} and {after * 1e3:.1f} ms, in the loop {inside * 1e3:.1f} ms")
    result = {
        "loop over bare step": statistics.median(pairs),
        "quartiles": statistics.quantiles(pairs, n=4),
        "data wait fraction": statistics.median(waits),
        "CPU seconds": start_costs(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
