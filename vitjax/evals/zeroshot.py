"""Classification by texts: the class whose name, in a few sentences, is nearest to the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from vitjax.data.loader import Loader
from vitjax.data.sources.pairs import PHOTO, check_templates, choose_names
from vitjax.errors import InputError
from vitjax.evals.towers import Towers

BLOCK = 4096  # images that are compared with the classes at a time


def ranks_of(
    images: Float[np.ndarray, "N D"],
    classes: Float[np.ndarray, "C D"],
    labels: Int[np.ndarray, "N"],
) -> Int[np.ndarray, "N"]:
    """How many classes come before the right one; of equal ones the first in order."""
    ranks = [np.zeros(0, np.int64)]
    order = np.arange(len(classes))[None]
    for start in range(0, len(images), BLOCK):
        logits = images[start : start + BLOCK] @ classes.T
        right = labels[start : start + BLOCK, None]
        own = np.take_along_axis(logits, right, axis=1)
        is_before = (logits > own) | ((logits == own) & (order < right))
        ranks.append(is_before.sum(1))
    return np.concatenate(ranks)


class ZeroShot:
    """The share of images whose class is the nearest text, or among the five nearest.

    A class is the mean of the embeddings of its name in all templates, made anew at each
    evaluation, and scaled to length one.

    Args:
      objective, loader, mesh, batch_size: see `Towers`; the loader's source has one label an
        example.
      templates: texts with one {} for the name.
      class_names: instead of the source's.

    Source: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 3.1.4, for the mean over
    templates.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        templates: Sequence[str] = PHOTO,
        class_names: Sequence[str] | None = None,
    ):
        if loader.max_labels is not None or getattr(loader.source, "num_targets", None) is not None:
            raise InputError("zero-shot classification needs one label an example")
        check_templates(templates)
        names = choose_names(loader.source, class_names)
        self._texts = [template.format(name) for name in names for template in templates]
        self._num_templates = len(templates)
        self._towers = Towers(objective, loader, mesh, batch_size)

    def classes(self, params: Any) -> Float[np.ndarray, "C D"]:
        """The embedding of each class, of length one."""
        each = self._towers.texts(params, self._texts)
        mean = each.reshape(-1, self._num_templates, each.shape[-1]).mean(1)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    def __call__(self, state: Any) -> dict[str, float]:
        """Runs over the whole set; what cannot be read is left out."""
        classes = self.classes(state.eval_params)
        images, labels, is_read = self._towers.images(state.eval_params)
        return scores(images, classes, labels, is_read)


def scores(
    images: Float[np.ndarray, "N D"],
    classes: Float[np.ndarray, "C D"],
    labels: Int[np.ndarray, "N"],
    is_read: Bool[np.ndarray, "N"],
) -> dict[str, float]:
    ranks = ranks_of(images[is_read], classes, labels[is_read])
    top = {"accuracy": 1, "top5_accuracy": 5}
    found = {name: float((ranks < k).mean()) if len(ranks) else 0.0 for name, k in top.items()}
    return found | {"examples": len(ranks)}
