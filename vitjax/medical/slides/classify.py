"""From slides to predictions: tiles, features, a model of bags, a table, pictures."""

import csv
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.inference import VisionModel
from vitjax.medical.cohort import SPLITS
from vitjax.medical.slides.bags import Tiling, extract, read_bag
from vitjax.medical.slides.fit import MilResult, fit
from vitjax.medical.slides.heat import draw_heat_map, heat_map
from vitjax.medical.slides.slide import Slide
from vitjax.medical.slides.table import SlideTable

log = logging.getLogger("vitjax")
PICTURE_SIDE = 1536


@dataclasses.dataclass(frozen=True)
class Classified:
    """What was found of each slide, in the order of `predictions.csv`.

    Attributes:
      slide_ids, labels, splits, groups: of the table, without the slides that were left out.
      classes: names, in the order of labels and probabilities.
      left_out: slides that could not be used.
      result: of the fit.
      bags: file of each slide.
      predictions: the table that was written.
      pictures: the attention's picture of each slide that has one.
    """

    slide_ids: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Int[np.ndarray, " S"]
    probabilities: Float[np.ndarray, "S C"]
    splits: np.ndarray
    groups: np.ndarray
    group_kind: str
    left_out: tuple[str, ...]
    result: MilResult
    bags: tuple[Path, ...]
    predictions: Path
    pictures: dict[str, Path]


def write_predictions(
    path: str | Path, table: SlideTable, probabilities: Float[np.ndarray, "S C"]
) -> None:
    """One row a slide: slide_id, group, split, label (blank if unknown), prediction, p_CLASS."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["slide_id", "group", "split", "label", "prediction"]
        writer.writerow([*head, *(f"p_{name}" for name in table.classes)])
        for row, slide_id in enumerate(table.slide_ids):
            label = int(table.labels[row])
            values = probabilities[row]
            named = [table.classes[label] if label >= 0 else "", table.classes[values.argmax()]]
            facts = [slide_id, table.groups[row], table.splits[row], *named]
            writer.writerow([*facts, *(f"{value:.6g}" for value in values)])
    os.replace(beside, path)


def draw_attention(
    slide_path: str | Path, bag_path: str | Path, attention: Float[np.ndarray, " N"], out: Path
) -> None:
    """Writes the picture of a slide with the attention that its tiles got.

    Raises:
      InputError: the bag does not state the size of its tiles.
    """
    bag = read_bag(bag_path)
    if "span" not in bag.attributes:
        raise InputError(f"{bag_path} does not state the pixels of level 0 along a tile (span)")
    span = float(bag.attributes["span"])
    with Slide(slide_path) as slide:
        thumbnail, (width, height) = slide.thumbnail(PICTURE_SIDE), slide.size
    heat = heat_map(bag.coords, attention, (width, height), span)
    rows, columns = heat.shape
    covered = (width / (columns * span), height / (rows * span))
    draw_heat_map(thumbnail, heat, out, covered=covered)


def classify(
    table: SlideTable,
    model: VisionModel,
    workdir: str | Path,
    tiling: Tiling = Tiling(),
    *,
    pictures: Sequence[str] = ("val", "test"),
    batch_size: int = 64,
    threads: int | None = None,
    redo: bool = False,
    **training: Any,
) -> Classified:
    """Trains a model of a table's slides and predicts each of them.

    Writes under workdir: `bags/SLIDE_ID.h5`, `model.npz`, `predictions.csv` and
    `attention/SLIDE_ID.png`. Run again, it keeps the bags that it finds.

    Args:
      pictures: splits whose slides are drawn.
      batch_size, threads, redo: of `vitjax.medical.slides.bags.extract`.
      training: options of `vitjax.medical.slides.fit.fit`.

    Raises:
      InputError: the table has no training slides, a group is in two splits, or what `extract` and
        `fit` refuse.
    """
    for split in pictures:
        if split not in SPLITS:
            raise InputError(f"no pictures of split {split!r}; {suggest(split, SPLITS)}")
    if not len(table.rows("train")):
        raise InputError(f"{table.name} has no slide in split 'train'")
    table.check_groups()
    folder = Path(workdir)
    made = extract(
        table, model, folder / "bags", tiling, batch_size=batch_size, threads=threads, redo=redo
    )
    left_out = tuple(name for name in table.slide_ids if name not in made)
    table = table.chosen([i for i, name in enumerate(table.slide_ids) if name in made])
    paths = [made[name] for name in table.slide_ids]
    result = fit(paths, table.labels, table.splits, classes=table.classes, **training)
    result.model.save(folder / "model.npz")
    write_predictions(folder / "predictions.csv", table, result.probabilities)
    drawn: dict[str, Path] = {}
    (folder / "attention").mkdir(exist_ok=True)
    for row, name in enumerate(table.slide_ids):
        if table.splits[row] not in pictures:
            continue
        out = folder / "attention" / f"{name}.png"
        try:
            draw_attention(table.paths[row], paths[row], result.attention[row], out)
        except UnreadableImage as error:
            log.warning("no picture: %s", error)
            continue
        drawn[name] = out
    return Classified(
        slide_ids=table.slide_ids,
        classes=table.classes,
        labels=table.labels,
        probabilities=result.probabilities,
        splits=table.splits,
        groups=table.groups,
        group_kind=table.group_kind,
        left_out=left_out,
        result=result,
        bags=tuple(paths),
        predictions=folder / "predictions.csv",
        pictures=drawn,
    )
