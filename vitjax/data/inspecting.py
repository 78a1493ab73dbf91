"""What a source holds, and what a config makes of it, in pictures and numbers."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vitjax import config as config_lib
from vitjax import cpu
from vitjax.data.contact_sheet import draw_classes, draw_sheet, shorten
from vitjax.data.counting import Count
from vitjax.data.images import decode
from vitjax.data.preparing.encoding import reason
from vitjax.data.preparing.statistics import (
    class_name,
    count_labels,
    kind_of,
    mean_and_std,
    pixel_sums,
    size_summary,
)
from vitjax.data.preparing.whole_files import write_bytes
from vitjax.data.sources import ask
from vitjax.errors import InputError, UnreadableImage

log = logging.getLogger("vitjax")
LISTED_CLASSES, LISTED_FAULTS = 20, 10
NAME = 13  # letters of a class that leave room for its weight


def as_list(label: Any) -> list[int]:
    """The labels of an example, of one or of several."""
    return [int(v) for v in label] if isinstance(label, list | tuple | np.ndarray) else [int(label)]


def choose(source: Any, number: int, seed: int) -> Iterator[int]:
    """Random examples, more than `number`: classes take turns where the source tells labels."""
    generator = np.random.default_rng(seed)
    labels = ask(source, "all_labels")
    if labels is None:
        yield from generator.permutation(len(source))[: 4 * number].tolist()
        return
    of_class: dict[int, list[int]] = {}
    for index in generator.permutation(len(source)).tolist():
        first = as_list(labels[index])[:1]
        members = of_class.setdefault(first[0] if first else -1, [])
        if len(members) < 4 * number:
            members.append(index)
    classes = generator.permutation(sorted(of_class)).tolist()
    for turn in range(4 * number):
        yield from (of_class[c][turn] for c in classes if turn < len(of_class[c]))


def readable(source: Any, number: int, channels: int, seed: int) -> list[dict[str, Any]]:
    """Records of random examples that can be read, with their pixels.

    Raises:
      InputError: none can.
    """
    found = []
    for tried, index in enumerate(choose(source, number, seed)):
        if len(found) == number or tried == 4 * number:
            break
        try:
            record = source[index]
            found.append(record | {"pixels": decode(record["image"], channels)})
        except UnreadableImage:
            continue
    if not found:
        raise InputError(f"none of {min(4 * number, len(source))} examples can be read")
    return found


def check(source: Any, indices: Sequence[int], channels: int, console: Console) -> dict[str, Any]:
    """Decodes examples; what is wrong with them, their sizes, kinds, mean and deviation."""

    def look(index: int) -> tuple:
        example_id = f"example {index}"
        try:
            record = source[index]
            example_id = str(record["id"])
            pixels = decode(record["image"], channels)
        except UnreadableImage as error:
            return example_id, reason(error)
        kind = kind_of(record["image"])
        return pixels.shape[:2], kind, pixel_sums(pixels), as_list(record["label"])

    broken, kinds, sizes, labels = [], Counter(), [], []
    sums = np.zeros((2, channels), np.int64)
    with (
        Count(console, "checking:", len(indices)) as count,
        ThreadPoolExecutor(cpu.usable_cores(), "vitjax-check") as pool,
    ):
        for done, found in enumerate(pool.map(look, indices), 1):
            if len(found) == 2:
                broken.append({"id": found[0], "reason": found[1]})
            else:
                sizes.append(found[0])
                kinds[found[1]] += 1
                sums += found[2]
                labels.append(found[3])
            count.show(done, f"  {len(broken)} broken" if broken else "")
    report: dict[str, Any] = {"checked": len(indices), "broken": broken}
    report |= {"kinds": dict(sorted(kinds.items())), "labels_seen": labels}
    if sizes:
        shapes = np.array(sizes, np.int64)
        mean, std = mean_and_std(sums, int(shapes.prod(axis=1).sum()))
        report |= {"size": size_summary(shapes), "mean": mean, "std": std}
    return report


class _Chosen:
    """A few records as a source, each labelled by its place."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, records: list[dict[str, Any]]):
        self._records, self.num_classes = records, len(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index] | {"label": index}


def augmented(
    config: Any, records: list[dict[str, Any]], num_draws: int, names: Any
) -> list[list[tuple[np.ndarray, list[str]]]]:
    """For each record a row: itself, and what the model sees of it in so many draws."""
    import jax

    from vitjax import experiment
    from vitjax.data.loader import Loader
    from vitjax.data.preprocess import to_unit

    preprocess = experiment.make_preprocess(config)
    operations = config_lib.build_all(config.augment)
    size = preprocess.image_size
    loader = Loader(
        _Chosen(records),
        preprocess,
        transforms=config_lib.build_all(config.data.transforms, image_size=size),
        num_threads=1,
    )

    @jax.jit
    def augment(key, batch):
        batch = batch | {"images": to_unit(batch["images"])}
        for operation, own in zip(operations, jax.random.split(key, len(operations)), strict=True):
            batch = operation(own, batch)
        return batch

    def caption(row: int, batch: dict[str, np.ndarray]) -> list[str]:
        own = names[int(batch["labels"][row])]
        if "mix_weight" not in batch or batch["mix_weight"][row] > 0.995:
            return [own, ""]
        weight = float(batch["mix_weight"][row])
        other = names[int(batch["mix_labels"][row])]
        own, other = (shorten(name, lambda text: len(text) <= NAME) for name in (own, other))
        return [f"{own} {weight:.2f} /", f"{other} {1 - weight:.2f}"]

    rows = [[(record["pixels"], [names[i], ""])] for i, record in enumerate(records)]
    key = jax.random.key(config.seed)
    try:
        for step in range(num_draws):
            batch: Any = dict(loader.train_batch(step, len(records), config.seed))
            if operations:
                batch = jax.device_get(augment(jax.random.fold_in(key, step), batch))
                batch["images"] = (batch["images"].clip(0, 1) * 255).round().astype(np.uint8)
            for place, row in enumerate(np.asarray(batch["labels"]).tolist()):
                rows[row].append((batch["images"][place], caption(place, batch)))
    finally:
        loader.close()
    return rows


def inspect(
    source: Any,
    out: Path,
    console: Console,
    *,
    title: str,
    channels: int,
    config: Any = None,
    rows: int = 4,
    columns: int = 8,
    seed: int = 0,
    to_check: int | None = 2000,
) -> dict[str, Any]:
    """Writes `raw.png`, `classes.png` and `report.json`, and with a config `augmented.png`.

    Args:
      to_check: how many random examples are decoded; None for all.
    """
    names = [class_name(i, source.class_names) for i in range(source.num_classes)]

    def named(record: dict[str, Any]) -> str:
        labels = as_list(record["label"])
        return ", ".join(names[i] if 0 <= i < len(names) else str(i) for i in labels) or "(none)"

    total = len(source)
    number = total if to_check is None else min(to_check, total)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:number])
    report = {
        "source": title,
        "num_examples": total,
        "num_classes": source.num_classes,
        "class_names": list(source.class_names) if source.class_names else None,
        "problems": list(ask(source, "problems") or []),
        **check(source, chosen.tolist(), channels, console),
    }
    labels, seen = ask(source, "all_labels"), report.pop("labels_seen")
    report["class_counts_of"] = "all" if labels is not None else "checked"
    counts = count_labels(seen if labels is None else labels, source.num_classes)
    report["class_counts"] = counts

    records = readable(source, rows * columns, channels, seed)
    cells = [(r["pixels"], [named(r), str(r["id"])]) for r in records]
    sheet = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    pictures = {"raw.png": draw_sheet(sheet, with_ids=True)}
    of_what = f"{total:,} examples" if labels is not None else f"{number:,} checked examples"
    pictures["classes.png"] = draw_classes(
        names, counts, f"{of_what}, {source.num_classes:,} classes"
    )
    if config is not None:
        few = records[:rows]
        draws = augmented(config, few, columns - 1, [named(r) for r in few])
        heads = ["raw", *(f"draw {i}" for i in range(1, columns))]
        pictures["augmented.png"] = draw_sheet(draws, heads)
    for name, data in pictures.items():
        write_bytes(out / name, data)
    write_bytes(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    show(report, names)
    log.info("written: %s", ", ".join(str(out / name) for name in (*pictures, "report.json")))
    return report


def show(report: dict[str, Any], names: Sequence[str]) -> None:
    """Prints a report."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    def line(name: str, text: str) -> None:
        table.add_row(name, text.replace("[", r"\["))

    line("examples", f"{report['num_examples']:,}")
    line("classes", f"{report['num_classes']:,}")
    counts = report["class_counts"]
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    for i in order[:LISTED_CLASSES]:
        line("", f"{counts[i]:>9,}  {names[i]}")
    if rest := order[LISTED_CLASSES:]:
        line("", f"{sum(counts[i] for i in rest):>9,}  in {len(rest):,} others")
    if report["class_counts_of"] == "checked":
        line("", "(of the checked examples: the source does not tell its labels)")
    for problem in report["problems"][:LISTED_FAULTS]:
        line("problem", problem)
    broken = report["broken"]
    line("checked", f"{report['checked']:,}, of which {len(broken):,} cannot be read")
    for fault in broken[:LISTED_FAULTS]:
        line("", f"{fault['id']}: {fault['reason']}")
    if len(broken) > LISTED_FAULTS:
        line("", f"... and {len(broken) - LISTED_FAULTS:,} more in report.json")
    if "size" in report:
        for name, size in report["size"].items():
            line(name, f"{size['min']} to {size['max']}, median {size['median']}")
        line("kinds", ", ".join(f"{kind} {n:,}" for kind, n in report["kinds"].items()))
    console = Console()
    console.print(table)
    if "mean" in report:
        mean, std = (tuple(round(v, 3) for v in report[key]) for key in ("mean", "std"))
        text = f"for a config: config.data.update(mean={mean}, std={std})"
        console.print(text, markup=False, soft_wrap=True)
