"""What every objective has in common: where its model's parameters lie."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float

from vitjax.models.functional import Model

Place = tuple[str, ...]


def at(tree: Any, place: Sequence[str]) -> Any:
    """The part of a tree of dicts that lies there."""
    for key in place:
        tree = tree[key]
    return tree


def put(tree: Any, place: Place, part: Any) -> Any:
    """The tree with another part there."""
    if not place:
        return part
    return tree | {place[0]: put(tree[place[0]], place[1:], part)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The base of objectives; `vitjax.objectives` lists what they add.

    Attributes:
      model: what is pretrained, the encoder.
      PLACES: where parameters of `model` lie in the state, beginning with "params" or "extra". The
        first are evaluated, loaded and exported; all of them start from `init.checkpoint`.
    """

    model: Model
    PLACES: ClassVar[tuple[Place, ...]] = (("params",),)

    def backbone(self, params: Any, extra: Any) -> Any:
        """The parameters of `model` that are evaluated."""
        part, *keys = self.PLACES[0]
        return at(params if part == "params" else extra, tuple(keys))

    def trained(self, params: Any) -> Any:
        """The parameters of `model` that the optimizer moves."""
        return at(params, next(keys for part, *keys in self.PLACES if part == "params"))

    def embed(self, params: Any, extra: Any, batch: dict[str, Array]) -> Float[Array, "B D"]:
        """The pooled features in front of the head."""
        return self.model.apply(self.backbone(params, extra), batch["images"])["embedding"]
