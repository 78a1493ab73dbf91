"""Supervised classification: softmax over one label, or sigmoids over several."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vitjax.errors import InputError, suggest
from vitjax.objectives.objective import Objective

LOSSES = ("softmax", "sigmoid")


def one_hot(labels: Int[Array, "B"] | Int[Array, "B M"], num_classes: int) -> Float[Array, "B C"]:
    """Targets from labels; lists of labels are padded with -1, which adds nothing."""
    encoded = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return encoded if labels.ndim == 1 else encoded.max(1)


def softmax_loss(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, "B"]:
    """Cross entropy against a distribution over classes."""
    return -(targets * jax.nn.log_softmax(logits)).sum(-1)


def sigmoid_loss(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, "B"]:
    """Binary cross entropies, summed over classes (as in arXiv 2006.07159)."""
    return -(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    ).sum(-1)


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Classification with label smoothing and mixed labels.

    Attributes:
      model: with a head; its `logits` are trained.
      loss_type: "softmax" or "sigmoid".
      label_smoothing: the share of the target spread evenly over all classes.
    """

    loss_type: str = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise InputError(
                f"unknown objective.loss_type {self.loss_type!r}; {suggest(self.loss_type, LOSSES)}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not dict(self.model.description).get("num_classes"):
            raise InputError("supervised training needs model.num_classes of at least 1")

    @property
    def flops_per_image(self) -> int:
        return 3 * self.model.flops_per_image

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Fresh parameters; there is nothing extra. Of the batch only shapes are given."""
        del batch
        return self.model.init(key), {}

    def example_losses(
        self, logits: Float[Array, "B C"], batch: dict[str, Array]
    ) -> Float[Array, "B"]:
        """The loss of each example, on mixed labels where the batch has them."""
        num_classes = logits.shape[-1]
        targets = one_hot(batch["labels"], num_classes)
        if "mix_labels" in batch:
            weight = batch["mix_weight"][:, None]
            targets = weight * targets + (1 - weight) * one_hot(batch["mix_labels"], num_classes)
        s = self.label_smoothing
        if self.loss_type == "sigmoid":
            return sigmoid_loss(logits, targets * (1 - s) + 0.5 * s)
        return softmax_loss(logits, targets * (1 - s) + s / num_classes)

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """The mean loss over the batch, and the share of examples whose top class is right."""
        logits = self.model.apply(params, batch["images"], key)["logits"]
        right = one_hot(batch["labels"], logits.shape[-1])
        top = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
        metrics = {"accuracy": (top * right).sum(-1).mean()}
        return self.example_losses(logits, batch).mean(), (extra, metrics)

    def logits(self, params: Any, extra: Any, batch: dict[str, Array]) -> Float[Array, "B C"]:
        """What the classification evaluator scores."""
        del extra
        return self.model.apply(params, batch["images"])["logits"]
