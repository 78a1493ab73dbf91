"""Is the scanned step's compile time flat in depth and in devices?

    python benchmarks/compile_time.py

CPU seconds of lowering and compiling one training step on virtual devices, each in a process of its
own, taking turns; medians of three.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ONE = """
import sys, time
depth, devices = int(sys.argv[1]), int(sys.argv[2])
import jax
jax.config.update("jax_num_cpu_devices", devices)
from vitjax import config, experiment
c = config.load_config("vit_s16_i1k")
c.model.depth, c.batch_size = depth, 512
experiment_ = experiment.build(c)
start = time.process_time()
experiment_.compile()
print(time.process_time() - start)
"""
CASES = [(12, 8), (24, 8), (48, 8), (12, 64), (12, 512)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            command = [sys.executable, "-c", ONE, *map(str, case)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[case].append(float(out.split()[-1]))
    rows = [
        {"depth": d, "devices": n, "cpu_seconds": statistics.median(s), "all": s}
        for (d, n), s in seconds.items()
    ]
    for row in rows:
        print(f"{row['depth']:3} layers {row['devices']:4} devices {row['cpu_seconds']:6.1f} s")
    folder = Path(__file__).parent / "results"
    (folder / "compile_time.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
