"""Losses over all pairs of images and texts of a batch, of which no device holds the matrix.

Each device keeps its images; the texts go round a ring of the devices that share the batch, with
what belongs to them, and every device compares them with its own images a chunk at a time. The
way back goes round the ring again and computes the logits anew. So a device holds `[b, chunk]`
numbers at a time, b its own images, however large the whole batch is.

Array letters: B batch, b part of a device, k chunk, D embedding.

Source: Zhai et al. 2023 (SigLIP, arXiv 2303.15343), section 3.3, for the ring; the softmax over a
ring by a running logsumexp is ours.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vitjax.parallel import DATA_AXES, batch_sharding, batch_shards, replicated

LOSSES = ("sigmoid", "softmax")
Tree = Any


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How all pairs are compared.

    Attributes:
      loss_type: "sigmoid" (SigLIP) or "softmax" over both rows and columns (CLIP).
      chunk_size: texts that a device compares at a time.
      mesh: over whose data axes the batch is split; None for one device.
    """

    loss_type: str
    chunk_size: int
    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        return 1 if self.mesh is None else batch_shards(self.mesh)


def _over_chunks(step: Callable, carry: Tree, texts: Tree, size: int) -> tuple[Tree, Tree]:
    """Scans `step(carry, chunk) -> (carry, chunk)` over the texts; the last chunk may be short."""
    total = jax.tree.leaves(texts)[0].shape[0]
    whole = total // size * size
    parts = []
    if whole:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), texts)
        carry, done = jax.lax.scan(step, carry, chunks)
        parts.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), done))
    if whole < total:
        carry, done = step(carry, jax.tree.map(lambda x: x[whole:], texts))
        parts.append(done)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _ring(how: Pairs, step: Callable, carry: Tree, texts: Tree) -> tuple[Tree, Tree]:
    """Runs `step` over all texts of all devices; the texts end where they began."""
    if how.shards == 1:
        return _over_chunks(step, carry, texts, how.chunk_size)
    circle = [(i, (i + 1) % how.shards) for i in range(how.shards)]

    def turn(_, held):
        carry, texts = held
        carry, texts = _over_chunks(step, carry, texts, how.chunk_size)
        return carry, jax.tree.map(lambda x: jax.lax.ppermute(x, DATA_AXES, circle), texts)

    return jax.lax.fori_loop(0, how.shards, turn, (carry, texts))


def _on_shards(how: Pairs, function: Callable, *numbers: Array, **parts: Array) -> Any:
    """Calls `function(parts, *numbers)` on every device's part of the batch, with each example's
    number in it."""
    ids = jnp.arange(parts["images"].shape[0])
    held: dict[str, Array] = parts | {"ids": ids}
    if how.shards == 1 or how.mesh is None:
        return function(held, *numbers)
    split, whole = batch_sharding(how.mesh).spec, replicated(how.mesh).spec
    run = jax.shard_map(
        function,
        mesh=how.mesh,
        in_specs=(split, *[whole] * len(numbers)),
        out_specs=split,
        check_vma=False,
    )
    return run(held, *numbers)


def _compare(images: Array, rows: Array, texts: Tree) -> tuple[Array, Array]:
    """Cosines [b, k] of the images and a chunk of texts, and which of them are pairs."""
    cosines = jnp.matmul(images, texts["z"].T, precision=jax.lax.Precision.HIGHEST)
    return cosines, rows[:, None] == texts["ids"][None]


def _statistics(how: Pairs, images: Array, texts: Array, scale: Array, bias: Array) -> Tree:
    """What the loss and the metrics need of each row (image) and each column (text) [B]."""

    def local(held, scale, bias):
        images, rows = held["images"], held["ids"]
        zeros = jnp.zeros(images.shape[0], jnp.float32)

        def step(seen, chunk):
            cosines, is_pair = _compare(images, rows, chunk)
            logits = scale * cosines + bias
            others = jnp.where(is_pair, -jnp.inf, logits).max(1)
            new = {
                "pair": seen["pair"] + jnp.where(is_pair, logits, 0.0).sum(1),
                "sum": seen["sum"] + logits.sum(1),
                "best_other": jnp.maximum(seen["best_other"], others),
            }
            if how.loss_type == "sigmoid":
                losses = jax.nn.softplus(jnp.where(is_pair, -logits, logits))
                return new | {"loss": seen["loss"] + losses.sum(1)}, chunk
            new["log_sum"] = jnp.logaddexp(seen["log_sum"], jax.nn.logsumexp(logits, axis=1))
            column = jnp.logaddexp(chunk["log_sum"], jax.nn.logsumexp(logits, axis=0))
            return new, chunk | {"log_sum": column}

        low = zeros - jnp.inf
        seen = {"pair": zeros, "sum": zeros, "best_other": low}
        moving = {"z": held["texts"], "ids": rows}
        if how.loss_type == "sigmoid":
            seen["loss"] = zeros
        else:
            seen["log_sum"], moving["log_sum"] = low, low
        seen, moving = _ring(how, step, seen, moving)
        if how.loss_type == "sigmoid":
            return seen
        columns = moving["log_sum"]
        loss = (seen["log_sum"] + columns) / 2 - seen["pair"]
        return seen | {"loss": loss, "column_log_sum": columns}

    return _on_shards(how, local, scale, bias, images=images, texts=texts)


def _gradients(
    how: Pairs, images: Array, texts: Array, scale: Array, bias: Array, seen: Tree
) -> tuple[Array, Array, Array, Array]:
    """Those of the mean loss, with respect to images, texts, scale and bias."""
    batch = images.shape[0]

    def local(held, scale, bias):
        images, rows = held["images"], held["ids"]

        def slope(cosines, is_pair, chunk):
            logits = scale * cosines + bias
            if how.loss_type == "sigmoid":
                found = jax.nn.sigmoid(jnp.where(is_pair, -logits, logits))
                return jnp.where(is_pair, -found, found) / batch
            rowwise = jnp.exp(logits - held["log_sum"][:, None])
            columnwise = jnp.exp(logits - chunk["log_sum"][None])
            return ((rowwise + columnwise) / 2 - is_pair) / batch

        def step(grads, chunk):
            cosines, is_pair = _compare(images, rows, chunk)
            d_logits = slope(cosines, is_pair, chunk)
            exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            new = {
                "images": grads["images"] + scale * exact(d_logits, chunk["z"]),
                "scale": grads["scale"] + (d_logits * cosines).sum(1),
                "bias": grads["bias"] + d_logits.sum(1),
            }
            return new, chunk | {"grad": chunk["grad"] + scale * exact(d_logits.T, images)}

        zeros = jnp.zeros(images.shape[0], jnp.float32)
        grads = {"images": jnp.zeros_like(images), "scale": zeros, "bias": zeros}
        moving = {"z": held["texts"], "ids": rows, "grad": jnp.zeros_like(held["texts"])}
        if how.loss_type == "softmax":
            moving["log_sum"] = held["column_log_sum"]
        grads, moving = _ring(how, step, grads, moving)
        return grads | {"texts": moving["grad"]}

    sums = {k: seen[k] for k in ("log_sum", "column_log_sum") if k in seen}
    found = _on_shards(how, local, scale, bias, images=images, texts=texts, **sums)
    return found["images"], found["texts"], found["scale"].sum(), found["bias"].sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pair_loss(
    how: Pairs,
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
    """The mean loss of a batch whose image i belongs to text i, and to no other.

    A logit is scale x cosine + bias. The sigmoid loss of an image is the sum of
    -log sigmoid(+-logit) over all texts; the softmax loss is the mean of the cross entropies of
    the image among texts and of the text among images.

    Args:
      how: see Pairs; where it has a mesh, its data axes must divide B.
      images, texts: float32, of length one.

    Returns:
      The loss, and of each image without a gradient: `pair`, the logit with its own text,
      `best_other`, the largest with another, and `sum`, of all.
    """
    seen = _statistics(how, images, texts, scale, bias)
    return seen["loss"].mean(), {k: seen[k] for k in ("pair", "best_other", "sum")}


def _forward(how, images, texts, scale, bias):
    seen = _statistics(how, images, texts, scale, bias)
    given = {k: seen[k] for k in ("pair", "best_other", "sum")}
    return (seen["loss"].mean(), given), (images, texts, scale, bias, seen)


def _backward(how, saved, cotangents):
    grads = _gradients(how, *saved)
    return tuple(grad * cotangents[0] for grad in grads)


pair_loss.defvjp(_forward, _backward)
