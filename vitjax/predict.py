"""`vitjax predict`: classifies a folder or a file of images into a CSV."""

import argparse
import csv
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from rich.progress import track

from vitjax import cli, inference
from vitjax.data.images import EXTENSIONS, UnreadableImage, decode, read_file
from vitjax.errors import InputError, suggest
from vitjax.progress import logging_to

log = logging.getLogger("vitjax")
READABLE = EXTENSIONS


def list_images(path: Path) -> list[Path]:
    """The image files of a folder, at any depth and in order, or the one file."""
    if path.is_dir():
        files = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(READABLE)
        )
        if not files:
            raise InputError(f"{path} holds no images; readable are {', '.join(READABLE)}")
        return files
    if not path.is_file():
        raise InputError(f"no such file or folder: {path}")
    if not path.name.lower().endswith(READABLE):
        raise InputError(f"{path} is no image; {suggest(path.suffix, (*READABLE, '.npz'))}")
    return [path]


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = [k for k in file.files if k == "images" or k.endswith("_images")]
            if len(keys) != 1 and "test_images" not in keys:
                raise InputError(
                    f"{path} must hold one array of images ('images', or 'test_images' among "
                    f"splits); it has {file.files}"
                )
            key = keys[0] if len(keys) == 1 else "test_images"
            images = file[key]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path} as npz: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(f"{path}: {key} must be uint8 [N, Y, X] or [N, Y, X, C]")
    return [f"{key}[{i}]" for i in range(len(images))], images


def _fitted(
    model: inference.VisionModel, names: list[str], arrays: np.ndarray | None, batch_size: int
) -> Iterator[tuple[list[str], UInt8[np.ndarray, "B S S C"]]]:
    """Batches of readable images at the model's size; unreadable ones are named and left out."""
    kept: list[str] = []
    images: list[np.ndarray] = []
    for index, name in enumerate(names):
        try:
            if arrays is None:
                image = read_file(Path(name), model.preprocess.channels)
            else:
                image = decode(arrays[index], model.preprocess.channels)
        except (InputError, UnreadableImage) as error:
            if len(names) == 1:
                raise InputError(str(error)) from error
            log.warning("left out: %s", error)
            continue
        kept.append(name)
        images.append(model.preprocess.fit(image))
        if len(images) == batch_size:
            yield kept, np.stack(images)
            kept, images = [], []
    if images:
        yield kept, np.stack(images)


def predict(checkpoint: str, images: str, out: str, *, batch_size: int = 64) -> int:
    """Writes one row an image: its name, the top class, and the probability of every class.

    Probabilities are softmax over classes, or sigmoids for a model trained with them.

    Returns:
      How many images were classified; the others are named in the log.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}")
    path, arrays = Path(images), None
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        names, arrays = _read_npz(path)
    else:
        names = [str(p) for p in list_images(path)]
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"the folder of --out={out} does not exist")
    model = inference.load(checkpoint)
    classes = list(model.class_names or ())
    classes += [str(i) for i in range(len(classes), model.config["num_classes"])]
    squash = jax.nn.sigmoid if model.loss_type == "sigmoid" else jax.nn.softmax
    beside = Path(f"{out}.tmp")
    try:
        count = 0
        with beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "prediction", "probability", *(f"p_{c}" for c in classes)])
            batches = _fitted(model, names, arrays, batch_size)
            total = -(-len(names) // batch_size)
            for kept, part in track(batches, "predicting", total, transient=True):
                padded = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)))
                rows = np.asarray(squash(model.logits(padded)))[: len(part)]
                for name, row in zip(kept, rows, strict=True):
                    top = int(row.argmax())
                    values = [f"{value:.6g}" for value in (row[top], *row)]
                    writer.writerow([name, classes[top], *values])
                count += len(kept)
        if not count:
            raise InputError(f"none of the {len(names)} images of {images} can be read")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return count


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax predict",
        description=__doc__,
        epilog="example: vitjax predict --checkpoint=runs/quickstart --images=photos "
        "--out=predictions.csv",
    )
    parser.add_argument("--checkpoint", required=True, help="a run, a step, or an exported folder")
    parser.add_argument(
        "--images", required=True, help="a folder, an image, an npz or a DICOM file"
    )
    parser.add_argument("--out", required=True, help="the CSV to write")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments, assignments = cli.parse(parser, argv)
    if assignments:
        raise InputError("vitjax predict takes no --config options")
    with logging_to(None):
        count = predict(
            arguments.checkpoint, arguments.images, arguments.out, batch_size=arguments.batch_size
        )
        log.info("%d images classified: %s", count, arguments.out)
    return 0
