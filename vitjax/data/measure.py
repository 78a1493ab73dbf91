"""How fast the input pipeline of a config is by itself, and where its time goes."""

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vitjax import config as config_lib
from vitjax import cpu, devices, experiment
from vitjax import precision as precision_lib
from vitjax.data.counting import Count
from vitjax.data.images import decode, size_of
from vitjax.data.preparing.whole_files import write_bytes
from vitjax.errors import InputError, UnreadableImage

SAMPLED = 256  # examples whose pieces are timed
UTILISATION = 0.4  # of a device's peak, where it is said what it would need
SHOWN = ("TPU v5e", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3")
PIECES = ("read", "decode", "transform")


def memory() -> int:
    """Bytes of this process that are in memory now."""
    counters = Path("/proc/self/statm")
    if counters.is_file():
        return int(counters.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # at most, where there is no /proc


def threads_of(config: Any) -> int:
    """The number of decoding threads that a run of this config has here."""
    given = config.data.num_threads
    return cpu.usable_cores() if given is None else given


def time_loader(config: Any, num_batches: int, console: Console) -> dict[str, Any]:
    """Reads training batches as a run does, after a first one that does not count.

    Returns:
      Seconds to the first batch with the source opened; images a second of the clock and of the
      processor (all threads); bytes in memory before and after.
    """
    before, began = memory(), time.perf_counter()
    preprocess = experiment.make_preprocess(config)
    loader = experiment.make_loader(config, config.data.source, preprocess, training=True)
    threads = threads_of(config)
    try:
        batches = loader.train_batches(0, config.batch_size, config.seed, config.data.num_ahead)
        next(batches)
        start = time.perf_counter()
        row: dict[str, Any] = {"threads": threads, "first_batch_seconds": start - began}
        began_cpu = time.process_time()
        images = num_batches * config.batch_size
        with Count(console, f"{threads} threads:", images) as count:
            for batch in range(1, num_batches + 1):
                next(batches)
                count.show(batch * config.batch_size)
        seconds, work = time.perf_counter() - start, time.process_time() - began_cpu
        row |= {
            "images_per_second": images / seconds,
            "images_per_cpu_second": images / work,
            "cpu_ms_per_image": 1000 * work / images,
            "unreadable": len(loader.faults.reasons),
        }
    finally:
        loader.close()
    return row | {"memory_before": before, "memory_after": memory()}


def time_pieces(config: Any, console: Console) -> dict[str, dict[str, float]]:
    """Milliseconds an image that each piece of the work takes, in one thread.

    Returns:
      For "read", "decode" (with the crop, where the first transform tells its region) and
      "transform" (with the resize): "cpu" and "wall"; reading waits for the disk beside its CPU.
    """
    preprocess = experiment.make_preprocess(config)
    size = preprocess.image_size
    source = config_lib.build(config.data.source)
    transforms = config_lib.build_all(config.data.transforms, image_size=size)
    generator = np.random.default_rng(config.seed)
    chosen = generator.permutation(len(source))[:SAMPLED].tolist()
    spent = {piece: np.zeros(2) for piece in PIECES}

    def timed(piece: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time(), time.perf_counter()
        result = work(*arguments)
        spent[piece] += time.thread_time() - start[0], time.perf_counter() - start[1]
        return result

    def decoded(image: Any) -> Any:
        if not (transforms and hasattr(transforms[0], "region")):
            return decode(image, preprocess.channels)
        region = transforms[0].region(*size_of(image), generator)
        return decode(image, preprocess.channels, region, least=(size, size))

    def transformed(pixels: Any) -> Any:
        if not transforms:
            return preprocess.fit(pixels)
        first, *others = transforms
        pixels = first.resize(pixels) if hasattr(first, "region") else first(pixels, generator)
        for transform in others:
            pixels = transform(pixels, generator)
        return pixels

    num_read = 0
    with Count(console, "pieces:", len(chosen)) as count:
        for done, index in enumerate(chosen, 1):
            try:
                image = timed("read", source.__getitem__, index)["image"]
                pixels = timed("decode", decoded, image)
            except UnreadableImage:
                continue
            timed("transform", transformed, pixels)
            num_read += 1
            count.show(done)
    if not num_read:
        raise InputError(f"none of {len(chosen)} examples can be read")
    milliseconds = {piece: 1000 * both / num_read for piece, both in spent.items()}
    return {k: {"cpu": float(v[0]), "wall": float(v[1])} for k, v in milliseconds.items()}


def needs(config: Any) -> dict[str, Any]:
    """Images a second that devices would take in training the config's model.

    Training counts three forward passes; a device is taken to reach 40% of its peak.
    """
    try:
        model = experiment.make_model(
            config.model,
            experiment.make_preprocess(config),
            precision_lib.make_precision(**config.precision),
        )
    except InputError as error:
        return {"unknown": str(error)}
    flops = 3 * model.flops_per_image
    found = {name: UTILISATION * devices.PEAK_FLOPS[name] / flops for name in SHOWN}
    return {"gflop_per_image": flops / 1e9, "images_per_second": found}


def bench(
    config: Any,
    console: Console,
    *,
    num_batches: int,
    threads: Sequence[int],
    json_path: str | None,
) -> dict[str, Any]:
    """Measures, prints a table, and writes the numbers as JSON if asked."""
    if num_batches < 1:
        raise InputError(f"--batches must be at least 1, got {num_batches}")
    if config.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {config.batch_size}")
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise InputError(f"--json={json_path}: no such folder: {Path(json_path).parent}")
    rows = []
    for number in threads:
        with config.data.ignore_type():
            config.data.num_threads = number
        rows.append(time_loader(config, num_batches, console))
    pieces = time_pieces(config, console)
    whole = next((r for r in rows if r["threads"] <= 1), rows[0])["cpu_ms_per_image"]
    rest = max(0.0, whole - sum(piece["cpu"] for piece in pieces.values()))
    report = {
        "batch_size": config.batch_size,
        "image_size": config.data.image_size,
        "batches": num_batches,
        "cores": os.cpu_count(),
        "loader": rows,
        "pieces_ms_per_image": pieces,
        "assembling_cpu_ms_per_image": rest,
        "device": needs(config),
    }
    show(report)
    if json_path:
        write_bytes(Path(json_path), (json.dumps(report, indent=1) + "\n").encode())
    return report


def show(report: dict[str, Any]) -> None:
    """Prints a report."""
    out = Console()
    table = Table(box=None, pad_edge=False)
    for name in ("threads", "images/s", "images/CPU-s", "first batch", "memory before", "after"):
        table.add_column(name, justify="right")
    for row in report["loader"]:
        table.add_row(
            str(row["threads"]),
            f"{row['images_per_second']:,.0f}",
            f"{row['images_per_cpu_second']:,.0f}",
            f"{row['first_batch_seconds']:.2f} s",
            f"{row['memory_before'] / 2**20:,.0f} MiB",
            f"{row['memory_after'] / 2**20:,.0f} MiB",
        )
    out.print(table)
    table = Table(box=None, pad_edge=False)
    for name in ("one image", "CPU ms", "share", "waiting ms"):
        table.add_column(name, justify="left" if name == "one image" else "right")
    names = {"decode": "decode (and crop)", "transform": "resize, transforms"}
    pieces, rest = report["pieces_ms_per_image"], report["assembling_cpu_ms_per_image"]
    total = rest + sum(piece["cpu"] for piece in pieces.values())
    for name, piece in pieces.items():
        waiting = max(0.0, piece["wall"] - piece["cpu"])
        share = f"{piece['cpu'] / total:.0%}"
        table.add_row(names.get(name, name), f"{piece['cpu']:.3f}", share, f"{waiting:.3f}")
    table.add_row("assembling, the rest", f"{rest:.3f}", f"{rest / total:.0%}", "")
    out.print()
    out.print(table)
    bad = max(row["unreadable"] for row in report["loader"])
    if bad:
        out.print(f"\n{bad} unreadable examples were met")
    if "unknown" in report["device"]:
        return
    out.print(
        f"\nat {report['device']['gflop_per_image']:,.3g} GFLOP an image in training, and "
        f"{UTILISATION:.0%} of its peak, one of these takes in",
        soft_wrap=True,
    )
    for name, value in report["device"]["images_per_second"].items():
        out.print(f"  {name:24} {value:>12,.0f} images/s")
