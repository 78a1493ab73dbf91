"""Labels with a known share of noise, so that the loss has a known floor."""

import math
from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax.data.sources import ask
from vitjax.errors import InputError


class NoisyLabels:
    """A source in which a share of the labels is redrawn, uniformly over all classes.

    Whether and to what an example's label changes depends on (index, seed) alone, so every epoch
    and every run sees the same labels. A redrawn label may be the right one by chance.

    Args:
      source: the block of a single-label source.
      fraction: the probability that a label is redrawn.
      seed: 0 or more; another redraws others.

    Raises:
      InputError: the fraction is not in [0, 1].
    """

    def __init__(self, source: dict[str, Any], fraction: float, seed: int = 0):
        if not 0 <= fraction <= 1:
            raise InputError(f"the fraction of noisy labels must be in [0, 1], got {fraction}")
        self._source = config_lib.build(source)
        self.num_classes = self._source.num_classes
        self.may_lack_classes = True  # by chance
        self.class_names = self._source.class_names
        # Two streams whose n-th number is example n's, whatever the length of the source.
        chance, other = (np.random.default_rng([seed, stream]) for stream in (0, 1))
        self._is_redrawn = chance.random(len(self._source)) < fraction
        self._redrawn = other.integers(self.num_classes, size=len(self._source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        if not isinstance(record["label"], int | np.integer):
            raise InputError(f"noisy labels need one label an example, got {record['label']!r}")
        if self._is_redrawn[index]:
            return record | {"label": int(self._redrawn[index])}
        return record

    def all_labels(self) -> np.ndarray | None:
        """The noisy labels; None if the source does not tell its own."""
        labels = ask(self._source, "all_labels")
        if labels is None:
            return None
        if not isinstance(labels, np.ndarray):
            raise InputError("noisy labels need one label an example, the source has lists")
        return np.where(self._is_redrawn, self._redrawn, labels)

    def all_groups(self) -> list[str] | None:
        return ask(self._source, "all_groups")

    def problems(self) -> list[str]:
        return ask(self._source, "problems") or []


def noise_floor(fraction: float, num_classes: int) -> float:
    """The least cross entropy, in nats, that any model can reach on labels with this noise.

    It is the entropy of a noisy label given the true one: reached by a model that always knows the
    true class. With q = fraction / num_classes: -(1 - p + q) ln(1 - p + q) - (K - 1) q ln q.

    Raises:
      InputError: the fraction is not in [0, 1], or there is no class.
    """
    if not 0 <= fraction <= 1 or num_classes < 1:
        raise InputError(
            f"a floor needs a fraction in [0, 1] and at least 1 class, "
            f"got {fraction} and {num_classes}"
        )
    wrong = fraction / num_classes
    right = 1 - fraction + wrong
    entropy = -right * math.log(right) if right > 0 else 0.0
    return entropy - ((num_classes - 1) * wrong * math.log(wrong) if wrong > 0 else 0.0)
