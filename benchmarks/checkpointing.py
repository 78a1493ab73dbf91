"""What saving and restoring cost.

    python benchmarks/checkpointing.py [--rounds=7] [--shape=S/16] [--out FILE.json]

Each round, in turn: the fingerprint of the state alone; a save that is waited for; the same number
of steps without a save and with one beside them. Times are medians, with quartiles; ratios are
medians of ratios within a round. Then a restore in a new process, whose bytes read and peak memory
come from the kernel (Linux).
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import interleave
import jax
import record

from vitjax import config as config_lib
from vitjax import cpu, experiment
from vitjax.checkpoints.policy import Keep
from vitjax.checkpoints.run import Checkpoints
from vitjax.checkpoints.store import parts_of
from vitjax.fingerprint import fingerprint
from vitjax.state import tree_bytes

STEPS = 6


def kernel(path: str, key: str) -> int:
    """A number that the kernel keeps of this process."""
    lines = Path(f"/proc/self/{path}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@contextlib.contextmanager
def clock(times: dict[str, list[float]], name: str):
    wall, work = time.perf_counter(), time.process_time()
    yield
    times.setdefault(f"{name} wall", []).append(time.perf_counter() - wall)
    times.setdefault(f"{name} cpu", []).append(time.process_time() - work)


def make_config(arguments: argparse.Namespace) -> Any:
    config = config_lib.load_config("vit_s16_i1k")
    config.model.shape, config.batch_size = arguments.shape, arguments.batch
    config.data.source = {"target": "vitjax.data.sources.noise:Noise", "num_examples": 1000}
    return config


def restore(exp: experiment.Experiment, step: Path) -> dict[str, float]:
    """Reads a step into this process, which has held nothing yet."""
    saves, target, first = Checkpoints(step.parent), exp.state_target, exp.mesh.devices.flat[0]
    jax.block_until_ready(jax.device_put(1.0, first))
    before, read = kernel("status", "VmRSS"), kernel("io", "rchar")
    start = time.perf_counter()
    state, _ = saves.restore(int(step.name), target)
    jax.block_until_ready(state)
    files = sum(p.stat().st_size for p in step.rglob("*") if p.is_file())
    peak, size = kernel("status", "VmHWM"), tree_bytes(parts_of(target))
    return {
        "restore, with compiling the fingerprint, seconds": time.perf_counter() - start,
        "bytes read over bytes on disk": (kernel("io", "rchar") - read) / files,
        "peak memory over shard bytes": (peak - before) * 1024 / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restore", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", default="S/16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", help="a JSON file for the numbers; in benchmarks/results if none")
    arguments = parser.parse_args()
    cpu.keep_freed_memory()

    exp = experiment.build(make_config(arguments))
    if arguments.restore:
        print(json.dumps(restore(exp, Path(arguments.restore))))
        return
    key = jax.random.key(1)

    def batch():
        found = {}
        for name, x in exp.abstract_batch.items():
            values = jax.random.randint(key, x.shape, 0, 200 if name == "images" else 900)
            found[name] = jax.device_put(values.astype(x.dtype), x.sharding)
        return found

    step, state, data = exp.compile(), exp.fresh_state(), batch()
    folder = Path(tempfile.mkdtemp(prefix="vitjax-benchmark-"))
    saves = Checkpoints(folder / "checkpoints", Keep(last=2))
    times: dict[str, list[float]] = {}
    contract = exp.contract(None)
    size = tree_bytes(parts_of(state))
    number = 0

    def steps(count):
        nonlocal state
        for _ in range(count):
            state, _ = step(state, data)
        jax.block_until_ready(state)

    for round_number in range(arguments.rounds + 1):
        if round_number == 1:
            times.clear()  # the first round compiled
        with clock(times, "fingerprint"):
            fingerprint(parts_of(state))
        number += 1
        with clock(times, "save"):
            saves.save(number, state, contract)
            saves.wait()
        with clock(times, "steps"):
            steps(STEPS)
        number += 1
        with clock(times, "steps and a save"):
            with clock(times, "held up"):
                saves.save(number, state, contract)
            steps(STEPS)
        saves.wait()
        print(f"round {round_number}/{arguments.rounds}", end="\r", flush=True)
    command = [sys.executable, __file__, f"--shape={arguments.shape}", f"--batch={arguments.batch}"]
    command.append(f"--restore={folder / 'checkpoints' / str(number)}")
    restored = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    shutil.rmtree(folder)

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    extra = [
        (b - a - h) / s
        for a, b, h, s in zip(
            times["steps wall"], times["steps and a save wall"], times["held up wall"],
            times["save wall"], strict=True,
        )
    ]  # fmt: skip
    result = {
        "shape": arguments.shape, "rounds": arguments.rounds, "state MiB": size / 2**20,
        "mesh": dict(exp.mesh.shape),
        "seconds": {k: statistics.median(v) for k, v in times.items()},
        "quartiles": {k: interleave.spread(v)[::2] for k, v in times.items()},
        "fingerprint over save, wall": ratio("fingerprint wall", "save wall"),
        "fingerprint over save, CPU": ratio("fingerprint cpu", "save cpu"),
        "held up over save, wall": ratio("held up wall", "save wall"),
        "slower steps beside a save, over save": statistics.median(extra),
        **restored,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    share = interleave.ratios(times["fingerprint wall"], times["save wall"])
    held = interleave.ratios(times["held up wall"], times["save wall"])
    what = f"{arguments.shape} save"
    rows = [
        record.row(what, times["save wall"], "wall-s"),
        record.row(f"{what}: the step held up over it", held),
        record.row(f"{what}: fingerprint over it", share),
    ]
    name = f"checkpointing_{arguments.shape.replace('/', '')}_{jax.default_backend()}.json"
    out = arguments.out or Path(__file__).parent / "results" / name
    record.write(out, arguments, rows=rows, **result)


if __name__ == "__main__":
    main()
