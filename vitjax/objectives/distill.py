"""Distillation: a student matches what a trained model makes of the same images.

Array letters: B batch, Y X image, C classes or channels, N tokens, D E widths.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.models.functional import Model
from vitjax.models.layers import Linear
from vitjax.objectives.objective import Objective
from vitjax.objectives.supervised import one_hot, softmax_loss


def soft_cross_entropy(
    logits: Float[Array, "B C"], teacher: Float[Array, "B C"], temperature: float
) -> Float[Array, "B"]:
    """KL divergence from the teacher's softened distribution, times temperature squared.

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    goal = jax.nn.log_softmax(teacher / temperature)
    logs = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * (jnp.exp(goal) * (goal - logs)).sum(-1)


def cosine_loss(x: Float[Array, "*rows D"], goal: Float[Array, "*rows D"]) -> Float[Array, ""]:
    """1 minus the mean cosine."""

    def unit(v):
        v = v.astype(jnp.float32)
        return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-6)

    return 1 - (unit(x) * unit(goal)).sum(-1).mean()


def _projection(width: int, out: int, precision: Any, rngs: Any) -> Linear:
    return Linear((width,), (out,), precision=precision, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """Matches a teacher's logits, pooled features or tokens, each with its weight.

    The teacher sees the very images that the student does, crops and mixtures included, through
    its own normalisation. It lies in the state, sharded as a student of its shape would be, and is
    saved with it; its file must stay where it is, since a run that goes on reads its shape there.

    Attributes:
      model: the student; with a head where logits or labels count.
      preprocess: of the run, given by the config.
      teacher: a run, a step, or weights in any format that `vitjax.load` reads.
      logits_weight, features_weight, tokens_weight: of matching each.
      labels_weight: of the labels' own cross entropy.
      temperature: of the softened logits.

    Source: Beyer et al. 2022, "a good teacher is patient and consistent" (arXiv 2106.05237).
    """

    preprocess: Any = None
    teacher: str = ""
    logits_weight: float = 1.0
    features_weight: float = 0.0
    tokens_weight: float = 0.0
    labels_weight: float = 0.0
    temperature: float = 1.0
    loss_type: ClassVar[str] = "softmax"
    PLACES: ClassVar = (("params", "model"),)

    def __post_init__(self):
        weights = {
            name: getattr(self, f"{name}_weight")
            for name in ("logits", "features", "tokens", "labels")
        }
        for name, weight in weights.items():
            if weight < 0:
                raise InputError(f"objective.{name}_weight must not be negative, got {weight}")
        if not any(weights[name] for name in ("logits", "features", "tokens")):
            raise InputError(
                "distillation needs objective.logits_weight, features_weight or tokens_weight"
            )
        if not self.temperature > 0:
            raise InputError(f"objective.temperature must be positive, got {self.temperature}")
        if not self.teacher:
            raise InputError(
                "objective.teacher is not set: give a checkpoint that vitjax.load reads"
            )
        theirs, ours = self._loaded.preprocess, self.preprocess
        for name in ("image_size", "channels"):
            if getattr(theirs, name) != getattr(ours, name):
                raise InputError(
                    f"objective.teacher takes images of data.{name}={getattr(theirs, name)}, this "
                    f"run gives {getattr(ours, name)}"
                )
        student = dict(self.model.description).get("num_classes") or 0
        classes = dict(self._loaded.model.description).get("num_classes") or 0
        if self.logits_weight and (not classes or classes != student):
            raise InputError(
                f"objective.logits_weight needs a teacher with the student's classes: the teacher "
                f"has {classes}, model.num_classes is {student}"
            )
        if self.labels_weight and not student:
            raise InputError("objective.labels_weight needs model.num_classes")
        if self.tokens_weight and self._patches(self._loaded.model) != self._patches(self.model):
            raise InputError(
                f"objective.tokens_weight needs a teacher of as many patches: it has "
                f"{self._patches(self._loaded.model)}, the student {self._patches(self.model)}"
            )

    @staticmethod
    def _patches(model: Model) -> int | None:
        facts = dict(model.description)
        return None if "num_tokens" not in facts else facts["num_tokens"] - facts["prefix_tokens"]

    @functools.cached_property
    def _loaded(self) -> Any:
        from vitjax.inference import load  # which builds experiments itself

        return load(self.teacher)

    @functools.cached_property
    def _matched(self) -> dict[str, tuple[str, Model]]:
        """Linear maps from the student's width to the teacher's, by name, with what they map."""
        precision = dict(self.model.arguments)["precision"]
        image = jax.ShapeDtypeStruct(
            (1, *2 * (self.preprocess.image_size,), self.preprocess.channels), "float32"
        )

        def widths(output):
            shapes = (
                jax.eval_shape(m.apply, m.abstract_params, image)[output].shape[-1]
                for m in (self.model, self._loaded.model)
            )
            return dict(zip(("width", "out"), shapes, strict=True))

        return {
            f"{output}_map": (
                output,
                Model(_projection, (*widths(output).items(), ("precision", precision))),
            )
            for output, weight in (
                ("embedding", self.features_weight), ("tokens", self.tokens_weight)
            )
            if weight
        }  # fmt: skip

    @property
    def flops_per_image(self) -> int:
        return 3 * self.model.flops_per_image + self._loaded.model.flops_per_image

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """The student, its maps, and room for the teacher."""
        del batch
        keys = jax.random.split(key, 1 + len(self._matched))
        params = {"model": self.model.init(keys[0])}
        for (name, (_, linear)), own in zip(self._matched.items(), keys[1:], strict=True):
            params[name] = linear.init(own)
        room = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), self._loaded.model.abstract_params
        )
        return params, {"teacher": {"model": room}}

    def first_extra(self, shardings: Any) -> Any:
        """The teacher's weights, where they belong."""
        weights = jax.tree.map(
            lambda x, wanted, place: jax.device_put(x.astype(wanted.dtype), place),
            self._loaded.params, self._loaded.model.abstract_params,
            shardings["teacher"]["model"],
        )  # fmt: skip
        return {"teacher": {"model": weights}}

    def _for_teacher(self, images: Array) -> Array:
        """From this run's normalisation to the teacher's."""
        ours, theirs = self.preprocess, self._loaded.preprocess
        if all(getattr(ours, n) == getattr(theirs, n) for n in ("mean", "std", "value_range")):
            return images
        shape = (1, 1, 1, -1)
        mean, std = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (ours.mean, ours.std))
        low, high = ours.value_range
        return theirs.normalise((images * std + mean - low) / (high - low))

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """The weighted sum, and its terms."""
        images = batch["images"]
        teacher = jax.lax.stop_gradient(extra["teacher"]["model"])
        goal = self._loaded.model.apply(teacher, self._for_teacher(images))
        own = self.model.apply(params["model"], images, key)
        found = {}
        if self.logits_weight:
            each = soft_cross_entropy(own["logits"], goal["logits"], self.temperature)
            found["logits"] = each.mean()
        for name, (output, linear) in self._matched.items():
            x, wanted = own[output], goal[output]
            if output == "tokens":
                x, wanted = (  # both have as many patches
                    tokens[:, dict(model.description)["prefix_tokens"] :]
                    for tokens, model in ((x, self.model), (wanted, self._loaded.model))
                )
            kind = "features" if output == "embedding" else output
            found[kind] = cosine_loss(linear.apply(params[name], x), wanted)
        if self.labels_weight:
            found["labels"] = self.example_losses(own["logits"], batch).mean()
        loss = jnp.zeros(())
        for name, value in found.items():
            loss = loss + getattr(self, f"{name}_weight") * value
        metrics = {f"{name}_loss": value for name, value in found.items()}
        if "logits" in own and self.logits_weight:
            same = own["logits"].argmax(-1) == goal["logits"].argmax(-1)
            metrics["agreement"] = same.astype(jnp.float32).mean()
        return loss, (extra, jax.lax.stop_gradient(metrics))

    def example_losses(
        self, logits: Float[Array, "B C"], batch: dict[str, Array]
    ) -> Float[Array, "B"]:
        """Of the labels, for evaluation."""
        targets = one_hot(batch["labels"], logits.shape[-1])
        if "mix_labels" in batch:
            weight = batch["mix_weight"][:, None]
            other = one_hot(batch["mix_labels"], logits.shape[-1])
            targets = weight * targets + (1 - weight) * other
        return softmax_loss(logits, targets)

    def logits(self, params: Any, extra: Any, batch: dict[str, Array]) -> Float[Array, "B C"]:
        """What the classification evaluator scores."""
        return self.model.apply(self.backbone(params, extra), batch["images"])["logits"]
