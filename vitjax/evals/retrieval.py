"""Finding the text of an image and the image of a text, among all of a set.

Array letters: I images, T texts, D embedding, b and t a block of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vitjax.data.loader import Loader
from vitjax.data.sources import ask
from vitjax.errors import InputError
from vitjax.evals.towers import Towers
from vitjax.parallel import batch_shards, process_rows, replicated, to_global, to_host

KS = (1, 5, 10)
FAR = np.iinfo(np.int32).max


class Ranks:
    """How many wrong texts are nearer than the best right one, and likewise images.

    Exact, and in blocks: images lie spread over the devices, and no more than `[b, t]` numbers
    exist at a time. Of equally near ones the first in order comes first.

    Args:
      mesh: where it runs.
      block: images and texts that are compared at a time; rounded up to what the devices divide.
    """

    def __init__(self, mesh: Mesh, block: int = 1024):
        shards = batch_shards(mesh)
        self._block, self._mesh = -(-block // shards) * shards, mesh

        def compare(images, owners):
            logits = jnp.matmul(images["z"], owners["z"].T, precision=jax.lax.Precision.HIGHEST)
            is_valid = (images["id"][:, None] >= 0) & (owners["image"][None] >= 0)
            is_own = is_valid & (images["id"][:, None] == owners["image"][None])
            # Own ones are left out: in another program they may be rounded another way.
            return logits, is_valid & ~is_own, is_own

        def best(images, texts):
            logits, _, is_own = compare(images, texts)
            near = jnp.where(is_own, logits, -jnp.inf)
            place = jnp.where(near == near.max(1, keepdims=True), texts["id"][None], FAR).min(1)
            return near.max(1), place, near.max(0)

        def before(images, texts):
            logits, is_wrong, _ = compare(images, texts)
            ahead = logits > images["best"][:, None]
            tie = logits == images["best"][:, None]
            tie &= texts["id"][None] < images["place"][:, None]
            of_images = (is_wrong & (ahead | tie)).sum(1)
            ahead = logits > texts["best"][None]
            tie = logits == texts["best"][None]
            tie &= images["id"][:, None] < texts["image"][None]
            return of_images, (is_wrong & (ahead | tie)).sum(0)

        whole = replicated(mesh)
        self._best = jax.jit(best, out_shardings=whole)
        self._before = jax.jit(before, out_shardings=whole)

    def _blocks(self, values: dict[str, np.ndarray]) -> Any:
        """The start of each block, and its rows, padded with ids of -1."""
        total = len(values["z"])
        for start in range(0, total, self._block):
            rows = np.arange(start, start + self._block)
            part = {k: x[np.minimum(rows, total - 1)] for k, x in values.items()}
            for name in ("id", "image"):
                if name in part:
                    part[name] = np.where(rows < total, part[name], -1)
            yield start, part

    def _spread(self, part: dict[str, np.ndarray]) -> Any:
        mine = process_rows(self._mesh, self._block)
        return to_global({k: x[mine] for k, x in part.items()}, self._mesh, self._block)

    def __call__(
        self,
        images: Float[np.ndarray, "I D"],
        texts: Float[np.ndarray, "T D"],
        owners: Int[np.ndarray, "T"],
    ) -> tuple[Int[np.ndarray, "I"], Int[np.ndarray, "T"]]:
        """Ranks from 0 of each image's best text among texts, and of each text's image.

        Args:
          images, texts: float32.
          owners: the image of each text; every image has at least one.
        """
        num_images, num_texts = len(images), len(texts)
        left = {"z": images, "id": np.arange(num_images, dtype=np.int32)}
        left["best"] = np.full(num_images, -np.inf, np.float32)
        left["place"] = np.full(num_images, FAR, np.int32)
        right = {"z": texts, "id": np.arange(num_texts, dtype=np.int32)}
        right["image"] = owners.astype(np.int32)
        right["best"] = np.full(num_texts, -np.inf, np.float32)
        for i, some_images in self._blocks({k: left[k] for k in ("z", "id")}):
            spread, here = self._spread(some_images), slice(i, i + self._block)
            for j, some_texts in self._blocks({k: right[k] for k in ("z", "id", "image")}):
                near, place, of_texts = to_host(self._best(spread, some_texts))
                count = len(left["best"][here])
                old, near, place = left["best"][here], near[:count], place[:count]
                old_place = left["place"][here]
                left["place"][here] = np.where(
                    near > old,
                    place,
                    np.where(near == old, np.minimum(place, old_place), old_place),
                )
                left["best"][here] = np.maximum(old, near)
                there = slice(j, j + self._block)
                old = right["best"][there]
                right["best"][there] = np.maximum(old, of_texts[: len(old)])
        of_images = np.zeros(num_images, np.int64)
        of_texts = np.zeros(num_texts, np.int64)
        for i, some_images in self._blocks(left):
            spread, here = self._spread(some_images), slice(i, i + self._block)
            for j, some_texts in self._blocks(right):
                first, second = to_host(self._before(spread, some_texts))
                there = slice(j, j + self._block)
                of_images[here] += first[: len(of_images[here])]
                of_texts[there] += second[: len(of_texts[there])]
        return of_images, of_texts


class Retrieval:
    """Recall at 1, 5 and 10, from image to text and from text to image.

    An image counts as found if one of its captions is among the k nearest texts of the whole set,
    a text if its image is among the k nearest images. The numbers depend on how large the set is.

    Args:
      objective, loader, mesh, batch_size: see `Towers`; the source tells `all_captions()`.
      block: see Ranks.

    Raises:
      InputError: the source does not tell its captions.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        block: int = 1024,
    ):
        captions = ask(loader.source, "all_captions")
        if captions is None:
            raise InputError(
                f"retrieval needs a source that tells all its captions; "
                f"{type(loader.source).__name__} does not"
            )
        if block < 1:
            raise InputError(f"the retrieval's block must be at least 1, got {block}")
        self._captions = captions
        self._towers = Towers(objective, loader, mesh, batch_size)
        self._ranks = Ranks(mesh, block)

    def __call__(self, state: Any) -> dict[str, float]:
        """Runs over the whole set; images that cannot be read are left out with their texts."""
        images, _, is_read = self._towers.images(state.eval_params)
        kept = np.flatnonzero(is_read)
        captions = [self._captions[i] for i in kept]
        owners = np.repeat(np.arange(len(kept)), [len(own) for own in captions])
        all_texts = [text for own in captions for text in own]
        if not all_texts:
            raise InputError("the retrieval has no image that can be read")
        texts = self._towers.texts(state.eval_params, all_texts)
        of_images, of_texts = self._ranks(images[kept], texts, owners)
        found: dict[str, float] = {}
        for name, ranks in (("image_to_text", of_images), ("text_to_image", of_texts)):
            found |= {f"{name}_recall_{k}": float((ranks < k).mean()) for k in KS}
        return found | {"examples": len(kept), "texts": len(all_texts)}
