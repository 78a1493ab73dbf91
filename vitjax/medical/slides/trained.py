"""A trained model of bags: what `fit` gives back, and what reads new slides."""

import functools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import softmax

from vitjax.errors import InputError
from vitjax.medical.slides.mil import mil
from vitjax.models.functional import Model
from vitjax.parallel import path_name

PyTree = Any
LEAST_BUCKET = 64
EACH = 1024  # instances that are classified at once, each alone


def bucket(count: int) -> int:
    """The padded length of a bag: a power of two, so that few lengths are compiled."""
    return max(LEAST_BUCKET, 1 << max(count - 1, 0).bit_length())


def padded(
    bags: Sequence[Float[np.ndarray, "_ D"]], length: int, num_bags: int
) -> tuple[Float[np.ndarray, "B N D"], Bool[np.ndarray, "B N"]]:
    """Bags of one length, and which of their instances are there; empty bags fill the batch."""
    features = np.zeros((num_bags, length, bags[0].shape[1]), np.float32)
    mask = np.zeros((num_bags, length), bool)
    for row, bag in enumerate(bags):
        features[row, : len(bag)] = bag
        mask[row, : len(bag)] = True
    return features, mask


@functools.cache
def _compiled(model: Model):
    """The model for inference; those of the same shapes share what is compiled."""
    return jax.jit(model.apply)


class TrainedMil:
    """A model of bags with its parameters and the scale of the features that it expects.

    Attributes:
      options: of `vitjax.medical.slides.mil.mil`.
      params: nested dict of arrays.
      mean, std: of each feature in the training bags.
      classes: names, in the logits' order.
      weights: hash of the model that made the bags (`bags.model_hash`), or "" if unknown.
    """

    def __init__(
        self,
        options: dict[str, Any],
        params: PyTree,
        mean: Float[np.ndarray, " D"],
        std: Float[np.ndarray, " D"],
        classes: Sequence[str],
        weights: str = "",
    ):
        self.options, self.params, self.classes = dict(options), params, tuple(classes)
        self.mean, self.std, self.weights = mean, std, weights
        self.model = mil(**options)
        self._run = _compiled(self.model)

    def scaled(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Features as the model sees them: mean 0 and variance 1 over the training bags."""
        return ((features - self.mean[None]) / self.std[None]).astype(np.float32)

    def __call__(
        self, features: Float[np.ndarray, "N D"]
    ) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " N"], Float[np.ndarray, " H"]]:
        """Probabilities of the classes, the attention of each instance, and the bag's embedding."""
        wanted = self.options["num_features"]
        if features.ndim != 2 or features.shape[1] != wanted or not len(features):
            raise InputError(f"a bag must be [N, {wanted}] with N > 0, got {features.shape}")
        batch, mask = padded([self.scaled(features)], bucket(len(features)), 1)
        out = jax.device_get(self._run(self.params, batch, mask))
        probabilities = softmax(out["logits"][0].astype(np.float64))
        return probabilities, out["attention"][0, : len(features)], out["embedding"][0]

    def of_each(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        """Probabilities of the classes for each instance, as a bag of its own."""
        found = []
        for first in range(0, len(features), EACH):
            part = self.scaled(features[first : first + EACH])
            bags, mask = padded([row[None] for row in part], 1, EACH)
            logits = np.asarray(self._run(self.params, bags, mask)["logits"], np.float64)
            found.append(softmax(logits[: len(part)], axis=1))
        return np.concatenate(found)

    def save(self, path: str | Path) -> None:
        """Writes an npz that `TrainedMil.load` reads."""
        path = Path(path)
        arrays = {
            f"params/{path_name(place)}": np.asarray(leaf)
            for place, leaf in jax.tree.leaves_with_path(self.params)
        }
        facts = {"options": self.options, "classes": self.classes, "weights": self.weights}
        beside = path.with_name(f"{path.name}.tmp")
        with beside.open("wb") as file:
            np.savez(file, facts=json.dumps(facts), mean=self.mean, std=self.std, **arrays)  # type: ignore
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | Path) -> "TrainedMil":
        """Reads what `save` wrote.

        Raises:
          InputError: no such file, or another one.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                mean, std = file["mean"], file["std"]
                params: dict[str, Any] = {}
                for name in file.files:
                    if name.startswith("params/"):
                        *folders, leaf = name.split("/")[1:]
                        place = params
                        for folder in folders:
                            place = place.setdefault(folder, {})
                        place[leaf] = jnp.asarray(file[name])
            return cls(facts["options"], params, mean, std, facts["classes"], facts["weights"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no model of bags: {error}") from error
