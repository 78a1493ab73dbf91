"""Models of bags (multiple-instance learning): one answer from the features of many tiles.

Array letters: B bags, N instances (tiles) of each after padding, D features, H hidden width,
A attention width, C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vitjax.errors import InputError, suggest
from vitjax.models.functional import Model
from vitjax.models.layers import Linear, dropout
from vitjax.precision import Precision

POOLS = ("gated", "attention", "mean", "max")
FAR = -1e30  # a score that has no weight in a softmax


def masked_softmax(scores: Float[Array, "B N"], mask: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """Softmax over the instances that are there, in float32; 0 for the others."""
    scores = jnp.where(mask, scores.astype(jnp.float32), FAR)
    raised = jnp.exp(scores - scores.max(1, keepdims=True)) * mask
    return raised / jnp.maximum(raised.sum(1, keepdims=True), 1e-30)


class BagClassifier(nnx.Module):
    """Instances to a hidden layer, pooled over the bag, and a linear head.

    The pools, of hidden instances h:
      "attention": sum a h, a = softmax(w . tanh(V h))
      "gated": sum a h, a = softmax(w . (tanh(V h) * sigmoid(U h)))
      "mean", "max": over instances, of each hidden number.

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equations 7 to 9; the hidden layer
    and dropout are as for histopathology there, the instances come embedded.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        pool: str,
        hidden_dim: int,
        attention_dim: int,
        dropout_rate: float,
        precision: Precision,
        *,
        rngs: nnx.Rngs,
    ):
        make = {"precision": precision, "rngs": rngs}
        self.hidden = Linear((num_features,), (hidden_dim,), **make)
        has_attention = pool in ("gated", "attention")

        def score(out: int):
            return Linear((hidden_dim,), (out,), use_bias=False, **make)

        self.value = score(attention_dim) if has_attention else None
        self.gate = score(attention_dim) if pool == "gated" else None
        self.weight = (
            Linear((attention_dim,), (1,), use_bias=False, **make) if has_attention else None
        )
        self.head = Linear((hidden_dim,), (num_classes,), **make)
        self.pool, self.dropout_rate = pool, dropout_rate
        self.precision = precision

    def _pooled(
        self, hidden: Float[Array, "B N H"], mask: Bool[Array, "B N"]
    ) -> tuple[Float[Array, "B H"], Float[Array, "B N"]]:
        """The bag as one vector, and the share that each instance has in it."""
        if self.pool == "max":
            least = jnp.where(mask[..., None], hidden, FAR)
            largest = jnp.where(mask.any(1)[:, None], least.max(1), 0)
            winners = jax.nn.one_hot(least.argmax(1), hidden.shape[1], dtype=jnp.float32)
            return largest, winners.mean(1) * mask
        if self.value is None or self.weight is None:  # the mean: everyone the same
            attention = masked_softmax(jnp.zeros(mask.shape), mask)
        else:
            scores = jnp.tanh(self.value(hidden))
            if self.gate is not None:
                scores = scores * jax.nn.sigmoid(self.gate(hidden))
            attention = masked_softmax(self.weight(scores)[..., 0], mask)
        mixed = jnp.einsum("bn,bnh->bh", attention, self.precision.full_cast(hidden))
        return mixed, attention

    def __call__(
        self,
        features: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        key: jax.Array | None = None,
    ) -> dict[str, Array]:
        """Classifies bags.

        Args:
          mask: which instances are there; the others change nothing.
          key: for dropout; None means inference.

        Returns:
          `logits` [B, C], `attention` [B, N] (sums to 1 over a bag) and `embedding` [B, H].
        """
        hidden = jax.nn.relu(self.hidden(features))
        hidden = dropout(hidden, self.dropout_rate, key, whole=False) if key is not None else hidden
        embedding, attention = self._pooled(hidden, mask)
        logits = self.precision.full_cast(self.head(embedding))
        return {"logits": logits, "attention": attention, "embedding": embedding}


def mil(
    *,
    num_features: int,
    num_classes: int,
    pool: str = "gated",
    hidden_dim: int = 256,
    attention_dim: int = 128,
    dropout_rate: float = 0.25,
    precision: Precision = Precision(),
) -> Model:
    """Describes a model of bags; see `BagClassifier`.

    Args:
      num_features: of each instance.
      pool: "gated" or "attention" (attention-based MIL), or the baselines "mean" and "max".

    Raises:
      InputError: for a value that makes no model.
    """
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; {suggest(pool, POOLS)}")
    numbers = {"num_features": num_features, "hidden_dim": hidden_dim}
    for name, value in (numbers | {"attention_dim": attention_dim}).items():
        if value < 1:
            raise InputError(f"{name} must be positive, got {value}")
    if num_classes < 2:
        raise InputError(f"num_classes must be at least 2, got {num_classes}")
    if not 0 <= dropout_rate < 1:
        raise InputError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    arguments = {
        "num_features": num_features, "num_classes": num_classes, "pool": pool,
        "hidden_dim": hidden_dim, "attention_dim": attention_dim, "dropout_rate": dropout_rate,
        "precision": precision,
    }  # fmt: skip
    return Model(BagClassifier, tuple(arguments.items()))
