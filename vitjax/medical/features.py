"""What a model says of a cohort's images: features and logits, computed once and kept."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.progress import track

from vitjax.data.loader import Loader
from vitjax.data.preprocess import to_unit
from vitjax.inference import VisionModel
from vitjax.medical.cohort import Cohort, CohortSource
from vitjax.parallel import (
    batch_shards,
    data_mesh,
    on_mesh,
    process_rows,
    replicated,
    to_global,
    to_host,
)

log = logging.getLogger("vitjax")
OUTPUTS = ("embedding", "logits")


def outputs(
    model: VisionModel,
    cohort: Cohort,
    rows: np.ndarray,
    *,
    inputs: Float[np.ndarray, "N M"] | None = None,
    batch_size: int = 256,
    num_threads: int | None = None,
    show: bool = True,
    augment: Callable[[jax.Array, dict], dict] | None = None,
    num_views: int = 1,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Features, and logits where the model has a head, of rows of a cohort, on all devices.

    Args:
      rows: of the cohort.
      inputs: `[N, M]` of the whole cohort, for a model that takes them.
      show: a progress bar.
      augment, num_views: with an augmentation of training, so many views of each image: as it is,
        and draws that depend on its row's place alone.

    Returns:
      float32 `embedding` and `logits` [R, D], with views [R, V, D]; NaN where an image cannot be
      read.
    """
    mesh = data_mesh()
    shards = batch_shards(mesh)
    size = -(-batch_size // shards) * shards
    source = CohortSource(cohort, rows, inputs)
    loader = Loader(source, model.preprocess, num_threads=num_threads)

    def run(params, batch, number):
        given = {"inputs": batch["inputs"]} if "inputs" in batch else {}
        images = to_unit(batch["images"])

        def seen(view):
            shown = images
            if augment is not None:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), view)
                drawn = augment(key, {"images": images})["images"]
                shown = jax.numpy.where(view == 0, images, drawn)
            out = model.model.apply(params, model.preprocess.normalise(shown), **given)
            return {k: out[k].astype(np.float32) for k in OUTPUTS if k in out}

        if augment is None:
            return seen(0) | {"m": batch["mask"]}
        found = jax.lax.map(seen, jax.numpy.arange(num_views))
        return {k: v.swapaxes(0, 1) for k, v in found.items()} | {"m": batch["mask"]}

    step = jax.jit(on_mesh(run, mesh), out_shardings=replicated(mesh))
    params = jax.device_put(model.params, replicated(mesh))
    found: list[dict[str, np.ndarray]] = []
    batches: Any = loader.eval_batches(size, rows=process_rows(mesh, size))
    if show:
        batches = track(batches, f"{cohort.name}: {len(rows):,} images", -(-len(rows) // size),
                        transient=True)  # fmt: skip
    for number, batch in enumerate(batches):
        batch = {k: v for k, v in batch.items() if k != "labels"}
        found.append(to_host(step(params, to_global(batch, mesh, size), np.int32(number))))
    loader.close()
    joined = {k: np.concatenate([f[k] for f in found])[: len(rows)] for k in found[0]}
    is_read = joined.pop("m")
    return {
        k: np.where(is_read.reshape(-1, *[1] * (v.ndim - 1)), v, np.nan) for k, v in joined.items()
    }


def cached_features(
    model: VisionModel, cohort: Cohort, folder: Path, **options: Any
) -> Float[np.ndarray, "N D"]:
    """The features of all images, from the folder if they were computed before.

    They are found again by a key of the weights, the model, its preprocessing, and the data.
    """
    key = hashlib.sha256(f"{weights_key(model)}:{data_key(cohort)}".encode()).hexdigest()[:20]
    path = folder / f"features-{key}.npy"
    if path.is_file():
        log.info("features from %s", path)
        return np.load(path, allow_pickle=False)
    rows = np.arange(len(cohort))
    found = outputs(model, cohort, rows, **options)["embedding"]
    folder.mkdir(parents=True, exist_ok=True)
    save(path, found)
    return found


def save(path: Path, array: np.ndarray) -> None:
    """Writes an npy file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.save(file, array)
    os.replace(file.name, path)


def weights_key(model: VisionModel) -> str:
    """A hash of the parameters, the model and its preprocessing."""
    digest = hashlib.sha256(repr((model.config, model.preprocess)).encode())
    for path, leaf in jax.tree.leaves_with_path(model.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def data_key(cohort: Cohort) -> str:
    """A hash of the ids, and of the sizes and times of the files that were read."""
    digest = hashlib.sha256("\n".join([cohort.name, *map(str, cohort.ids)]).encode())
    for path in _some(cohort.files):
        stat = Path(path).stat()
        digest.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _some(files: Sequence[str]) -> list[str]:
    return [path for path in files if Path(path).is_file()]
