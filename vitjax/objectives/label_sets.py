"""Supervision by several label sets at once, with unknown labels, order, and imbalance.

Labels are a vector `[W]` an example: of a "single" or "ordinal" set the number of its class, of a
"multi" set a number in [0, 1] for each class; NaN where unknown, which gives no gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vitjax.errors import InputError, suggest
from vitjax.objectives.objective import Objective

KINDS = ("single", "ordinal", "multi")
FAR = -1e30  # a logit without weight


@dataclasses.dataclass(frozen=True)
class _Set:
    """Where a set lies in the labels and in the logits."""

    name: str
    kind: str
    num_classes: int
    column: int
    logit: int

    @property
    def num_columns(self) -> int:
        return self.num_classes if self.kind == "multi" else 1

    @property
    def num_logits(self) -> int:
        return self.num_classes - (self.kind == "ordinal")


def _lay_out(sets: Sequence[Mapping[str, Any]]) -> list[_Set]:
    found, column, logit = [], 0, 0
    for block in sets:
        if block["kind"] not in KINDS:
            raise InputError(f"objective.sets: {suggest(str(block['kind']), KINDS)}")
        new = _Set(block["name"], block["kind"], block["num_classes"], column, logit)
        column, logit = column + new.num_columns, logit + new.num_logits
        found.append(new)
    return found


def _power(log_p: Float[Array, "B C"], gamma: float) -> Float[Array, "B C"]:
    """p to the power of gamma. A p of zero has a gradient so, also where gamma is zero."""
    return jnp.exp(gamma * log_p) if gamma else jnp.ones_like(log_p)


def _log_of_others(logits: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """The log of one minus each class's probability, exact where that is nearly one."""
    is_same = jnp.eye(logits.shape[1], dtype=bool)[None]
    others = jax.nn.logsumexp(jnp.where(is_same, FAR, logits[:, None, :]), axis=2)
    return others - jax.nn.logsumexp(logits, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class LabelSets(Objective):
    """Softmax over a "single" set, sigmoids over a "multi" one, and over the steps of an "ordinal".

    An ordinal set of K classes has K - 1 logits, of "above class k" (Frank and Hall 2001). The
    loss is the mean over examples of which the label is known; of a multi or ordinal set it is
    taken for each logit first, so that rare labels weigh as much as frequent ones. The sets' losses
    are added.

    Attributes:
      model: with a head of all sets' logits, in order.
      sets: blocks with name, kind and num_classes.
      weights: of each logit's positives, or of each class of a single set; all logits in order;
        () for none.
      priors: of each logit, for `logit_adjustment`.
      logit_adjustment: tau; adds tau x log prior odds to the logits in training (Menon et al. 2021,
        arXiv 2007.07314); 0 for none.
      focal_gamma: of the focal loss (Lin et al. 2017, arXiv 1708.02002); 0 for none.
      label_smoothing: the share of the target spread evenly.
      set_weights: of each set's loss; () for 1.
      head_bias: where the head's biases start; () for zero.
    """

    sets: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    priors: tuple[float, ...] = ()
    logit_adjustment: float = 0.0
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    set_weights: tuple[float, ...] = ()
    head_bias: tuple[float, ...] = ()

    def __post_init__(self):
        total = sum(s.num_logits for s in self.layout)
        head = dict(self.model.description).get("num_classes")
        if head != total:
            raise InputError(f"the label sets need model.num_classes={total}, got {head}")
        for name in ("weights", "priors", "head_bias"):
            if len(getattr(self, name)) not in (0, total):
                raise InputError(f"objective.{name} must be {total} numbers, one a logit")
        if len(self.set_weights) not in (0, len(self.sets)):
            raise InputError(f"objective.set_weights must be {len(self.sets)} numbers")
        if self.logit_adjustment and not self.priors:
            raise InputError("objective.logit_adjustment needs objective.priors")
        if not 0 <= self.label_smoothing < 1 or self.focal_gamma < 0:
            raise InputError(
                "objective.label_smoothing must be in [0, 1) and focal_gamma 0 or more, got "
                f"{self.label_smoothing} and {self.focal_gamma}"
            )

    @property
    def layout(self) -> list[_Set]:
        return _lay_out(self.sets)

    @property
    def loss_type(self) -> str:
        """What a single head was trained with, for `vitjax predict`."""
        is_single = len(self.sets) == 1 and self.sets[0]["kind"] == "single"
        return "softmax" if is_single else "sigmoid"

    @property
    def flops_per_image(self) -> int:
        return 3 * self.model.flops_per_image

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Fresh parameters; there is nothing extra."""
        del batch
        params = self.model.init(key)
        if self.head_bias:
            bias = params["head"]["bias"]
            params["head"]["bias"] = jnp.asarray(self.head_bias, bias.dtype)
        return params, {}

    def targets(
        self, labels: Float[Array, "B W"]
    ) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
        """What each logit should be, in [0, 1], and whether it is known."""
        targets, known = [], []
        for s in self.layout:
            part = labels[:, s.column : s.column + s.num_columns]
            is_known = jnp.isfinite(part)
            value = jnp.where(is_known, part, 0.0)
            if s.kind == "single":
                value = jax.nn.one_hot(value[:, 0].astype(jnp.int32), s.num_classes)
            elif s.kind == "ordinal":
                value = (value > jnp.arange(s.num_logits)[None]).astype(jnp.float32)
            targets.append(value)
            known.append(jnp.broadcast_to(is_known, value.shape))
        return jnp.concatenate(targets, 1), jnp.concatenate(known, 1)

    def _adjusted(self, logits: Float[Array, "B C"]) -> Float[Array, "B C"]:
        if not self.logit_adjustment:
            return logits
        priors = jnp.clip(jnp.asarray(self.priors, jnp.float32), 1e-6, 1 - 1e-6)
        single = jnp.concatenate([jnp.full(s.num_logits, s.kind == "single") for s in self.layout])
        shift = jnp.where(single, jnp.log(priors), jnp.log(priors / (1 - priors)))
        return logits + self.logit_adjustment * shift[None]

    def losses(
        self, logits: Float[Array, "B C"], targets: Float[Array, "B C"], known: Bool[Array, "B C"]
    ) -> list[Float[Array, ""]]:
        """The mean loss of each set."""
        weights = jnp.asarray(self.weights or [1.0] * logits.shape[1], jnp.float32)[None]
        gamma, smooth, found = self.focal_gamma, self.label_smoothing, []
        for s in self.layout:
            part = slice(s.logit, s.logit + s.num_logits)
            z, t, k, w = logits[:, part], targets[:, part], known[:, part], weights[:, part]
            if s.kind == "single":
                t = t * (1 - smooth) + smooth / s.num_classes
                log_p = jax.nn.log_softmax(z)
                focus = _power(_log_of_others(z), gamma)
                each = -(w * t * focus * log_p).sum(1, keepdims=True)
                k = k[:, :1]
            else:
                t = t * (1 - smooth) + smooth / 2
                yes, no = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
                each = -(w * t * _power(no, gamma) * yes + (1 - t) * _power(yes, gamma) * no)
            counts = k.sum(0)
            means = jnp.where(k, each, 0.0).sum(0) / jnp.maximum(counts, 1)
            found.append(means.sum() / jnp.maximum((counts > 0).sum(), 1))
        return found

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """The sum of the sets' losses; each of several is a metric by its name."""
        logits = self._adjusted(self._apply(params, batch, key))
        targets, known = self.targets(batch["labels"])
        if "mix_labels" in batch:
            others, others_known = self.targets(batch["mix_labels"])
            weight = batch["mix_weight"][:, None]
            targets, known = weight * targets + (1 - weight) * others, known & others_known
        losses = self.losses(logits, targets, known)
        scales = self.set_weights or (1.0,) * len(losses)
        metrics = {}
        if len(losses) > 1:
            metrics = {f"loss_{s.name}": x for s, x in zip(self.layout, losses, strict=True)}
        total = sum(scale * x for scale, x in zip(scales, losses, strict=True))
        return jnp.asarray(total), (extra, metrics)

    def _apply(self, params: Any, batch: dict[str, Array], key: jax.Array | None) -> Array:
        given = {"inputs": batch["inputs"]} if "inputs" in batch else {}
        return self.model.apply(params, batch["images"], key, **given)["logits"]

    def logits(self, params: Any, extra: Any, batch: dict[str, Array]) -> Float[Array, "B C"]:
        """What evaluators score."""
        del extra
        return self._apply(params, batch, None)

    def embed(self, params: Any, extra: Any, batch: dict[str, Array]) -> Float[Array, "B D"]:
        """The pooled features in front of the head."""
        del extra
        given = {"inputs": batch["inputs"]} if "inputs" in batch else {}
        return self.model.apply(params, batch["images"], **given)["embedding"]
