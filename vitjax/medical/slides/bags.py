"""Bags: the features of a slide's tiles in one HDF5 file, and making them from slides.

The layout is the one that pathology tools share: `features` [N, D] and `coords` [N, 2] in pixels of
level 0. What made them is written as attributes: the hash of the weights, and how tiles were cut.
"""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.progress import track

from vitjax import lock
from vitjax.errors import InputError, UnreadableImage
from vitjax.fingerprint import fingerprint
from vitjax.inference import VisionModel
from vitjax.medical.slides.slide import Slide, extra
from vitjax.medical.slides.table import SlideTable
from vitjax.medical.slides.tiles import Tiles, grid, stream
from vitjax.medical.slides.tissue import tissue_mask

log = logging.getLogger("vitjax")
MASK_SIDE = 2048  # pixels of the longer side of the picture that tissue is looked for in


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How slides are cut; see `vitjax.medical.slides.tiles.grid`."""

    tile_size: int = 224
    microns_per_pixel: float | None = 0.5
    level: int | None = None
    overlap: int = 0
    min_tissue: float = 0.5
    tissue: str = "otsu"

    def cut(self, slide: Slide) -> Tiles:
        """The tiles of a slide's tissue."""
        options = dataclasses.asdict(self)
        mask = tissue_mask(slide.thumbnail(MASK_SIDE), options.pop("tissue"))
        return grid(slide, mask, **options)


@dataclasses.dataclass(frozen=True)
class Bag:
    """The tiles of one slide as a model sees them.

    Attributes:
      features: one row a tile.
      coords: x and y of each tile's upper left corner, in pixels of level 0.
      attributes: of the file: `weights` (hash), `settings` (JSON of the tiling), `span` (pixels of
        level 0 along a tile), `slide_size`, `tile_size`, `microns_per_pixel` (NaN if not stated).
    """

    features: Float[np.ndarray, "N D"]
    coords: Int[np.ndarray, "N 2"]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


def model_hash(model: VisionModel) -> str:
    """Sixteen hexadecimal digits of weights, architecture and preprocessing together."""
    facts = {
        "params": fingerprint(model.params),
        "model": model.config,
        "preprocess": dataclasses.asdict(model.preprocess),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_bag(path: str | Path, bag: Bag) -> None:
    """Writes a bag under a temporary name and renames it: what has the name is whole."""
    h5py = extra("h5py", "a bag of features")
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with h5py.File(beside, "w") as file:
            file["features"], file["coords"] = bag.features, bag.coords
            for name, value in bag.attributes.items():
                file.attrs[name] = value
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _attributes(file: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    return {name: plain(value) for name, value in file.attrs.items()}


def bag_attributes(path: str | Path) -> dict[str, Any] | None:
    """What a bag says of itself, or None if the file cannot be read."""
    h5py = extra("h5py", "a bag of features")
    try:
        with h5py.File(path, "r") as file:
            return _attributes(file) if {"features", "coords"} <= set(file) else None
    except (OSError, RuntimeError, KeyError):
        return None


def read_bag(path: str | Path, *, weights: str | None = None) -> Bag:
    """Reads a bag, of ours or another tool's.

    Args:
      weights: the hash that it must have been made with (`model_hash`).

    Raises:
      InputError: no such file, no bag, or one of other weights.
    """
    h5py = extra("h5py", "a bag of features")
    if not Path(path).is_file():
        raise InputError(f"no such bag: {path}")
    try:
        with h5py.File(path, "r") as file:
            lacking = [name for name in ("features", "coords") if name not in file]
            if lacking:
                raise InputError(f"{path} has no {lacking[0]!r}; it holds {', '.join(file)}")
            features, coords = np.asarray(file["features"]), np.asarray(file["coords"])
            attributes = _attributes(file)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no HDF5 file: {error}") from error
    if features.ndim == 3 and features.shape[0] == 1:  # some tools keep a batch of one
        features = features[0]
    coords = coords.reshape(-1, 2)
    if features.ndim != 2 or len(features) != len(coords):
        raise InputError(f"{path}: features {features.shape} do not fit coords {coords.shape}")
    found = attributes.get("weights")
    if weights is not None and found != weights:
        raise InputError(f"{path} was made with weights {found or '(not stated)'}, not {weights}")
    return Bag(features.astype(np.float32), coords.astype(np.int64), attributes)


def bag_of(
    slide: Slide,
    model: VisionModel,
    tiling: Tiling = Tiling(),
    *,
    batch_size: int = 64,
    threads: int | None = None,
    weights: str | None = None,
) -> Bag:
    """Cuts a slide and embeds its tiles; a batch is decoded while the device has the last one.

    Args:
      weights: the model's hash, if it is known already.

    Returns:
      The bag, with no row if the slide shows no tissue.
    """
    tiles = tiling.cut(slide)
    parts: list[np.ndarray] = []
    running: tuple[Any, int] | None = None
    for _, images in stream(slide, tiles, batch_size, threads=threads):
        if model.preprocess.channels == 1:
            images = np.rint(images.mean(-1, keepdims=True)).astype(np.uint8)
        count = len(images)
        padded = np.pad(images, ((0, batch_size - count), (0, 0), (0, 0), (0, 0)))
        started = model.embed(padded), count
        if running is not None:
            parts.append(np.asarray(running[0], np.float32)[: running[1]])
        running = started
    if running is not None:
        parts.append(np.asarray(running[0], np.float32)[: running[1]])
    features = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    attributes = {
        "weights": weights or model_hash(model),
        "settings": json.dumps(dataclasses.asdict(tiling), sort_keys=True),
        "tile_size": tiling.tile_size,
        "microns_per_pixel": float(tiles.microns_per_pixel or np.nan),
        "level": tiles.level,
        "span": tiles.span,
        "slide_size": np.array(slide.size, np.int64),
    }
    return Bag(features, tiles.coords, attributes)


def _is_made(path: Path, weights: str, settings: str, redo: bool) -> bool:
    """Whether a whole bag of these weights and settings lies there.

    Raises:
      InputError: it is of others, and is not to be made again.
    """
    if not path.is_file():
        return False
    found = bag_attributes(path)
    if found is None:
        log.warning("%s cannot be read and is made again", path)
        return False
    if found.get("weights") == weights and found.get("settings") == settings:
        return True
    if found.get("weights") != weights:
        was = f"weights {found.get('weights', '(not stated)')}, not {weights}"
    else:
        was = f"tiles {found.get('settings', '(not stated)')}, not {settings}"
    if redo:
        log.info("%s was made with %s: made again", path, was)
        return False
    raise InputError(f"{path} was made with {was}; choose another folder, or redo=True")


def extract(
    table: SlideTable,
    model: VisionModel,
    out_folder: str | Path,
    tiling: Tiling = Tiling(),
    *,
    batch_size: int = 64,
    threads: int | None = None,
    redo: bool = False,
) -> dict[str, Path]:
    """Makes a bag of each slide, `SLIDE_ID.h5`; those that are there already are kept.

    A slide that cannot be used (damaged, no tissue, not stating its microns per pixel) is named in
    the log and left out.

    Args:
      redo: make bags of other weights or tiles again, where they are refused otherwise.

    Returns:
      The bag of each slide that has one.

    Raises:
      InputError: bags of other weights lie there, another process works in the folder, or no
        slide can be used.
    """
    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock.take(folder / lock.NAME)
    if held is None:
        raise InputError(f"another process makes bags in {folder}; wait for it, or choose another")
    try:
        return _extract(table, model, folder, tiling, batch_size, threads, redo)
    finally:
        held.close()


def _extract(
    table: SlideTable,
    model: VisionModel,
    folder: Path,
    tiling: Tiling,
    batch_size: int,
    threads: int | None,
    redo: bool,
) -> dict[str, Path]:
    weights = model_hash(model)
    settings = json.dumps(dataclasses.asdict(tiling), sort_keys=True)
    targets = {name: folder / f"{name}.h5" for name in table.slide_ids}
    is_made = {name: _is_made(path, weights, settings, redo) for name, path in targets.items()}
    if any(is_made.values()):
        log.info("%d of %d bags are there already", sum(is_made.values()), len(is_made))
    made: dict[str, Path] = {}
    reasons: list[str] = []
    work = list(zip(table.slide_ids, table.paths, strict=True))
    for name, path in track(work, "embedding slides", transient=True):
        if not is_made[name]:
            options = {"batch_size": batch_size, "threads": threads, "weights": weights}
            try:
                with Slide(path) as slide:
                    bag = bag_of(slide, model, tiling, **options)
                if not len(bag):
                    raise UnreadableImage(f"no tissue on {path}")
            except (InputError, UnreadableImage) as error:
                reasons.append(str(error))
                log.warning("left out: %s", error)
                continue
            write_bag(targets[name], bag)
        made[name] = targets[name]
    if not made:
        count = f"none of the {len(work)} slides of {table.name} can be used: "
        raise InputError((count if len(work) > 1 else "") + reasons[0])
    return made
