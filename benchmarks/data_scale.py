"""What the loader costs at scale: python benchmarks/data_scale.py --photos=FOLDER_OR_ZIP

A made-up index of 100 million records over the same photographs: how long until the first batch and
how much memory; the first batch at step 1,000,000; memory over ten epochs of a small set; and the
share of its time that a step waits for data when it takes images at half the loader's speed. The
step is a sleep, which takes no core, as an accelerator's takes none.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from input_pipeline import copies

from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.data.sources.folders import ImageFolder
from vitjax.data.transforms import RandomResizedCrop

BATCH, SIZE = 128, 224


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class MadeUp:
    """As many records as are asked for, of a few real files, with labels to balance by."""

    class_names = None

    def __init__(self, folder: ImageFolder, count: int, num_classes: int = 1000):
        self._folder, self._count, self.num_classes = folder, count, num_classes

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        record = self._folder[index % len(self._folder)]
        return record | {"label": index % self.num_classes}

    def all_labels(self) -> np.ndarray:
        return np.arange(self._count, dtype=np.int32) % self.num_classes


def make(source, **settings) -> Loader:
    return Loader(source, Preprocess(SIZE), transforms=[RandomResizedCrop(SIZE)], **settings)


def first_batch(source, step: int, **settings) -> float:
    start = time.perf_counter()
    loader = make(source, **settings)
    next(loader.train_batches(step, BATCH, 0))
    loader.close()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result: dict = {"device": f"{os.cpu_count()} x {platform.machine()}"}
    with tempfile.TemporaryDirectory() as temporary:
        copies(arguments.photos, Path(temporary) / "photos", 240)
        folder = ImageFolder(str(Path(temporary) / "photos"))
        first_batch(folder, 0)
        large = MadeUp(folder, 100_000_000)
        before = resident()
        starts: dict[str, list[float]] = {"step 0": [], "step 1,000,000": [], "small set": []}
        for _ in range(arguments.rounds):
            starts["step 0"].append(first_batch(large, 0))
            starts["step 1,000,000"].append(first_batch(large, 1_000_000))
            starts["small set"].append(first_batch(folder, 0))
        result["seconds to the first batch"] = {k: statistics.median(v) for k, v in starts.items()}
        result["MiB more with 100 million records"] = resident() - before
        result["seconds to the first batch, balanced by class"] = first_batch(
            large, 0, sampling="classes"
        )
        result["MiB more, balanced by class"] = resident() - before

        loader, memory = make(folder), []
        stream = loader.train_batches(0, 120, 0)
        for _ in range(10):
            next(stream), next(stream)  # an epoch
            memory.append(resident())
        result["MiB after each of ten epochs"] = [round(m) for m in memory]

        stream = loader.train_batches(0, BATCH, 0)
        next(stream)
        start = time.perf_counter()
        for _ in range(12):
            next(stream)
        speed = 12 * BATCH / (time.perf_counter() - start)
        waited, step = 0.0, 2 * BATCH / speed
        for _ in range(4):  # fills what is read ahead
            time.sleep(step)
            next(stream)
        start = time.perf_counter()
        for _ in range(20):
            time.sleep(step)
            before_batch = time.perf_counter()
            next(stream)
            waited += time.perf_counter() - before_batch
        result["images a second"] = speed
        result["share of the time waited at half of that"] = waited / (time.perf_counter() - start)
    text = json.dumps(result, indent=1)
    print(text)
    (Path(__file__).parent / "results" / "data_scale_cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
