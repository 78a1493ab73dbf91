"""Outlines of lesions, as ASAP writes them in XML, and what lies in them."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from vitjax.errors import InputError

Polygon = Float[np.ndarray, "K 2"]
HOLES = ("_2", "exclusion", "none", "normal")  # groups of what is cut out of a lesion
CHUNK = 2**22  # crossings that are tested at once


def in_polygon(points: Real[np.ndarray, "P 2"], polygon: Polygon) -> Bool[np.ndarray, " P"]:
    """Which points lie inside: a ray to the right crosses the outline an odd number of times."""
    low, high = polygon.min(0), polygon.max(0)
    inside = np.zeros(len(points), bool)
    near = np.flatnonzero(((points >= low[None]) & (points <= high[None])).all(1))
    start, end = polygon, np.roll(polygon, -1, 0)
    step = np.where(end[:, 1] == start[:, 1], 1.0, end[:, 1] - start[:, 1])
    for first in range(0, len(near), max(1, CHUNK // len(polygon))):
        rows = near[first : first + max(1, CHUNK // len(polygon))]
        x, y = points[rows, 0][:, None], points[rows, 1][:, None]
        spans = (start[None, :, 1] > y) != (end[None, :, 1] > y)
        share = (y - start[None, :, 1]) / step[None]
        crossing = start[None, :, 0] + share * (end - start)[None, :, 0]
        inside[rows] = (spans & (x < crossing)).sum(1) % 2 == 1
    return inside


@dataclasses.dataclass(frozen=True)
class Lesions:
    """The annotated lesions of a slide.

    Attributes:
      outlines: of each lesion, in pixels of level 0; the last corner is joined to the first.
      holes: what is cut out of them.
    """

    outlines: tuple[Polygon, ...]
    holes: tuple[Polygon, ...] = ()

    def __len__(self) -> int:
        return len(self.outlines)

    def __iter__(self) -> Iterator[Polygon]:
        return iter(self.outlines)

    def which(self, points: Real[np.ndarray, "P 2"]) -> Int[np.ndarray, " P"]:
        """The number of the lesion that each point lies in, the first of several; -1 for none."""
        found = np.full(len(points), -1, np.int64)
        for number, outline in enumerate(self.outlines):
            found[(found < 0) & in_polygon(points, outline)] = number
        for hole in self.holes:
            found[in_polygon(points, hole)] = -1
        return found

    def contains(self, points: Real[np.ndarray, "P 2"]) -> Bool[np.ndarray, " P"]:
        """Which points lie in a lesion."""
        return self.which(points) >= 0

    def share(
        self, coords: Int[np.ndarray, "N 2"], span: float, samples: int = 8
    ) -> Float[np.ndarray, " N"]:
        """The part of each tile that is lesion, by samples x samples points of it.

        Args:
          coords, span: of `vitjax.medical.slides.tiles.Tiles`.
        """
        steps = (np.arange(samples) + 0.5) * span / samples
        inside = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
        shares = np.zeros(len(coords))
        for first in range(0, len(coords), 4096):
            part = coords[first : first + 4096, None].astype(np.float64) + inside[None]
            found = self.contains(part.reshape(-1, 2)).reshape(len(part), -1)
            shares[first : first + 4096] = found.mean(1)
        return shares


def lesions(path: str | Path) -> Lesions:
    """Reads an annotation file of ASAP's (CAMELYON16 and 17).

    Its groups "_0", "_1" and "Tumor" are lesions, "_2" and "Exclusion" what is cut out of them.

    Raises:
      InputError: no such file, not ASAP's XML, or an outline that is no polygon.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is no XML: {error}") from error
    if root.tag != "ASAP_Annotations":
        raise InputError(f"{path} is {root.tag!r}, not ASAP_Annotations")
    outlines: list[Polygon] = []
    holes: list[Polygon] = []
    for annotation in root.iter("Annotation"):
        corners = annotation.findall("./Coordinates/Coordinate")
        name = annotation.get("Name", "")
        try:
            ordered = sorted(corners, key=lambda corner: float(corner.attrib["Order"]))
            points = [(float(c.attrib["X"]), float(c.attrib["Y"])) for c in ordered]
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: a corner of {name!r} lacks a number: {error}") from error
        if len(points) < 3:
            if annotation.get("Type") in ("Dot", "PointSet", "Measurement"):
                continue
            raise InputError(f"{path}: {name!r} has {len(points)} corners; 3 are the least")
        is_hole = annotation.get("PartOfGroup", "").lower() in HOLES
        (holes if is_hole else outlines).append(np.array(points))
    return Lesions(tuple(outlines), tuple(holes))
