"""Detections of lesions on slides: found by a model of bags, written, read, and scored by FROC."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from vitjax.errors import InputError
from vitjax.medical.metrics.camelyon import (
    FALSE_POSITIVE_RATES,
    SlideDetections,
    froc,
    froc_interval,
)
from vitjax.medical.slides.annotations import Lesions, lesions
from vitjax.medical.slides.bags import Bag
from vitjax.medical.slides.slide import Slide
from vitjax.medical.slides.table import SlideTable
from vitjax.medical.slides.trained import TrainedMil
from vitjax.telemetry import write_whole

RADIUS = 240.0  # micrometres: a detection stands for all tiles nearer than that
DOWNSAMPLE = 32  # pixels of level 0 in one of the evaluation's mask
GAP = 75.0  # micrometres: lesions nearer to each other than that are one
LARGEST_ITC = 275.0  # micrometres along the long axis, with the gap around it
CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found on a slide.

    Attributes:
      probabilities: falling.
      points: x and y in pixels of level 0.
    """

    probabilities: Float[np.ndarray, " D"]
    points: Float[np.ndarray, "D 2"]


def microns_per_pixel(bag: Bag) -> float:
    """Of level 0, as the bag states it; NaN if it does not."""
    found = bag.attributes
    scale = found.get("tile_size", np.nan) / found.get("span", np.nan)
    return float(found.get("microns_per_pixel", np.nan) * scale)


def detect(model: TrainedMil, bag: Bag, *, radius: float = RADIUS) -> Detections:
    """Tiles that alone look most like a lesion, each the highest within a radius.

    A tile is classified as a bag of one; its probability is that of all classes but the first.
    Then the highest is taken, those near it are left out, and so on (non-maximum suppression).

    Args:
      radius: in micrometres.

    Raises:
      InputError: the bag does not state its resolution.
    """
    scale = microns_per_pixel(bag)
    if not np.isfinite(scale):
        raise InputError("the bag does not state its microns per pixel")
    probabilities = 1 - model.of_each(bag.features)[:, 0]
    centres = bag.coords + bag.attributes["span"] / 2
    kept: list[int] = []
    for row in np.argsort(-probabilities, kind="stable").tolist():
        away = np.hypot(*(centres[kept] - centres[row][None]).T) if kept else np.array([np.inf])
        if away.min() * scale >= radius:
            kept.append(row)
    return Detections(probabilities[kept], centres[kept])


def write(path: str | Path, found: Detections) -> None:
    """Writes CAMELYON16's CSV: probability, x and y a row, no header."""
    rows = zip(found.probabilities.tolist(), *found.points.T.tolist(), strict=True)
    write_whole(Path(path), "".join(f"{p:.6g},{x:.1f},{y:.1f}\n" for p, x, y in rows))


def read(path: str | Path) -> Detections:
    """Reads CAMELYON16's CSV.

    Raises:
      InputError: no such file, or a row that is not three numbers.
    """
    rows: list[list[float]] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), 1):
                try:
                    values = [float(cell) for cell in row]
                except ValueError:
                    values = []
                if row and (len(values) != 3 or not np.isfinite(values).all()):
                    raise InputError(
                        f"{path}, line {number}: {','.join(row)!r} is not probability,x,y"
                    )
                rows += [values] if row else []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    table = np.array(rows, float).reshape(-1, 3)
    return Detections(table[:, 0], table[:, 1:])


def evaluation_mask(
    outlines: Lesions, slide_size: tuple[int, int], scale: float
) -> tuple[Int[np.ndarray, "Y X"], list[int]]:
    """CAMELYON16's mask of numbered lesions, and the numbers of isolated tumour cells.

    Lesions are grown by half of 75 micrometres, so that those nearer than that are one, and their
    holes are filled; one whose long axis (of the ellipse of equal second moments) is below 275
    micrometres, grown, is isolated tumour cells.

    Args:
      slide_size: width and height of level 0.
      scale: micrometres per pixel of level 0.

    Returns:
      A mask with a pixel for 32 of level 0; 0 is outside.
    """
    width, height = (-(-side // DOWNSAMPLE) for side in slide_size)
    mask = np.zeros((height, width), np.uint8)
    for polygons, value in ((outlines.outlines, 1), (outlines.holes, 0)):
        for polygon in polygons:
            cv2.fillPoly(mask, [np.floor(polygon / DOWNSAMPLE).astype(np.int32)], value)
    microns = scale * DOWNSAMPLE
    away = ndimage.distance_transform_edt(1 - mask) if mask.any() else np.full(mask.shape, np.inf)
    grown = ndimage.binary_fill_holes(np.asarray(away) * microns <= GAP / 2)
    labelled, count = ndimage.label(grown, np.ones((3, 3)))  # type: ignore
    places = ndimage.find_objects(labelled)
    itc = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(labelled[places[number - 1]] == number)
        if _long_axis(rows, columns) * microns < LARGEST_ITC:
            itc.append(number)
    return labelled, itc


def _long_axis(rows: np.ndarray, columns: np.ndarray) -> float:
    """Of the ellipse with the second moments of these pixels, each a unit square."""
    moments = np.cov(np.stack([rows, columns]).astype(float), bias=True) + np.eye(2) / 12
    return float(4 * np.sqrt(np.linalg.eigvalsh(moments)[-1]))


def score(
    table: SlideTable,
    found: Mapping[str, Detections],
    scales: Mapping[str, float],
    *,
    num_bootstraps: int = 2000,
    level: float = 0.95,
) -> dict[str, Any]:
    """The FROC of detections on a table's slides, as the report prints it.

    Slides of the first class have no lesion. One of another class without an annotation is left
    out, and so is one without a known label or detections.

    Args:
      table: with a column "annotation", the XML file of each slide or "".
      found: detections by slide id.
      scales: micrometres per pixel of level 0 by slide id.

    Returns:
      score (value, low, high), sensitivities, curve, slides, lesions, left_out; {} where no slide
      of these has an annotation.
    """
    slides: list[SlideDetections] = []
    left_out, is_annotated = [], False
    for row, name in enumerate(table.slide_ids):
        if name not in found:
            continue
        outlined = str(table.columns["annotation"][row])
        if table.labels[row] < 0 or (table.labels[row] > 0 and not outlined):
            left_out.append(name)
            continue
        p, points = found[name].probabilities, found[name].points
        if table.labels[row] == 0:
            slides.append(SlideDetections(p, points[:, 0], points[:, 1]))
            continue
        is_annotated = True
        with Slide(table.paths[row]) as slide:
            mask, itc = evaluation_mask(lesions(outlined), slide.size, scales[name])
        slides.append(
            SlideDetections(
                p, points[:, 0], points[:, 1], lesions=mask, itc=itc, downsample=DOWNSAMPLE
            )
        )
    if not is_annotated:
        return {}
    curve = froc(slides)
    interval = froc_interval(slides, num=num_bootstraps, level=level)
    shown = np.unique(np.linspace(0, len(curve.thresholds) - 1, CURVE_POINTS).astype(int))
    return {
        "score": {"value": interval.value, "low": interval.low, "high": interval.high},
        "sensitivities": _pairs(FALSE_POSITIVE_RATES, curve.sensitivities),
        "curve": _pairs(curve.false_positives[shown].tolist(), curve.sensitivity[shown].tolist()),
        "slides": curve.num_slides,
        "lesions": curve.num_lesions,
        "left_out": left_out,
        "radius": RADIUS,
    }


def _pairs(rates: Sequence[float], shares: Sequence[float]) -> list[dict[str, float]]:
    return [
        {"false_positives": rate, "sensitivity": share}
        for rate, share in zip(rates, shares, strict=True)
    ]
