"""Training a model of bags."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from vitjax import optim, schedules
from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import SPLITS
from vitjax.medical.slides.bags import Bag, read_bag
from vitjax.medical.slides.trained import TrainedMil, bucket, padded

log = logging.getLogger("vitjax")
PyTree = Any
METRICS = ("auroc", "loss")
LEAST_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class MilResult:
    """What a fit gave.

    Attributes:
      model: with the parameters of the best epoch.
      probabilities: of each slide, whatever its split.
      attention: of each slide, one number an instance, with sum 1.
      embeddings: of each slide.
      history: train_loss, val_loss and val_auroc of each epoch (NaN where there is no such).
      best_epoch: the one that was kept, from 1.
    """

    model: TrainedMil
    probabilities: Float[np.ndarray, "S C"]
    attention: tuple[Float[np.ndarray, "_"], ...]
    embeddings: Float[np.ndarray, "S H"]
    history: tuple[dict[str, float], ...]
    best_epoch: int


class _Bags:
    """Bags in memory or in files, which are read when they are asked for."""

    def __init__(self, bags: Sequence[Any]):
        self._bags = bags
        self.weights: set[str] = set()
        self.width: int | None = None

    def __getitem__(self, index: int) -> Float[np.ndarray, "N D"]:
        bag = self._bags[index]
        bag = read_bag(bag) if isinstance(bag, str | Path) else bag
        features = bag.features if isinstance(bag, Bag) else np.asarray(bag, np.float32)
        if isinstance(bag, Bag):
            self.weights.add(str(bag.attributes.get("weights", "")))
        if len(self.weights) > 1:
            raise InputError(f"bags of different weights: {', '.join(sorted(self.weights))}")
        if features.ndim != 2 or not features.size:
            raise InputError(f"bag {index} must be [N, D] with N > 0, got {features.shape}")
        self.width = features.shape[1] if self.width is None else self.width
        if features.shape[1] != self.width:
            raise InputError(f"bag {index} has {features.shape[1]} features, others {self.width}")
        if not np.isfinite(features).all():
            raise InputError(f"bag {index} has features that are no numbers")
        return features.astype(np.float32)


def _scale(bags: _Bags, rows: np.ndarray, is_on: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over the instances of the training bags."""
    count, total, squares, first = 0, np.zeros(1), np.zeros(1), None
    for row in rows:
        features = bags[int(row)].astype(np.float64)
        first = features[0] if first is None else first  # near the mean: little is cancelled
        shifted = features - first[None]
        count, total = count + len(features), total + shifted.sum(0)
        squares = squares + (shifted**2).sum(0)
    assert first is not None
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if not is_on:
        return np.zeros(len(first), np.float32), np.ones(len(first), np.float32)
    std = np.where(std > LEAST_STD, std, 1.0)
    return (mean + first).astype(np.float32), std.astype(np.float32)


def _class_weights(
    given: str | Sequence[float] | None, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    if given is None:
        return np.ones(num_classes, np.float32)
    if isinstance(given, str):
        if given != "balanced":
            raise InputError(f"class_weights {given!r}; {suggest(given, ['balanced'])}, or numbers")
        counts = np.bincount(labels, minlength=num_classes)
        weights = len(labels) / (num_classes * np.maximum(counts, 1))
        return weights.astype(np.float32)
    if len(given) != num_classes or min(given) < 0:
        raise InputError(
            f"class_weights {tuple(given)} must be {num_classes} numbers, none below 0"
        )
    return np.asarray(given, np.float32)


def bag_losses(
    logits: Float[jax.Array, "B C"], labels: Int[jax.Array, " B"]
) -> Float[jax.Array, " B"]:
    """Cross-entropy of each bag."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def auroc(probabilities: Float[np.ndarray, "S C"], labels: Int[np.ndarray, " S"]) -> float:
    """Area under the ROC curve, of the second of two classes or the mean over one against the rest.

    NaN where every slide has the same class; classes that no slide has do not count.
    """
    columns = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    found = [
        float(roc_auc_score(labels == c, probabilities[:, c]))
        for c in columns
        if 0 < (labels == c).sum() < len(labels)
    ]
    return float(np.mean(found)) if found else float("nan")


def _checked(
    labels: Any, splits: Any, count: int, classes: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    labels, splits = np.asarray(labels, np.int64), np.asarray(splits).astype(str)
    if not count == len(labels) == len(splits):
        raise InputError(f"{count} bags, but {len(labels)} labels and {len(splits)} splits")
    for split in sorted(set(splits.tolist()) - {*SPLITS, ""}):
        raise InputError(f"unknown split {split!r}; {suggest(split, SPLITS)}")
    names = tuple(classes or (str(c) for c in range(int(labels.max(initial=0)) + 1)))
    for split in ("train", "val"):
        found = labels[splits == split]
        wrong = found[(found < 0) | (found >= len(names))]
        if len(wrong):
            raise InputError(f"a slide of {split!r} has label {wrong[0]}: 0 to {len(names) - 1}")
    if len(set(labels[splits == "train"].tolist())) < 2:
        raise InputError("the slides of 'train' must be of two classes at least")
    return labels, splits, names


def _check_numbers(fractions: dict[str, float], counts: dict[str, int]) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} must be in [0, 1), got {value}")
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def fit(
    bags: Sequence[Bag | np.ndarray | str | Path],
    labels: Sequence[int] | Int[np.ndarray, " S"],
    splits: Sequence[str] | np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    pool: str = "gated",
    hidden_dim: int = 256,
    attention_dim: int = 128,
    dropout_rate: float = 0.25,
    bag_dropout: float = 0.2,
    max_instances: int | None = None,
    class_weights: str | Sequence[float] | None = "balanced",
    standardise: bool = True,
    peak_lr: float = 2e-4,
    weight_decay: float = 1e-2,
    warmup_fraction: float = 0.05,
    epochs: int = 50,
    batch_size: int = 4,
    metric: str = "auroc",
    patience: int = 15,
    seed: int = 0,
) -> MilResult:
    """Trains on the bags of "train", keeps the epoch that is best on "val", and predicts all bags.

    The same arguments give the same result. AdamW with warm-up and half a cosine.

    Args:
      bags: in memory, or files that are read when they are needed.
      labels: numbers of classes; -1 (unknown) is allowed outside "train" and "val".
      splits: "train", "val", "test", or "" for slides that are only predicted.
      classes: names of the labels; their numbers by default.
      pool, hidden_dim, attention_dim, dropout_rate: of `vitjax.medical.slides.mil.mil`.
      bag_dropout: the part of a bag's instances that each training step leaves out, at random.
      max_instances: the most that a training step takes of a bag; None for all that are left.
      class_weights: of the loss: "balanced" (inverse frequency), a number a class, or None.
      standardise: scale features by the training bags' mean and deviation.
      metric: on "val", of the best epoch: "auroc" (ties: the lower loss) or "loss".
      patience: epochs without a better one before the end.

    Raises:
      InputError: bags, labels or options that make no training.
    """
    labels, splits, names = _checked(labels, splits, len(bags), classes)
    _check_numbers(
        {"bag_dropout": bag_dropout, "warmup_fraction": warmup_fraction},
        {"epochs": epochs, "batch_size": batch_size, "patience": patience,
         "max_instances": 1 if max_instances is None else max_instances},
    )  # fmt: skip
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; {suggest(metric, METRICS)}")
    train, val = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "val")
    if len(val) and metric == "auroc" and len(set(labels[val].tolist())) < 2:
        raise InputError("the slides of 'val' are all of one class: choose metric='loss'")
    weights = _class_weights(class_weights, labels[train], len(names))
    read = _Bags(bags)
    mean, std = _scale(read, train, standardise)
    options = {
        "num_features": read.width, "num_classes": len(names), "pool": pool,
        "hidden_dim": hidden_dim, "attention_dim": attention_dim, "dropout_rate": dropout_rate,
    }  # fmt: skip
    trained = TrainedMil(options, None, mean, std, names)
    model = trained.model
    params = model.init(jax.random.key(seed))
    steps = -(-len(train) // batch_size)
    schedule = schedules.cosine(
        total_steps=epochs * steps, warmup_steps=round(warmup_fraction * epochs * steps)
    )
    optimizer = optim.make_optimizer(
        params, algorithm=optax.scale_by_adam(), schedule=schedule,
        peak_lr=peak_lr, weight_decay=weight_decay,
    )  # fmt: skip

    def loss(params, batch, key):
        losses = bag_losses(model.apply(params, *batch[:2], key)["logits"], batch[2])
        return (losses * batch[3]).sum()

    @jax.jit
    def step(params, opt_state, batch, key):
        value, gradient = jax.value_and_grad(loss)(params, batch, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, key = optimizer.init(params), jax.random.key(seed + 1)
    best: tuple[tuple[float, ...], int, PyTree] | None = None
    history: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng((seed, epoch)).permutation(train)
        losses = []
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            chosen = [
                trained.scaled(_subset(read[r], (seed, epoch, r), bag_dropout, max_instances))
                for r in rows.tolist()
            ]
            parts = padded(chosen, max(bucket(len(bag)) for bag in chosen), batch_size)
            empty = (0, batch_size - len(rows))
            shares = weights[labels[rows]] / len(rows)  # not by their sum: of one bag it is nothing
            batch = (*parts, np.pad(labels[rows], empty), np.pad(shares, empty))
            step_key = jax.random.fold_in(key, epoch * len(order) + first)
            params, opt_state, value = step(params, opt_state, batch, step_key)
            losses.append(value)
        trained.params = params
        row = {"train_loss": float(np.mean(jax.device_get(losses)))}
        if not np.isfinite(row["train_loss"]):
            raise InputError(f"the loss is no number after {epoch} epochs; lower peak_lr={peak_lr}")
        row |= _validated(trained, (read[r] for r in val.tolist()), labels[val], weights)
        history.append(row)
        score = (row["val_auroc"], -row["val_loss"]) if metric == "auroc" else (-row["val_loss"],)
        if best is None or not len(val) or score > best[0]:
            best = (score, epoch, params)
        elif epoch - best[1] >= patience:
            break
    assert best is not None
    trained.params = best[2]
    outs = [trained(read[row]) for row in range(len(bags))]
    trained.weights = next(iter(read.weights), "")
    log.info("%s pooling: epoch %d of %d is kept", pool, best[1], len(history))
    return MilResult(
        model=trained,
        probabilities=np.stack([out[0] for out in outs]),
        attention=tuple(out[1] for out in outs),
        embeddings=np.stack([out[2] for out in outs]),
        history=tuple(history),
        best_epoch=best[1],
    )


def _validated(
    trained: TrainedMil, bags: Iterable[np.ndarray], labels: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Weighted loss and AUROC; NaN where there is no bag."""
    if not len(labels):
        return {"val_loss": float("nan"), "val_auroc": float("nan")}
    seen = np.stack([trained(bag)[0] for bag in bags])
    losses = -np.log(np.maximum(seen[np.arange(len(labels)), labels], 1e-30))
    weight = weights[labels]
    loss = float((losses * weight).sum() / max(float(weight.sum()), 1e-30))
    return {"val_loss": loss, "val_auroc": auroc(seen, labels)}


def _subset(
    features: np.ndarray, key: tuple[int, ...], bag_dropout: float, most: int | None
) -> np.ndarray:
    """Some of a bag's instances, the same for the same key; at least one."""
    count = max(1, round(len(features) * (1 - bag_dropout)))
    count = min(count, most or count)
    if count == len(features):
        return features
    return features[np.sort(np.random.default_rng(key).permutation(len(features))[:count])]
