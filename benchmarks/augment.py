"""What augmentation on the device costs.

    python benchmarks/augment.py --photos=FOLDER_OR_ZIP [--rounds 7] [--out FILE.json]

Each operation and each policy, jitted, over a batch of 64 images of 224 pixels: wall and CPU
seconds, medians over interleaved rounds. RandAugment also against the same sixteen operations by
Pillow, in one thread over the same images. Ways to resample and to count values are compared, too.
"""

import argparse
import io
import math
import statistics
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import interleave
import numpy as np
import record
from PIL import Image, ImageEnhance, ImageOps

BATCH, SIZE, ENDINGS = 64, 224, (".jpg", ".jpeg")


def read_photos(place: str) -> np.ndarray:
    """BATCH photographs, some of them twice: uint8 [B, Y, X, 3]."""
    path = Path(place)
    if path.is_dir():
        files = [p.read_bytes() for p in sorted(path.rglob("*")) if p.suffix.lower() in ENDINGS]
    else:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith(ENDINGS))
            files = [archive.read(name) for name in names]
    opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files[:BATCH]]
    resized = [np.asarray(image.resize((SIZE, SIZE))) for image in opened]
    return np.stack([resized[i % len(resized)] for i in range(BATCH)])


def move(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float):
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    matrix = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(128,) * 3
    )


def rotate(image: Image.Image, level: float):
    c, s = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    return move(image, c, s, 0, -s, c, 0)


def solarize_add(image: Image.Image, level: float):
    added = image.point([min(255, value + int(110 * abs(level))) for value in range(256)] * 3)
    dark = image.convert("L").point([255 * (value < 128) for value in range(256)])
    return Image.composite(added, image, dark)


def cutout(image: Image.Image, level: float):
    half, array = int(40 * abs(level) * image.width / SIZE), np.array(image)
    array[100 - half : 100 + half, 100 - half : 100 + half] = 128
    return Image.fromarray(array)


PILLOW: list[Callable] = [
    lambda im, _: ImageOps.autocontrast(im),
    lambda im, _: ImageOps.equalize(im),
    lambda im, _: ImageOps.invert(im),
    rotate,
    lambda im, v: ImageOps.posterize(im, max(1, 8 - round(4 * abs(v)))),
    lambda im, v: ImageOps.solarize(im, 256 - int(256 * abs(v))),
    solarize_add,
    lambda im, v: ImageEnhance.Color(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Contrast(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Brightness(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * v),
    lambda im, v: move(im, 1, 0.3 * v, 0, 0, 1, 0),
    lambda im, v: move(im, 1, 0, 0, 0.3 * v, 1, 0),
    lambda im, v: move(im, 1, 0, 100 * v, 0, 1, 0),
    lambda im, v: move(im, 1, 0, 0, 0, 1, 100 * v),
    cutout,
]


def by_pillow(images: np.ndarray, seed: int) -> None:
    """Two operations on each image at magnitude 10, as the loader's threads would do it."""
    generator = np.random.default_rng(seed)
    for image in images:
        opened = Image.fromarray(image)
        for index in generator.integers(0, len(PILLOW), 2):
            opened = PILLOW[index](opened, 1 / 3 if generator.random() < 0.5 else -1 / 3)
        np.asarray(opened)


def ways_to_sample() -> dict[str, Callable]:
    """Two ways to move a batch by a fixed turn of each image: ours, and jax.scipy's."""
    import jax
    import jax.numpy as jnp

    from vitjax.data import geometry

    angles = np.linspace(-0.3, 0.3, BATCH, dtype=np.float32)[:, None, None]
    y, x = np.mgrid[:SIZE, :SIZE][:, None] - (SIZE - 1) / 2
    from_y = (np.cos(angles) * y - np.sin(angles) * x + (SIZE - 1) / 2).astype(np.float32)
    from_x = (np.sin(angles) * y + np.cos(angles) * x + (SIZE - 1) / 2).astype(np.float32)

    def ours(_, batch, from_y, from_x):
        return geometry.sample_bilinear(batch["images"], from_y, from_x, 0.5)

    def map_coordinates(_, batch, from_y, from_x):
        def plane(image, y, x):
            return jax.scipy.ndimage.map_coordinates(image, [y, x], 1, "constant", 0.5)

        channels = jax.vmap(plane, (-1, None, None), -1)
        return jax.vmap(channels)(batch["images"], from_y, from_x)

    places = jnp.asarray(from_y), jnp.asarray(from_x)
    return {
        f"resampling, {name}": lambda k, b, f=jax.jit(f): f(k, b, *places)
        for name, f in (("4 gathers of pixels", ours), ("map_coordinates", map_coordinates))
    }


def ways_to_count() -> dict[str, Callable]:
    """Ways to get the histograms that equalize needs; comparing would take minutes here."""
    import jax
    import jax.numpy as jnp

    from vitjax.data import randaugment

    def to_planes(batch):
        return jnp.round(batch["images"] * 255).astype(jnp.uint8).transpose(0, 3, 1, 2)

    def by_sorting(planes):
        values = jnp.sort(planes.reshape(BATCH * 3, -1), axis=1)
        levels = jnp.arange(256, dtype=jnp.uint8)
        ends = jax.vmap(lambda v: jnp.searchsorted(v, levels, side="right"))(values)
        return jnp.diff(ends, axis=1, prepend=0)

    def by_product(planes):
        pixels = planes.reshape(BATCH * 3, -1)
        high, low = (jax.nn.one_hot(v, 16) for v in (pixels >> 4, pixels & 15))
        return jnp.einsum("mni,mnj->mij", high, low)

    ways = {
        "scatter": randaugment.histograms,
        "sort and search": by_sorting,
        "product of 16 by 16": by_product,
    }
    return {
        f"histograms, {name}": jax.jit(lambda _, b, f=f: f(to_planes(b)))
        for name, f in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    place = Path(__file__).parent / "results" / "augment_cpu.json"
    parser.add_argument("--out", default=str(place), help="a JSON file for the numbers")
    arguments = parser.parse_args()
    from vitjax import cpu

    cpu.keep_freed_memory()
    import jax
    import jax.numpy as jnp

    from vitjax.data import augment, colour, geometry, policies, randaugment

    photos = read_photos(arguments.photos)
    batch = {"images": jnp.asarray(photos, jnp.float32) / 255, "labels": jnp.arange(BATCH)}
    operations = [
        augment.RandomFlip(),
        augment.RandomShift(16),
        augment.Mixup(0.4),
        augment.Cutmix(),
        geometry.RandomQuarterTurn(),
        geometry.RandomAffine(15.0, (0.9, 1.1), 0.05, 5.0),
        geometry.Elastic(50.0, 5.0),
        geometry.RandomErasing(),
        colour.ColourJitter(0.3, 0.3, 0.3),
        colour.ColourJitter(hue=0.1),
        colour.GaussianBlur(),
        colour.GaussianNoise(),
        colour.Solarize(),
        colour.Grayscale(),
        colour.Gamma(),
        colour.ThreeAugment(),
        randaugment.RandAugment(),
    ]
    runs: dict[str, Callable] = {
        f"{type(op).__name__}{'(hue)' if op == colour.ColourJitter(hue=0.1) else ''}": jax.jit(op)
        for op in operations
    }
    runs |= {f"policy {name}": jax.jit(policies.Policy(name)) for name in policies.POLICIES}
    runs |= ways_to_sample() | ways_to_count()
    pillow = "RandAugment by Pillow, one thread"

    def run(name: str, seed: int) -> tuple[float, float]:
        key = jax.random.key(seed)
        # The threads of XLA wait busily for a while, which is no work of Pillow's.
        clock = time.thread_time if name == pillow else time.process_time
        start = time.perf_counter(), clock()
        if name == pillow:
            by_pillow(photos, seed)
        else:
            jax.block_until_ready(runs[name](key, batch))
        return time.perf_counter() - start[0], clock() - start[1]

    times: dict[str, list] = {name: [] for name in [*runs, pillow]}
    for seed in range(arguments.rounds + 1):
        for name, measured in times.items():
            took = run(name, seed)
            if seed:  # the first compiles
                measured.append(took)
    table = {
        name: {
            "wall ms": round(1e3 * statistics.median(t[0] for t in measured), 2),
            "cpu ms": round(1e3 * statistics.median(t[1] for t in measured), 2),
        }
        for name, measured in times.items()
    }
    print(f"{'':36}{'wall ms':>10}{'CPU ms':>10}   a batch of {BATCH} at {SIZE} pixels")
    for name, row in table.items():
        print(f"{name:36}{row['wall ms']:10.1f}{row['cpu ms']:10.1f}")
    ratios = [a[1] / b[1] for a, b in zip(times["RandAugment"], times[pillow], strict=True)]
    result = {
        "batch": BATCH,
        "size": SIZE,
        "rounds": arguments.rounds,
        "milliseconds a batch": table,
        "CPU seconds of RandAugment on the device over Pillow's": {
            "median": statistics.median(ratios),
            "quartiles": interleave.spread(ratios),
        },
    }
    print(f"RandAugment over Pillow's, CPU seconds: {statistics.median(ratios):.2f}")
    rows = [record.row("RandAugment over Pillow's, CPU seconds", ratios)]
    record.write(arguments.out, arguments, rows=rows, used=["pillow"], **result)


if __name__ == "__main__":
    main()
