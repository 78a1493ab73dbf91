"""Optimizers: one chain of optax transformations, built from the config.

    clip -> algorithm -> weight decay -> layer-wise decay -> learning rate

The algorithm is any `scale_by_...` transformation by import path, ours below or optax's own.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.fingerprint import mix
from vitjax.parallel import path_name
from vitjax.schedules import Schedule

PyTree = Any


def match(patterns: Sequence[str], tree: PyTree, setting: str) -> PyTree:
    """True for every leaf whose path, such as "blocks/mlp/up/kernel", fully matches a pattern.

    Raises:
      InputError: a pattern is no regular expression, or matches no leaf.
    """
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise InputError(f"{setting} pattern {pattern!r}: {error}") from error
        if not found:
            raise InputError(
                f"{setting} pattern {pattern!r} matches no parameter; there are {', '.join(names)}"
            )
    return jax.tree.map_with_path(
        lambda path, _: any(re.fullmatch(p, path_name(path)) for p in patterns), tree
    )


def layer_scales(params: PyTree, decay: float) -> PyTree:
    """Factors of the learning rate: 1 at the head, `decay` times less for each layer below.

    Leaves under `blocks` are stacked over layers and get one factor a layer; everything in front
    of the blocks counts as layer 0.

    Source: Clark et al. 2020 (arXiv 2003.10555), as in BEiT and MAE fine-tuning.
    """
    depths = [
        leaf.shape[0]
        for path, leaf in jax.tree.leaves_with_path(params)
        if _place(path) == "blocks"
    ]
    if not depths:
        raise InputError("optimizer.layer_decay needs a model with blocks")
    depth = max(depths)

    def scale(path, leaf):
        if _place(path) == "blocks":
            factors = decay ** (depth - jnp.arange(leaf.shape[0], dtype=jnp.float32))
            return factors.reshape(-1, *(1,) * (len(leaf.shape) - 1))
        return jnp.asarray(decay ** (depth + 1 if _is_below(path) else 0), jnp.float32)

    return jax.tree.map_with_path(scale, params)


def scale_by_momentum(momentum: float = 0.9, nesterov: bool = False, dtype: str | None = None):
    """Stochastic gradient descent with momentum."""
    return optax.trace(momentum, nesterov, accumulator_dtype=dtype)


def scale_by_adafactor(
    momentum: float = 0.9,
    momentum_dtype: str = "bfloat16",
    decay_exponent: float = 0.8,
    max_decay: float = 0.999,
    min_dim: int = 32,
    eps: float = 1e-30,
):
    """Factored second moment, then momentum stored in bfloat16: half a byte-pair a parameter.

    Args:
      decay_exponent: the second moment's decay at step t is 1 - t^-decay_exponent,
      max_decay: but never more than this.
      min_dim: smaller matrices keep a full second moment.

    Source: Zhai et al. 2021 (arXiv 2106.04560), section 3.4; Shazeer and Stern 2018 (1804.04235).
    """

    def decay(step, exponent):
        t = jnp.asarray(step + 1, jnp.float32)
        return jnp.minimum(max_decay, 1.0 - t ** (-exponent))

    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_exponent,
            min_dim_size_to_factor=min_dim,
            epsilon=eps,
            decay_rate_fn=decay,
        ),
        optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype),
    )


def decay_factors(params: PyTree, decay: Sequence[tuple[str, float]]) -> PyTree:
    """The factor of weight decay for every parameter, 0 where no pattern matches."""
    factors = jax.tree.map(lambda _: 0.0, params)
    for pattern, factor in decay:
        matched = match((pattern,), params, "optimizer.decay")
        factors = jax.tree.map(lambda f, m, new=factor: new if m else f, factors, matched)
    return factors


# The matrices of a block: which dimensions of the stacked kernel are inputs, and which outputs.
# The rest (layers; query, key and value) are a batch of matrices.
MUON_DIMS = {
    "blocks/attention/qkv/kernel": ((1,), (3, 4)),
    "blocks/attention/out/kernel": ((1, 2), (3,)),
    "blocks/mlp/up/kernel": ((1,), (2,)),
    "blocks/mlp/down/kernel": ((1,), (2,)),
}


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.95,
    dtype: str | None = None,
):
    """Orthogonalised momentum for the blocks' matrices, Adam for everything else.

    Updates are scaled by 0.2 sqrt(max(inputs, outputs)), so that AdamW's learning rate and weight
    decay carry over.

    Source: Jordan et al. 2024; the scale from Liu et al. 2025 (arXiv 2502.16982).
    """
    from optax.contrib import MuonDimensionNumbers, scale_by_muon

    def dims(name: str):
        return next((d for suffix, d in MUON_DIMS.items() if name.endswith(suffix)), None)

    def labels(params):
        return jax.tree.map_with_path(
            lambda path, _: "muon" if dims(path_name(path)) else "adam", params
        )

    def dimension_numbers(params):
        def leaf(path, _):
            found = dims(path_name(path))
            return MuonDimensionNumbers(*found) if found else None

        return jax.tree.map_with_path(leaf, params)

    def rescale(updates, params=None):
        del params

        def leaf(path, update):
            found = dims(path_name(path))
            if found is None:
                return update
            largest = max(math.prod(update.shape[d] for d in side) for side in found)
            return update * (0.2 * math.sqrt(largest))

        return jax.tree.map_with_path(leaf, updates)

    muon = optax.chain(
        scale_by_muon(
            ns_steps=newton_schulz_steps,
            beta=momentum,
            mu_dtype=dtype,
            nesterov=nesterov,
            weight_dimension_numbers=dimension_numbers,
        ),
        optax.stateless(rescale),
    )
    return optax.partition(
        {"muon": muon, "adam": optax.scale_by_adam(b1, b2, mu_dtype=dtype)}, labels
    )


def _stochastic_round(x: Array, seed: Array) -> Array:
    """float32 to bfloat16, up or down by chance, so that small changes are not lost on average.

    The chance is a hash of position and seed: the same on any number of devices.
    """
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position = position * jnp.uint32(size % 2**32) + index
    noise = mix(position + mix(seed.astype(jnp.uint32))) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store_in_bfloat16(algorithm: optax.GradientTransformation) -> optax.GradientTransformation:
    """The algorithm with its float32 slots kept in bfloat16 between steps, rounded by chance.

    Rounding to nearest would freeze a second moment: with b2 = 0.999 its changes are smaller than
    bfloat16's last bit.
    """

    def narrow(state, count):
        def leaf(x):
            is_wide = jnp.ndim(x) > 0 and x.dtype == jnp.float32
            return _stochastic_round(x, count) if is_wide else x

        return jax.tree.map(leaf, state)

    def init(params):
        count = jnp.zeros((), jnp.int32)
        return {"count": count, "slots": narrow(algorithm.init(params), count)}

    def update(updates, state, params=None):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state["slots"]
        )
        updates, wide = algorithm.update(updates, wide, params)
        count = state["count"] + 1
        return updates, {"count": count, "slots": narrow(wide, count)}

    return optax.GradientTransformation(init, update)


def make_optimizer(
    params: PyTree,
    *,
    algorithm: optax.GradientTransformation,
    schedule: Schedule,
    peak_lr: float,
    weight_decay: float = 0.0,
    final_weight_decay: float | None = None,
    total_steps: int = 1,
    decay: Sequence[tuple[str, float]] = ((r".*/kernel", 1.0),),
    layer_decay: float | None = None,
    freeze: Sequence[str] = (),
    clip_norm: float | None = None,
    frozen_blocks: int = 0,
) -> optax.GradientTransformation:
    """Builds the whole chain.

    Args:
      params: parameters or their shapes; patterns are checked against their paths.
      algorithm: maps gradients to updates before the learning rate.
      schedule: the fraction of `peak_lr` at each update.
      weight_decay: decoupled and multiplied by the learning rate, as in AdamW.
      final_weight_decay: where half a cosine leads it (DINO, arXiv 2104.14294); None to stay.
      total_steps: the updates which that takes.
      decay: patterns of the parameters that decay, each with a factor of `weight_decay`; where
        several match, the last one counts.
      layer_decay: see `layer_scales`; None for off.
      freeze: patterns of parameters that never change and have no optimizer state.
      clip_norm: the largest global norm of the gradient; None for off.
      frozen_blocks: so many of the first blocks, and what comes before them, never change and
        have no optimizer state either.
    """
    if not peak_lr > 0:
        raise InputError(f"optimizer.peak_lr must be positive, got {peak_lr}")
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"optimizer.clip_norm must be positive or None, got {clip_norm}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay must be in (0, 1] or None, got {layer_decay}")
    last_decay = weight_decay if final_weight_decay is None else final_weight_decay
    if min(weight_decay, last_decay) < 0:
        name = "weight_decay" if weight_decay < 0 else "final_weight_decay"
        raise InputError(
            f"optimizer.{name} must not be negative, got {min(weight_decay, last_decay)}"
        )
    whole, params = params, jax.eval_shape(lambda p: _above(p, frozen_blocks), params)
    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    chain.append(algorithm)
    if weight_decay or last_decay:
        factors = decay_factors(params, decay)
        chain.append(_weight_decay(factors, weight_decay, last_decay, total_steps))
    if layer_decay is not None:
        scales = layer_scales(params, layer_decay)
        chain.append(optax.stateless(lambda updates, _: _multiply(updates, scales)))
    chain.append(optax.scale_by_learning_rate(lambda count: peak_lr * schedule(jnp.asarray(count))))
    optimizer = _of_upper_blocks(optax.chain(*chain), frozen_blocks)
    frozen = match(freeze, whole, "optimizer.freeze")
    if frozen_blocks:
        frozen = jax.tree.map_with_path(lambda path, f: f or _is_below(path), frozen)
    if not any(jax.tree.leaves(frozen)):
        return optimizer
    if all(jax.tree.leaves(frozen)):
        raise InputError(f"optimizer.freeze {tuple(freeze)} freezes every parameter")
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    return optax.partition({"trained": optimizer, "frozen": optax.stateless(_unchanged)}, labels)


FIRST = ("stem", "patch_embed", "cls_token", "distill_token", "registers", "positions", "pre_norm",
         "mask_token")  # fmt: skip


def _place(path: tuple) -> str:
    """The model's part that a parameter belongs to. Beside the model under "model" other objectives
    train parts of their own, such as decoders, whose blocks are not the model's."""
    first, *others = path_name(path).split("/")
    return others[0] if first == "model" and others else first


def _is_below(path: tuple) -> bool:
    """Whether a parameter comes before the blocks."""
    return _place(path) in FIRST


def _above(tree: PyTree, frozen_blocks: int) -> PyTree:
    """The tree without the first blocks of its stacked leaves."""
    if not frozen_blocks:
        return tree
    return jax.tree.map_with_path(
        lambda path, x: x[frozen_blocks:] if _place(path) == "blocks" else x, tree
    )


def _unchanged(updates: PyTree, params: PyTree) -> PyTree:
    """Minus zero, which is added to any number without changing a bit."""
    del params
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)


def _of_upper_blocks(
    optimizer: optax.GradientTransformation, frozen_blocks: int
) -> optax.GradientTransformation:
    """The optimizer for all but the first blocks, of which it sees nothing."""
    if not frozen_blocks:
        return optimizer

    def update(updates, state, params=None):
        inner = None if params is None else _above(params, frozen_blocks)
        found, state = optimizer.update(_above(updates, frozen_blocks), state, inner)

        def padded(path, new, old):
            if _place(path) != "blocks":
                return new
            return jnp.concatenate([jnp.full_like(old[:frozen_blocks], -0.0), new])

        return jax.tree.map_with_path(padded, found, updates), state

    return optax.GradientTransformation(
        lambda params: optimizer.init(_above(params, frozen_blocks)), update
    )


def _is_masked(leaf: Any) -> bool:
    """Whether a leaf stands for a frozen parameter, which the chain does not see."""
    return isinstance(leaf, optax.MaskedNode)


def _multiply(updates: PyTree, scales: PyTree) -> PyTree:
    return jax.tree.map(
        lambda u, s: u if _is_masked(u) else u * s, updates, scales, is_leaf=_is_masked
    )


def _weight_decay(
    factors: PyTree, first: float, last: float, total_steps: int
) -> optax.GradientTransformation:
    """Adds factor x decay x parameter; the decay goes from the first to the last."""
    if first == last:
        return optax.stateless(lambda u, p: _add_decay(u, p, factors, first))

    def update(updates, state, params=None):
        share = jnp.minimum(state / total_steps, 1.0)  # the state is the number of updates
        now = last + (first - last) * (1 + jnp.cos(jnp.pi * share)) / 2
        return _add_decay(updates, params, factors, now), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _add_decay(
    updates: PyTree, params: PyTree, factors: PyTree, weight_decay: float | Array
) -> PyTree:
    return jax.tree.map(
        lambda u, p, f: u if _is_masked(u) or not f else u + (weight_decay * f) * p,
        updates, params, factors, is_leaf=_is_masked,
    )  # fmt: skip


def update_ema(ema: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """A moving average of the parameters, which forgets faster at the start.

    The decay at step t is min(decay, (1 + t) / (10 + t)).
    """
    t = jnp.asarray(step, jnp.float32)
    d: Float[Array, ""] = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(
        lambda e, p: e * d.astype(e.dtype) + p * (1 - d).astype(p.dtype), ema, params
    )
