"""The input pipeline beside tf.data and a PyTorch DataLoader, over the same JPEG files.

    python benchmarks/input_pipeline.py --photos=FOLDER_OR_ZIP [--rounds 5] [--peers ours,torch]
        [--tensorflow=PYTHON] [--out FILE.json]

Each peer draws the random resized crop of ImageNet (area 0.08 to 1, bilinear, no antialiasing but
in Pillow, which has no other) at 224 pixels in a shuffled order and gives uint8 batches of 128;
each run is a process of its own, in turn. What counts is images a CPU-second, children included,
after a first batch that does not count; and images a second of the clock.

  ours, ours-antialias   vitjax.data.loader over an image folder
  ours-1, ours-0         the same with one thread, and with none
  store                  the same files as `vitjax data prepare --short_side=256` keeps them
  grain                  the same decoding by Grain's own pipeline and its threads
  torch                  DataLoader with worker processes, Pillow
  tensorflow             tf.data with decode_and_crop_jpeg; --tensorflow names a Python with it
"""

import argparse
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import record

BATCH, SIZE, SEED = 128, 224, 0


def ours(folder: str, threads: int, transform: dict | None = None):
    from vitjax import cpu
    from vitjax.data.loader import Loader
    from vitjax.data.preprocess import Preprocess
    from vitjax.data.sources.folders import ImageFolder
    from vitjax.data.transforms import RandomResizedCrop

    cpu.keep_freed_memory()  # as the command does
    crop = RandomResizedCrop(SIZE, **(transform or {}))
    loader = Loader(ImageFolder(folder), Preprocess(SIZE), transforms=[crop], num_threads=threads)
    return (batch["images"] for batch in loader.train_batches(0, BATCH, SEED))


def store(folder: str, threads: int):
    from vitjax.data.loader import Loader
    from vitjax.data.preprocess import Preprocess
    from vitjax.data.sources.prepared import Prepared
    from vitjax.data.transforms import RandomResizedCrop

    source = Prepared(folder + ".store", "all")
    crops = [RandomResizedCrop(SIZE)]
    loader = Loader(source, Preprocess(SIZE), transforms=crops, num_threads=threads)
    return (batch["images"] for batch in loader.train_batches(0, BATCH, SEED))


def paths(folder: str) -> list[str]:
    return sorted(str(p) for p in Path(folder).rglob("*.jpg"))


def by_grain(folder: str, threads: int):
    import grain
    import numpy as np

    from vitjax.data.images import decode, size_of
    from vitjax.data.transforms import RandomResizedCrop

    crop = RandomResizedCrop(SIZE)

    def load(path: str, generator: np.random.Generator):
        data = Path(path).read_bytes()
        return crop.resize(decode(data, 3, crop.region(*size_of(data), generator), (SIZE, SIZE)))

    chain = grain.MapDataset.source(paths(folder)).shuffle(SEED).repeat().seed(SEED)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * BATCH)
    return iter(chain.random_map(load).to_iter_dataset(options).batch(BATCH))


def by_torch(folder: str, threads: int):
    import numpy as np
    import torch
    from PIL import Image

    class Photos(torch.utils.data.Dataset):
        def __init__(self):
            self.paths = paths(folder)

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as image:
                image = image.convert("RGB")
            left, top, w, h = box(image.width, image.height)
            part = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR,
                                box=(left, top, left + w, top + h))  # fmt: skip
            return torch.from_numpy(np.array(part))

    def box(width, height):
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
            aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(torch.randint(0, width - w + 1, (1,)))
                return left, int(torch.randint(0, height - h + 1, (1,))), w, h
        return 0, 0, width, height

    loader = torch.utils.data.DataLoader(
        Photos(), batch_size=BATCH, shuffle=True, num_workers=threads, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip
    while True:
        yield from loader


def by_tensorflow(folder: str, threads: int):
    import importlib

    tf = importlib.import_module("tensorflow")  # a peer here, never a part of the package

    def load(path):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data), tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.08, 1.0), aspect_ratio_range=(3 / 4, 4 / 3), max_attempts=10,
            use_image_if_no_bounding_boxes=True, min_object_covered=0,
        )  # fmt: skip
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(data, window, 3), (SIZE, SIZE))
        return tf.cast(image, tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(paths(folder)).shuffle(10_000, SEED).repeat()
    data = data.map(load, num_parallel_calls=threads).batch(BATCH).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    return iter(data.with_options(options).as_numpy_iterator())


PEERS = {
    "ours": lambda folder: ours(folder, 2),
    "ours-1": lambda folder: ours(folder, 1),
    "ours-0": lambda folder: ours(folder, 0),
    "ours-antialias": lambda folder: ours(folder, 2, {"antialias": True}),
    "store": lambda folder: store(folder, 2),
    "grain": lambda folder: by_grain(folder, 2),
    "torch": lambda folder: by_torch(folder, 2),
    "tensorflow": lambda folder: by_tensorflow(folder, 2),
}


def used() -> float:
    return sum(
        getattr(resource.getrusage(who), kind)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for kind in ("ru_utime", "ru_stime")
    )


def children() -> float:
    """CPU-seconds of child processes that still run (Linux)."""
    total, tick = 0, os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += int(fields[11]) + int(fields[12])
    return total / tick


def measure(peer: str, folder: str, batches: int) -> dict[str, float]:
    started = time.perf_counter()
    iterator = iter(PEERS[peer](folder))
    next(iterator)
    first = time.perf_counter() - started
    wall, work = time.perf_counter(), used() + children()
    for _ in range(batches):
        image = next(iterator)
    assert image.shape == (BATCH, SIZE, SIZE, 3), image.shape
    images = batches * BATCH
    result = {
        "a CPU-second": images / (used() + children() - work),
        "a second": images / (time.perf_counter() - wall),
        "seconds to the first batch": first,
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # leaves threads and workers as they are


def copies(photos: str, folder: Path, count: int, quality: int | None = None) -> None:
    """The photographs over and over, as an image folder of two classes; encoded anew if asked."""
    files = []
    if Path(photos).is_dir():
        files = [p.read_bytes() for p in sorted(Path(photos).rglob("*.jp*g"))]
    else:
        with zipfile.ZipFile(photos) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith((".jpg", ".jpeg", ".JPEG")))
            files = [archive.read(name) for name in names]
    if quality:
        from PIL import Image

        for index, data in enumerate(files):
            again = io.BytesIO()
            Image.open(io.BytesIO(data)).convert("RGB").save(again, "JPEG", quality=quality)
            files[index] = again.getvalue()
    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        where = folder / ("odd" if index % 2 else "even") / f"{index:06d}.jpg"
        where.write_bytes(files[index % len(files)])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--files", type=int, default=1200)
    parser.add_argument("--quality", type=int, help="encodes the photographs anew")
    parser.add_argument("--peers", default="ours,ours-1,ours-antialias,store,grain,torch")
    parser.add_argument("--tensorflow")
    parser.add_argument("--out", help="a JSON file for the numbers; in benchmarks/results if none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one, arguments.photos, arguments.batches)
    peers = arguments.peers.split(",") + ["tensorflow"] * bool(arguments.tensorflow)
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        copies(arguments.photos, folder, arguments.files, arguments.quality)
        size = sum(p.stat().st_size for p in folder.rglob("*.jpg")) / arguments.files
        if "store" in peers:
            command = [sys.executable, "-m", "vitjax", "data", "prepare", f"--source={folder}"]
            command += [f"--out={folder}.store", "--short_side=256", "--split=all"]
            subprocess.run([*command, "--keep_duplicates"], check=True, capture_output=True)
        for round_number in range(arguments.rounds):
            for peer in peers:
                python = arguments.tensorflow if peer == "tensorflow" else sys.executable
                command = [python, __file__, f"--one={peer}", f"--photos={folder}"]
                command.append(f"--batches={arguments.batches}")
                environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
                run = subprocess.run(command, capture_output=True, env=environment, check=True)
                found[peer].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"round {round_number + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
    result = {
        "files": arguments.files, "quality": arguments.quality, "bytes a file": round(size),
        "rounds": arguments.rounds,
        "peers": {
            peer: {
                name: {
                    "median": statistics.median(r[name] for r in rows),
                    "lowest": min(r[name] for r in rows), "highest": max(r[name] for r in rows),
                    "ours over it": statistics.median(
                        a[name] / b[name] for a, b in zip(found[peers[0]], rows, strict=True)
                    ),
                }
                for name in rows[0]
            }
            for peer, rows in found.items()
        },
    }  # fmt: skip
    name = f"input_pipeline{f'_q{arguments.quality}' if arguments.quality else ''}_cpu.json"
    rows = [
        record.row(f"{peers[0]} over {peer}, images a CPU-second",
                   [a["a CPU-second"] / b["a CPU-second"] for a, b in
                    zip(found[peers[0]], found[peer], strict=True)])
        for peer in peers[1:]
    ]  # fmt: skip
    out = arguments.out or Path(__file__).parent / "results" / name
    used = ["grain", "torch", "pillow", "opencv-python-headless", "turbojpeg"]
    record.write(out, arguments, rows=rows, used=used, **result)
    columns = (
        "peer",
        "images a CPU-second",
        f"{peers[0]} over it",
        "images a second",
        "first batch",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for peer, row in result["peers"].items():
        cpu, wall, first = row.values()
        spread = f"{cpu['median']:.0f} ({cpu['lowest']:.0f} to {cpu['highest']:.0f})"
        print(f"| {peer:15s} | {spread} | {cpu['ours over it']:.2f} | {wall['median']:.0f} "
              f"| {first['median']:.1f} s |")  # fmt: skip


if __name__ == "__main__":
    main()
