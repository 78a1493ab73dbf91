"""Accuracy of linear classifiers on features that stay as they are.

Array letters: N examples, D width, C classes, R learning rates, B batch, S steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals import ridge
from vitjax.evals.features import Features, FeatureSet, check_classes
from vitjax.evals.passes import round_up
from vitjax.parallel import batch_shards, process_rows, replicated, to_global, to_host

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MOMENTUM = 0.9
BLOCK = 4096  # rows of a device that go into one sum


def accuracy(linear: ridge.Linear, found: FeatureSet) -> float:
    """The share of examples whose largest output is their class's."""
    right = 0
    for start in range(0, len(found), BLOCK):
        part = slice(start, start + BLOCK)
        right += (linear(found.features[part]).argmax(1) == found.labels[part]).sum()
    return float(right / len(found))


class Sweep:
    """Softmax regressions by SGD with momentum, one for each learning rate, trained side by side.

    The rates fall to zero along a cosine. Each epoch has an order of its own, which is the same
    for all rates; one call of a jitted scan is one epoch.

    Args:
      mesh: the batches lie over its data axes.
      num_classes: of the labels.
      rates, epochs, batch_size, seed: see `LinearProbe`.
    """

    def __init__(
        self,
        mesh: Mesh,
        num_classes: int,
        rates: Sequence[float] = RATES,
        epochs: int = 20,
        batch_size: int = 256,
        seed: int = 0,
    ):
        if not rates or not all(rate > 0 for rate in rates):
            raise InputError(f"rates must be positive numbers, got {tuple(rates)}")
        if epochs < 1:
            raise InputError(f"epochs must be at least 1, got {epochs}")
        self.rates, self._num_classes = tuple(rates), num_classes
        self._mesh, self._epochs, self._seed = mesh, epochs, seed
        self._batch_size = round_up(batch_size, mesh, "sgd_batch_size")

        def loss(head, x, labels, weight):
            logits = jnp.matmul(x, head["kernel"], precision=jax.lax.Precision.HIGHEST)
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits + head["bias"][None], labels
            )
            return (each * weight).sum() / weight.sum()

        gradients = jax.vmap(jax.grad(loss), in_axes=(0, None, None, None))

        def epoch(heads, velocity, batches, first_step, total_steps):
            def body(carry, step):
                heads, velocity = carry
                part = {k: v[:, step] for k, v in batches.items()}
                grads = gradients(heads, part["x"], part["labels"], part["weight"])
                share = (first_step + step) / total_steps
                rate = jnp.asarray(self.rates) * (1 + jnp.cos(jnp.pi * share)) / 2
                velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)

                def moved(w, v):
                    return w - rate.reshape(-1, *[1] * (w.ndim - 1)) * v

                return (jax.tree.map(moved, heads, velocity), velocity), None

            steps = jnp.arange(batches["x"].shape[1])
            return jax.lax.scan(body, (heads, velocity), steps)[0]

        self._epoch = jax.jit(epoch, out_shardings=replicated(mesh))

    def __call__(
        self,
        x: Float[np.ndarray, "N D"],
        labels: Int[np.ndarray, "N"],
        between: Callable[[], None] = lambda: None,
    ) -> list[ridge.Linear]:
        """Trains on standardised features; a classifier for each rate.

        `between` is called before each epoch; it leaves by raising.
        """
        size = min(self._batch_size, round_up(len(x), self._mesh))
        steps = -(-len(x) // size)
        rows = process_rows(self._mesh, size)
        heads: Any = {
            "kernel": np.zeros((len(self.rates), x.shape[1], self._num_classes), np.float32),
            "bias": np.zeros((len(self.rates), self._num_classes), np.float32),
        }
        heads = velocity = jax.device_put(heads, replicated(self._mesh))
        generator = np.random.default_rng(self._seed)
        weight = np.arange(steps * size) < len(x)
        for epoch in range(self._epochs):
            between()
            order = np.resize(generator.permutation(len(x)), steps * size)
            whole = {"x": x[order], "labels": labels[order], "weight": weight.astype(np.float32)}
            parts = {
                k: v.reshape(steps, size, *v.shape[1:]).swapaxes(0, 1)[rows]
                for k, v in whole.items()
            }
            batches = to_global(parts, self._mesh, size)
            counts = np.int32(epoch * steps), np.int32(self._epochs * steps)
            heads, velocity = self._epoch(heads, velocity, batches, *counts)
            jax.block_until_ready(heads)
        found = to_host(heads)
        return [ridge.Linear(*head) for head in zip(found["kernel"], found["bias"], strict=True)]


class LinearProbe:
    """Two linear classifiers on frozen features: ridge regression on one-hot labels, and softmax
    regression by SGD at several learning rates.

    A fixed random tenth of the training set chooses the penalty (by the squared error; the
    regression is then fitted on all) and the rate (by accuracy; trained on the other nine tenths).
    The set that is scored chooses nothing.

    Args:
      objective: with `embed`.
      loader: of the set that is scored.
      train_loader: of the set that is learned from, its images as at evaluation.
      mesh: where it runs.
      batch_size: of the images, global; rounded up to what the devices divide.
      penalties: of the squared kernel, beside the mean squared error on standardised features.
      rates: learning rates at the first step of SGD, momentum 0.9.
      epochs, sgd_batch_size: of SGD.
      seed: of the tenth and of SGD's orders.

    Raises:
      InputError: settings that cannot work, or fewer than two training images.

    Source: the sweep over learning rates of a frozen model's linear heads is that of DINOv2 (Oquab
    et al. 2023, arXiv 2304.07193, appendix B.3), which also trains them together; there are no
    augmentation and no concatenated layers here.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        train_loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        penalties: Sequence[float] = ridge.PENALTIES,
        rates: Sequence[float] = RATES,
        epochs: int = 20,
        sgd_batch_size: int = 256,
        seed: int = 0,
    ):
        ridge.check_penalties(penalties)
        num_classes = check_classes(loader, train_loader)
        ridge.hold_out(len(train_loader.source))
        self._penalties, self._mesh, self._seed = tuple(penalties), mesh, seed
        self._loader, self._block = loader, BLOCK * batch_shards(mesh)
        self._features = Features(objective, loader, mesh, batch_size)
        self._train_features = Features(objective, train_loader, mesh, batch_size)
        self._sweep = Sweep(mesh, num_classes, rates, epochs, sgd_batch_size, seed)

        def moments(batch):
            targets = jax.nn.one_hot(batch["labels"], num_classes)
            return ridge.take_both(batch["x"], targets, batch["weight"], batch["is_held"])

        self._moments = jax.jit(moments, out_shardings=replicated(mesh))

    def __call__(self, state: Any) -> dict[str, float]:
        """The accuracies of both, the penalty and the rate that were chosen, and as `accuracy` that
        of the one which was better on the tenth held out."""
        train, scored = self._train_features(state), self._features(state)
        is_held = ridge.hold_out(len(train), self._seed)
        regression = ridge.choose(self._parts(train, is_held), self._penalties)

        kept = train.features[~is_held]
        mean, scale = kept.mean(0)[None], kept.std(0)[None] + 1e-6
        standard = [FeatureSet((part.features - mean) / scale, part.labels)
                    for part in (train, scored)]  # fmt: skip
        learned, tested = standard
        held = FeatureSet(learned.features[is_held], learned.labels[is_held])
        x, labels = learned.features[~is_held], learned.labels[~is_held]
        tried = self._sweep(x, labels, self._loader.between)
        shares = [accuracy(linear, held) if np.isfinite(linear.kernel).all() else -1.0
                  for linear in tried]  # fmt: skip
        best = int(np.argmax(shares))

        of_ridge, of_sgd = accuracy(regression.linear, scored), accuracy(tried[best], tested)
        unscaled = FeatureSet(train.features[is_held], held.labels)
        is_sgd = shares[best] >= accuracy(regression.on_kept, unscaled)
        return {
            "accuracy": of_sgd if is_sgd else of_ridge,
            "ridge_accuracy": of_ridge,
            "ridge_penalty": regression.penalty,
            "sgd_accuracy": of_sgd,
            "sgd_rate": self._sweep.rates[best],
            "examples": len(scored),
        }

    def _parts(self, train: FeatureSet, is_held: np.ndarray) -> list[Any]:
        """The moments of the training set, block by block."""
        size = min(self._block, round_up(len(train), self._mesh))
        rows, found = process_rows(self._mesh, size), []
        for start in range(0, len(train), size):
            self._loader.between()
            index = start + rows
            at = np.minimum(index, len(train) - 1)
            batch = {
                "x": train.features[at],
                "labels": train.labels[at],
                "is_held": is_held[at],
                "weight": (index < len(train)).astype(np.float32),
            }
            found.append(to_host(self._moments(to_global(batch, self._mesh, size))))
        return found
