"""`vitjax explain`: shows which parts of an image a prediction rests on."""

import argparse
import csv
import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vitjax import cli, inference
from vitjax.data.contact_sheet import draw_sheet
from vitjax.data.images import read_file, size_of
from vitjax.errors import InputError, UnreadableImage
from vitjax.explain import sanity
from vitjax.explain.explainer import BATCH_SIZE, Explainer, check_method, class_names, find_class
from vitjax.explain.overlay import blend, draw_overlay
from vitjax.explain.placement import seen_region, spread
from vitjax.explain.scores import find_masks, read_mask, score_mask
from vitjax.predict import list_images
from vitjax.progress import logging_to

log = logging.getLogger("vitjax")
COLUMNS = [
    "image", "class", "probability", "method", "class_specific", "overlay", "map", "deletion_auc",
    "insertion_auc", "pointing_hit", "iou", "mass_in_mask", "mask_area",
]  # fmt: skip
MEANS = COLUMNS[COLUMNS.index("deletion_auc") :]
ON_SHEET, SHEET_COLUMNS = 16, 4
MOST_CHECKED = 64  # maps that --sanity compares


@dataclasses.dataclass
class Picture:
    """An image file, as read and at the model's size.

    Attributes:
      name: of its overlay and map, without a suffix; unique in the run.
    """

    path: Path
    name: str
    mask: Path | None
    pixels: np.ndarray
    fitted: np.ndarray


@dataclasses.dataclass
class Output:
    """What is written, and what the last pictures are drawn from."""

    folder: Path
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sheet: list[tuple[np.ndarray, list[str]]] = dataclasses.field(default_factory=list)
    fitted: list[np.ndarray] = dataclasses.field(default_factory=list)
    targets: list[int] = dataclasses.field(default_factory=list)
    maps: list[np.ndarray] = dataclasses.field(default_factory=list)


def _check_out(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"--out={out} must be a new or an empty folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"the folder of --out={out} does not exist")


def _names(root: Path, files: list[Path]) -> list[str]:
    """A name for each file's results, from its place in the folder; the same never twice."""
    names, taken = [], set()
    for file in files:
        relative = file.relative_to(root) if root.is_dir() else Path(file.name)
        name = "__".join(relative.with_suffix("").parts)
        if name in taken:
            name = "__".join(relative.parts).replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _check_masks(files: list[Path], masks: list[Path]) -> None:
    for file, mask in zip(files, masks, strict=True):
        try:
            read_mask(mask, *size_of(file.read_bytes()))
        except UnreadableImage:  # the image itself: it will be left out
            continue


def _pictures(
    model: inference.VisionModel, files: list[Path], names: list[str], masks: list[Path] | None
) -> Iterator[Picture]:
    """Those that can be read; the others are named and left out."""
    for index, (path, name) in enumerate(zip(files, names, strict=True)):
        try:
            pixels = read_file(path, model.preprocess.channels)
        except InputError as error:
            if len(files) == 1:
                raise
            log.warning("left out: %s", error)
            continue
        mask = None if masks is None else masks[index]
        yield Picture(path, name, mask, pixels, model.preprocess.fit(pixels))


def _batches(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    batch: list[Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _choose(explainer: Explainer, row: np.ndarray, wanted: int | None) -> list[int]:
    """The classes to explain: the one asked for, or the top; of labels all above one half."""
    if wanted is not None:
        return [wanted]
    above = np.flatnonzero(row > 0.5).tolist() if explainer.is_multi_label else []
    return above or [int(row.argmax())]


def _title(explainer: Explainer, method: str, name: str, probability: float) -> str:
    if explainer.method.is_class_specific:
        return f"{method} for {name}, probability {probability:.3g}"
    return f"{method}: not class-specific\nbeside it: {name}, probability {probability:.3g}"


def _blank(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _explain_batch(
    explainer: Explainer, method: str, batch: list[Picture], wanted: int | None, output: Output
) -> None:
    """Maps, scores and files of a batch of images."""
    names = class_names(explainer.vision)
    fitted = np.stack([picture.fitted for picture in batch])
    probabilities = explainer.probabilities(fitted)
    chosen = [_choose(explainer, row, wanted) for row in probabilities]
    pairs = [(i, c) for i, classes in enumerate(chosen) for c in classes]
    images = fitted[[i for i, _ in pairs]]
    targets = np.array([c for _, c in pairs])
    maps = explainer.maps(images, targets)
    deletion, insertion = explainer.faithfulness(images, targets, maps)
    for folder in ("overlays", "maps"):
        (output.folder / folder).mkdir(parents=True, exist_ok=True)
    for number, (i, c) in enumerate(pairs):
        picture, heat, probability = batch[i], maps[number], float(probabilities[i, c])
        name = picture.name if len(chosen[i]) == 1 else f"{picture.name}.{c}"
        height, width = picture.pixels.shape[:2]
        region = seen_region(explainer.vision.preprocess, height, width)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"image": str(picture.path), "class": names[c], "method": method}
        row |= {"probability": f"{probability:.6g}", "overlay": f"overlays/{name}.png"}
        row |= {"map": f"maps/{name}.npy", "deletion_auc": _blank(float(deletion[number]))}
        row["insertion_auc"] = _blank(float(insertion[number]))
        row["class_specific"] = "yes" if explainer.method.is_class_specific else "no"
        mask = None
        if picture.mask is not None:
            mask = read_mask(picture.mask, height, width)
            score = score_mask(spread(heat, height, width, region), mask)
            if score is not None:
                row |= {"pointing_hit": int(score.is_hit), "iou": _blank(score.iou)}
                row |= {"mass_in_mask": _blank(score.mass), "mask_area": _blank(score.area)}
        title = _title(explainer, method, names[c], probability)
        drawn = draw_overlay(
            picture.pixels, heat, title=title, unit=explainer.method.unit, region=region, mask=mask
        )
        (output.folder / row["overlay"]).write_bytes(drawn)
        np.save(output.folder / row["map"], heat)
        output.rows.append(row)
        if len(output.rows) <= ON_SHEET:
            under = [picture.path.name, f"{names[c]} {probability:.3g}"]
            output.sheet.append((picture.pixels, under))
            output.sheet.append((blend(picture.pixels, heat, region), [method]))
        if len(output.maps) < MOST_CHECKED:
            output.fitted.append(picture.fitted)
            output.targets.append(c)
            output.maps.append(heat)


def _check_sanity(explainer: Explainer, method: str, output: Output, console: Console) -> None:
    """sanity.json, sanity.png, a table, and a warning where the maps do not depend on learning."""
    images, targets, maps = (np.stack(x) for x in (output.fitted, output.targets, output.maps))
    found = sanity.check(explainer, images, targets, maps)
    total = sanity.num_stages(explainer.params)
    stages = list(track(found, "randomising", total, transient=True, console=console))
    written = sanity.as_table(method, stages)
    (output.folder / "sanity.json").write_text(json.dumps(written, indent=2) + "\n")
    (output.folder / "sanity.png").write_bytes(sanity.draw(method, maps[0], stages))
    table = Table("randomised down to", "Spearman", "80% of maps", title=f"sanity of {method}")
    for row in written["stages"]:
        low, mean, high = (row[f"spearman_{k}"] for k in ("low", "mean", "high"))
        shown = ("", "") if mean is None else (f"{mean:.2f}", f"{low:.2f} to {high:.2f}")
        table.add_row(row["randomised_down_to"], *shown)
    console.print(table)
    if written["warning"]:
        log.warning("%s", written["warning"])


def explain_files(
    checkpoint: str,
    images: str,
    method: str,
    out: str,
    *,
    wanted: str | None = None,
    masks: str | None = None,
    with_sanity: bool = False,
    batch_size: int = BATCH_SIZE,
    window: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Writes overlays, maps, a sheet of the first, and explain.csv.

    Args:
      wanted: a class by name or index; None: the top class, of labels all above one half.
      window: of occlusion, in cells of the grid.

    Returns:
      The rows of the CSV.
    """
    check_method(method)
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    if window is not None and (window < 1 or method != "occlusion"):
        raise InputError(
            f"--window={window} must be at least 1, and is for --method=occlusion only"
        )
    if images.lower().endswith(".npz"):
        raise InputError(
            f"--images={images} must be an image file or a folder; for arrays of an npz call "
            "vitjax.explain.explain from Python"
        )
    root, folder = Path(images), Path(out)
    files = list_images(root)
    _check_out(folder)
    names, found = _names(root, files), None
    if masks is not None:
        relative = [f.relative_to(root) if root.is_dir() else Path(f.name) for f in files]
        found = find_masks(Path(masks), relative)
        _check_masks(files, found)
    model = inference.load(checkpoint)
    options = {} if window is None else {"window": window}
    explainer = Explainer(model, method, batch_size=batch_size, **options)
    target = None if wanted is None else find_class(model, wanted)
    output, console = Output(folder), console or Console(stderr=True)
    batches = _batches(_pictures(model, files, names, found), batch_size)
    total = math.ceil(len(files) / batch_size)
    for batch in track(batches, "explaining", total, transient=True, console=console):
        _explain_batch(explainer, method, batch, target, output)
    if not output.rows:
        raise InputError(f"none of the {len(files)} images of {images} can be read")
    with (folder / "explain.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(output.rows)
    across = 2 * SHEET_COLUMNS
    rows = [output.sheet[i : i + across] for i in range(0, len(output.sheet), across)]
    (folder / "overview.png").write_bytes(draw_sheet(rows))
    if with_sanity:
        _check_sanity(explainer, method, output, console)
    return output.rows


def summary(rows: list[dict[str, Any]]) -> str:
    """The scores' means, in words."""
    parts = []
    for column in MEANS:
        values = [float(row[column]) for row in rows if row[column] != ""]
        if values:
            parts.append(f"{column} {np.mean(values):.3f}")
    return ", ".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax explain",
        description=__doc__,
        epilog="example: vitjax explain --checkpoint=runs/quickstart --images=photos "
        "--method=relevance --out=explained",
    )
    parser.add_argument("--checkpoint", required=True, help="a run, a step, or an exported folder")
    parser.add_argument("--images", required=True, help="a folder, an image or a DICOM file")
    parser.add_argument(
        "--method", default="relevance", help="rollout, relevance (default), gradcam or occlusion"
    )
    parser.add_argument("--out", required=True, help="the new folder to write")
    parser.add_argument(
        "--class", dest="wanted",
        help="the class to explain, by name or index (default: the top one; with a multi-label "
        "head all above one half)",
    )  # fmt: skip
    parser.add_argument(
        "--masks", help="a folder of masks, named as the images (PNG or TIFF, not 0 = lesion)"
    )
    parser.add_argument(
        "--sanity", action="store_true", help="compare with a model that has learned nothing"
    )
    parser.add_argument("--window", type=int, help="of occlusion, in patches (default: 2)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=BATCH_SIZE)
    given, assignments = cli.parse(parser, argv)
    if assignments:
        raise InputError("vitjax explain takes no --config options")
    with logging_to(None) as console:
        rows = explain_files(
            given.checkpoint, given.images, given.method, given.out, wanted=given.wanted,
            masks=given.masks, with_sanity=given.sanity, batch_size=given.batch_size,
            window=given.window, console=console,
        )  # fmt: skip
        log.info("%d maps: %s; mean %s", len(rows), given.out, summary(rows))
    return 0
