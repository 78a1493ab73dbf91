"""The features of a whole set, on the host: what probes and neighbours are made of.

Array letters: N examples, D width.
"""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals.evaluation import once
from vitjax.evals.passes import Pass


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Pooled features, and the labels, of the examples that could be read, in order."""

    features: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.labels)


class Features:
    """Embeds every example of a set, on all devices; the result is the same in all processes.

    Evaluators on the same source share it in one evaluation; nothing is kept beyond.

    Args:
      objective: with `embed`.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, batch_size: int):
        def embed(params, extra, batch):
            found = objective.embed(params, extra, batch)
            return found.astype(np.float32), batch["labels"], batch["mask"]

        self._pass = Pass(embed, loader, mesh, batch_size)
        self._key = ("features", id(objective), id(loader))

    def __call__(self, state: Any) -> FeatureSet:
        """Of `state.eval_params`; float32 features."""
        return once((*self._key, id(state)), lambda: self._compute(state))

    def _compute(self, state: Any) -> FeatureSet:
        found = zip(*self._pass(state), strict=True)
        features, labels, mask = (np.concatenate(parts) for parts in found)
        return FeatureSet(features[mask], labels[mask])


def check_classes(loader: Loader, train_loader: Loader) -> int:
    """How many classes two sets have together.

    Raises:
      InputError: examples have not one label each, or the sets name their classes differently.
    """
    sources: list[Any] = [loader.source, train_loader.source]
    for part in (loader, train_loader):
        if part.max_labels is not None or getattr(part.source, "num_targets", None) is not None:
            raise InputError("this evaluation needs one label an image; the data have several")
    names = [source.class_names for source in sources]
    if all(names) and names[0] != names[1]:
        raise InputError(
            f"source has the classes {_listed(names[0])}, but train_source has {_listed(names[1])}"
        )
    return max(source.num_classes for source in sources)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
