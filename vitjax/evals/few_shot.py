"""Accuracy of a linear classifier that has seen a few images of each class.

Array letters: N examples, D width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from scipy.linalg import solve

from vitjax.data.loader import Loader
from vitjax.data.sources import ask
from vitjax.errors import InputError
from vitjax.evals.features import Features, FeatureSet, check_classes

BIAS = 100.0  # large, so that the penalty hardly holds it back


def least_squares(
    x: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], num_classes: int, penalty: float
) -> Float[np.ndarray, "D C"]:
    """The regression of -1 and 1 for each class: minimises the squared error + penalty x W^2."""
    targets = 2 * np.eye(num_classes)[labels] - 1
    if len(x) >= x.shape[1]:
        return solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ targets, assume_a="pos")
    return x.T @ solve(x @ x.T + penalty * np.eye(len(x)), targets, assume_a="pos")


def score(few: FeatureSet, scored: FeatureSet, num_classes: int, penalty: float) -> float:
    """Learns from a few examples, standardised by their own mean and deviation, and scores."""
    x = np.nan_to_num(few.features.astype(np.float64))  # a model may have diverged
    mean, scale = x.mean(0)[None], x.std(0)[None] + 1e-5

    def columns(features: np.ndarray) -> np.ndarray:
        return np.pad(
            (np.nan_to_num(features) - mean) / scale, ((0, 0), (0, 1)), constant_values=BIAS
        )

    weights = least_squares(columns(x), few.labels, num_classes, penalty)
    found = (columns(scored.features) @ weights).argmax(1)
    return float((found == scored.labels).mean())


class FewShot:
    """Ridge regression on so many images of each class, drawn by several seeds and averaged.

    Args:
      objective: with `embed`.
      loader: of the set that is scored.
      train_loader: of the set that images are drawn from, as at evaluation.
      mesh: where it runs.
      batch_size: of the images, global; rounded up to what the devices divide.
      shots: images of each class; each number gives a result.
      num_seeds: draws, seeds 0, 1 and so on.
      penalty: of the squared weights, beside the sum of squared errors.

    Raises:
      InputError: a class has fewer images than the shots, here where the source knows its labels,
        else at the first evaluation.

    Source: the evaluation "fewshot_lsr" of github.com/google-research/big_vision with its settings
    (Zhai et al. 2022, arXiv 2106.04560, section 2.1), which gives each seed a number of its own.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        train_loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        shots: Sequence[int] = (5, 10, 25),
        num_seeds: int = 3,
        penalty: float = 2.0**10,
    ):
        if not shots or min(shots) < 1:
            raise InputError(f"shots must be numbers of at least 1, got {tuple(shots)}")
        if num_seeds < 1 or not penalty > 0:
            raise InputError(
                f"num_seeds must be at least 1 and penalty positive, got {num_seeds} and {penalty}"
            )
        self._num_classes = check_classes(loader, train_loader)
        self._shots, self._num_seeds, self._penalty = tuple(shots), num_seeds, penalty
        self._names = train_loader.source.class_names
        labels = ask(train_loader.source, "all_labels")
        self._is_checked = labels is not None
        if labels is not None:
            self._check(np.asarray(labels))
        self._loader = loader
        self._features = Features(objective, loader, mesh, batch_size)
        self._train_features = Features(objective, train_loader, mesh, batch_size)

    def _check(self, labels: Int[np.ndarray, "N"]) -> None:
        counts = np.bincount(labels, minlength=self._num_classes)
        least = int(counts.argmin())
        if counts[least] < max(self._shots):
            name = f" ({self._names[least]!r})" if self._names else ""
            raise InputError(
                f"shots={max(self._shots)}, but class {least}{name} has {counts[least]} training "
                f"images; each class needs as many as the most shots"
            )

    def __call__(self, state: Any) -> dict[str, float]:
        """`accuracy_Nshot` of each number of shots, the mean over draws."""
        train, scored = self._train_features(state), self._features(state)
        if not self._is_checked:
            self._check(train.labels)
        found: dict[int, list[float]] = {shots: [] for shots in self._shots}
        for seed in range(self._num_seeds):
            self._loader.between()
            generator = np.random.default_rng(seed)
            drawn = [
                generator.permutation(np.flatnonzero(train.labels == label))
                for label in range(self._num_classes)
            ]
            for shots in self._shots:
                rows = np.concatenate([of_class[:shots] for of_class in drawn])
                few = FeatureSet(train.features[rows], train.labels[rows])
                found[shots].append(score(few, scored, self._num_classes, self._penalty))
        means = {f"accuracy_{shots}shot": float(np.mean(each)) for shots, each in found.items()}
        return means | {"examples": len(scored)}
