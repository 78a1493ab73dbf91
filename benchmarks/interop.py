"""Importing and exporting ViT-L/16: peak memory and time, beside a plain copy of the file.

    python benchmarks/interop.py [--rounds 5] [--out FILE.json]

Each command runs in a process of its own, taking turns; the copy is read, written and synchronised
to the disk, as the commands do. Memory is the process's peak resident size, all of Python and JAX
included, over the file's size. Time is the whole process's, and without start-up (the time of
`vitjax export --help`, which imports what the command imports) over that of the copy.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import interleave
import record

MAKE = """
import dataclasses, sys
import jax, numpy as np
from vitjax.data.preprocess import Preprocess
from vitjax.inference import VisionModel
from vitjax.interop.contents import full_model
from vitjax.models import families
from vitjax.models.vit import vit
options = families.options("vit", "L/16") | {"num_classes": 1000}
model = vit(image_size=224, channels=3, **options)
draw = np.random.default_rng(0).standard_normal
params = jax.tree.map(lambda x: draw(x.shape, np.float32) * np.float32(0.02), model.abstract_params)
numbers = {"width": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16, "patch_size": 16}
contract = {
    "model": full_model({k: v for k, v in options.items() if k != "shape"} | numbers),
    "preprocess": dataclasses.asdict(Preprocess(224, 3)), "class_names": None,
    "loss_type": "softmax", "precision": {}, "description": {},
}
VisionModel(model, params, contract).save(sys.argv[1], format="hf")
"""
COPY = """
import os, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    while block := source.read(2**22):
        target.write(block)
    target.flush()
    os.fsync(target.fileno())
"""
VITJAX = "import sys; from vitjax.cli import main; sys.exit(main(sys.argv[1:]))"


def run(code: str, *arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(process.stderr.read().decode() if process.stderr else "failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    results = Path(__file__).parent / "results" / "interop.json"
    parser.add_argument("--out", default=str(results), help="a JSON file for the numbers")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    folder = Path(tempfile.mkdtemp())
    source = folder / "source"
    run(MAKE, str(source))
    file = source / "model.safetensors"
    size = file.stat().st_size
    cases: dict[str, tuple[str, ...]] = {
        "copy": (COPY, str(file), str(folder / "out")),
        "start-up": (VITJAX, "export", "--help"),
        "import hf": (VITJAX, "import", f"--source={source}", f"--out={folder / 'out'}"),
    }
    for name in ("hf", "npz", "timm", "safetensors", "stablehlo", "onnx"):
        options = (f"--checkpoint={source}", f"--format={name}", f"--out={folder / 'out'}")
        cases[f"export {name}"] = (VITJAX, "export", *options)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peak: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (code, *words) in cases.items():
            taken, memory = run(code, *words)
            seconds[name].append(taken)
            peak[name].append(memory)
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
    copy, start = (statistics.median(seconds[name]) for name in ("copy", "start-up"))
    cases_found, rows = [], []
    print(f"file: {size / 1e9:.2f} GB; copy {copy:.2f} s; start-up {start:.2f} s")
    for name in cases:
        middle = statistics.median(seconds[name])
        cases_found.append({
            "case": name, "seconds": middle, "all_seconds": seconds[name],
            "times_copy_without_start": (middle - start) / copy,
            "peak_over_file": statistics.median(peak[name]) / size,
        })  # fmt: skip
        last = cases_found[-1]
        print(f"{name:20} {middle:6.2f} s  {last['times_copy_without_start']:5.2f} x copy  "
              f"peak {last['peak_over_file']:.2f} x file")  # fmt: skip
        if name not in ("copy", "start-up"):
            alone = [t - s for t, s in zip(seconds[name], seconds["start-up"], strict=True)]
            times = interleave.ratios(alone, seconds["copy"])
            memory = [float(m) / size for m in peak[name]]
            rows.append(record.row(f"L/16 {name}, times a copy", times, at_most=3))
            rows.append(record.row(f"L/16 {name}, memory over file", memory, at_most=2.5))
    record.write(
        arguments.out, arguments, rows=rows, used=["onnx"], file_bytes=size, cases=cases_found
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
