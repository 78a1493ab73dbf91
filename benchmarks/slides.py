"""What a whole slide costs: python benchmarks/slides.py [--side 100000] [--folder FOLDER]

Makes a pyramidal TIFF of JPEG tiles, mostly glass (a few hundred MB in FOLDER, deleted afterwards),
and in a fresh process for each reader finds the tissue, cuts it into tiles of 224 pixels at 0.5
microns, and streams all of them. Gives the peak of the process's resident memory, the part of it
that imports had taken before, and tiles per second.
"""

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "slides.json"
TILE, LEVELS, MICRONS = 512, (1, 4, 16), 0.25
LIMIT_MIB = 1024
VERSIONS = ("numpy", "opencv-python-headless", "openslide-python", "openslide-bin", "tifffile")


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80, subsampling="4:2:0", optimize=True)
    return buffer.getvalue()


def tissue_cells(count: int) -> np.ndarray:
    """Which squares of TILE pixels hold tissue: two ellipses, about a tenth of the slide."""
    y, x = (np.mgrid[:count, :count] + 0.5) / count
    first = ((x - 0.35) / 0.16) ** 2 + ((y - 0.4) / 0.1) ** 2 < 1
    return first | (((x - 0.7) / 0.09) ** 2 + ((y - 0.65) / 0.17) ** 2 < 1)


def textures(generator: np.random.Generator, count: int = 8) -> list[np.ndarray]:
    """Pink squares of TILE pixels with purple nuclei."""
    made = []
    for _ in range(count):
        rough = generator.normal(0, 1, (TILE // 8, TILE // 8, 1))
        nuclei = (rough > 1.0).astype(np.float32)
        small = np.concatenate([225 - 110 * nuclei, 160 - 90 * nuclei, 200 - 50 * nuclei], -1)
        small = np.clip(small + 8 * rough, 0, 255).astype(np.uint8)
        large = Image.fromarray(small).resize((TILE, TILE), Image.Resampling.BICUBIC)
        noise = generator.normal(0, 4, (TILE, TILE, 3))
        made.append(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8))
    return made


def level_tiles(side: int, downsample: int, cells: np.ndarray) -> Iterator[bytes]:
    """The encoded tiles of a level, row by row."""
    looks = textures(np.random.default_rng(0))
    width = -(-side // downsample)
    count, step = -(-width // TILE), TILE // downsample
    white = np.full((TILE, TILE, 3), 244, np.uint8)
    known = [encoded(white)] + [encoded(look) for look in looks]
    for row in range(count):
        for column in range(count):
            part = cells[row * downsample :, column * downsample :][:downsample, :downsample]
            if not part.any():
                yield known[0]
            elif downsample == 1:
                yield known[1 + (row * 7 + column * 3) % len(looks)]
            else:
                mask = np.kron(part, np.ones((step, step), bool))
                pixels = white.copy()
                inside = pixels[: mask.shape[0], : mask.shape[1]]
                look = looks[(row + column) % len(looks)][: mask.shape[0], : mask.shape[1]]
                inside[mask] = look[mask]
                yield encoded(pixels)


def make_slide(path: Path, side: int) -> None:
    import tifffile

    # Tiles come encoded, but tifffile asks for an encoder all the same, of a package that may lack.
    tifffile.TIFF.COMPRESSORS._codecs.setdefault(7, encoded)
    cells = tissue_cells(-(-side // TILE))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for downsample in LEVELS:
            width = -(-side // downsample)
            pixels = 1e4 / (MICRONS * downsample)  # in a centimetre
            file.write(
                level_tiles(side, downsample, cells),
                shape=(width, width, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr",
                subsampling=(2, 2), compression="jpeg", subfiletype=int(downsample > 1),
                resolution=(pixels, pixels), resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: str, reader: str, threads: int) -> dict:
    from vitjax.medical.slides.slide import Slide
    from vitjax.medical.slides.tiles import grid, stream
    from vitjax.medical.slides.tissue import tissue_mask

    imports = peak_mib()
    started = time.perf_counter()
    with Slide(path, reader=reader) as slide:  # CPU-seconds beside wall: the machine may be shared
        mask = tissue_mask(slide.thumbnail())
        tiles = grid(slide, mask)
        found, busy = time.perf_counter(), time.process_time()
        count, total = 0, 0.0
        for _, images in stream(slide, tiles, 64, threads=threads):
            count += len(images)
            total += float(images.mean()) * len(images)
    seconds, busy = time.perf_counter() - found, time.process_time() - busy
    return {
        "reader": reader,
        "threads": threads,
        "tiles": count,
        "mean_value": round(total / count, 2),
        "seconds_to_find_tissue": round(found - started, 2),
        "tiles_per_second": round(count / seconds, 1),
        "tiles_per_cpu_second": round(count / busy, 1),
        "peak_mib": round(peak_mib(), 1),
        "peak_mib_of_imports": round(imports, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.threads)))
        return
    path = arguments.folder / f"slide_{os.getpid()}.tif"
    try:
        make_slide(path, arguments.side)
        size, rows = path.stat().st_size, []
        for reader in ("openslide", "tifffile"):
            command = [sys.executable, __file__, f"--threads={arguments.threads}", "--measure"]
            done = subprocess.run([*command, str(path), reader], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout))
            print(rows[-1])
    finally:
        path.unlink(missing_ok=True)
    about = {
        "slide": {
            "side": arguments.side,
            "levels": LEVELS,
            "microns_per_pixel": MICRONS,
            "tile": TILE,
            "mib_on_disk": round(size / 2**20, 1),
            "mib_of_pixels": round(arguments.side**2 * 3 / 2**20),
        },
        "rows": rows,
        "limit_mib": LIMIT_MIB,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    if max(row["peak_mib"] for row in rows) > LIMIT_MIB:
        raise SystemExit(f"more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
