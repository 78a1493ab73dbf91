"""Softmax attention, and the kernels that compute it.

Array letters: B batch, N M tokens, H heads, K head width. All kernels are the same function; they
differ in speed and memory, and where they run.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.parallel import on_each_device
from vitjax.precision import Precision


def displaced(x: Array, name: str, offsets: Mapping[str, Array] | None) -> Array:
    """The array plus its offset, where one is given: for gradients with respect to it."""
    return x if offsets is None or name not in offsets else x + offsets[name].astype(x.dtype)


def attend(
    query: Float[Array, "B H N K"],
    key: Float[Array, "B H M K"],
    value: Float[Array, "B H M K"],
    precision: Precision,
    offsets: Mapping[str, Array] | None = None,
    is_causal: bool = False,
) -> tuple[Float[Array, "B H N K"], dict[str, Array]]:
    """Softmax attention with the softmax in float32, and all that it computes on the way.

    `offsets` may hold `attention_weights`, which are added to the weights. With `is_causal` a
    token sees itself and those before it.

    Returns:
      The mixed values, and what was computed on the way: `attention_weights` [B, H, N, M], and
      `max_logit`, the largest absolute value that entered the softmax.
    """
    logits = jnp.einsum("bhnk,bhmk->bhnm", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    largest = jnp.abs(logits).max()
    if is_causal:
        is_seen = jnp.tri(query.shape[2], key.shape[2], dtype=bool)
        logits = jnp.where(is_seen[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = displaced(weights, "attention_weights", offsets)
    mixed = jnp.einsum("bhnm,bhmk->bhnk", precision.compute_cast(weights), value)
    return mixed, {"attention_weights": weights, "max_logit": largest}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _xla(query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    """Plain products, with the fewest passes over [B, H, N, M] that XLA makes of it.

    The weights stay without their sum, by which only [B, H, N, K] is divided, in both directions;
    as in Dao 2022 (arXiv 2205.14135), section 3, but with the weights kept, not computed again.
    """
    return _xla_forward(query, key, value, is_causal)[0]


def _xla_forward(query, key, value, is_causal):
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhnk,bhmk->bhnm", query, key, preferred_element_type=jnp.float32)
    if is_causal:
        is_seen = jnp.tri(query.shape[2], key.shape[2], dtype=bool)
        logits = jnp.where(is_seen[None, None], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    inverse = 1 / weights.sum(-1, keepdims=True)
    if value.dtype != weights.dtype:  # kept narrow: else XLA keeps what it narrows them from
        weights = jax.lax.optimization_barrier(weights.astype(value.dtype))
    mixed = jnp.einsum("bhnm,bhmk->bhnk", weights, value, preferred_element_type=jnp.float32)
    mixed = (mixed * inverse).astype(value.dtype)
    return mixed, (query, key, value, weights, inverse, mixed)


def _xla_backward(is_causal, saved, grad):
    query, key, value, weights, inverse, mixed = saved
    grad = grad.astype(jnp.float32) * inverse
    along = (grad * mixed).sum(-1, keepdims=True)
    grad = grad.astype(value.dtype)
    d_value = jnp.einsum("bhnm,bhnk->bhmk", weights, grad)
    d_weights = jnp.einsum("bhnk,bhmk->bhnm", grad, value, preferred_element_type=jnp.float32)
    d_logits = (weights * (d_weights - along)).astype(value.dtype)
    d_query = jnp.einsum("bhnm,bhmk->bhnk", d_logits, key) * query.shape[-1] ** -0.5
    return d_query, jnp.einsum("bhnm,bhnk->bhmk", d_logits, query), d_value


_xla.defvjp(_xla_forward, _xla_backward)


def _cudnn(query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    # Asked for by name: left to itself JAX takes XLA's products (its default is no choice).
    inputs = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    mixed = jax.nn.dot_product_attention(*inputs, is_causal=is_causal, implementation="cudnn")
    return jnp.swapaxes(mixed, 1, 2)


def _pallas(query: Array, key: Array, value: Array, is_causal: bool, interpret: bool = False):
    with warnings.catch_warnings():  # from jax 0.12 on it says that it moves to tokamax
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as pallas

    tokens, block = query.shape[2], 64
    padded = -(-tokens // block) * block
    fill = ((0, 0), (0, padded - tokens), (0, 0), (0, 0))
    sizes = pallas.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32,
        block_kv_dq=32,
    )  # fmt: skip

    def run(query, key, value):
        wide = [jnp.pad(jnp.swapaxes(x, 1, 2), fill) for x in (query, key, value)]
        # Tokens of another segment are not seen: those that fill the last block up.
        segments = jnp.broadcast_to(_is_filler(tokens, padded)[None], (len(query), padded))
        scale = query.shape[-1] ** -0.5
        mixed: Any = pallas.mha(*wide, segments, scale, is_causal, sizes, interpret=interpret)
        return jnp.swapaxes(mixed[:, :tokens], 1, 2)

    return on_each_device(run, "B H N K", query, key, value)


def _splash(query: Array, key: Array, value: Array, is_causal: bool, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tokens, block = query.shape[2], 128
    padded = -(-tokens // block) * block
    fill = ((0, 0), (0, 0), (0, padded - tokens), (0, 0))
    kind = splash.CausalMask if is_causal else splash.FullMask
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip

    def run(query, key, value):
        wide = [jnp.pad(x, fill) for x in (query * query.shape[-1] ** -0.5, key, value)]
        mask = splash.MultiHeadMask([kind((padded, padded))] * query.shape[1])
        make = splash.make_splash_mha_single_device
        kernel = make(mask, block_sizes=sizes, interpret=interpret)
        segment = _is_filler(tokens, padded)
        segments = splash.SegmentIds(segment, segment)
        mixed: Any = jax.vmap(functools.partial(kernel, segment_ids=segments))(*wide)
        return jax.lax.slice_in_dim(mixed, 0, tokens, axis=2)

    return on_each_device(run, "B H N K", query, key, value)


def _is_filler(tokens: int, padded: int) -> Array:
    return (jnp.arange(padded) >= tokens).astype(jnp.int32)


# Each takes query, key, value [B, H, N, K] of the type of compute and whether it is causal.
KERNELS: dict[str, Any] = {"xla": _xla, "cudnn": _cudnn, "pallas": _pallas, "splash": _splash}
PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "pallas": ("gpu",),
             "splash": ("tpu",)}  # fmt: skip


def available(platform: str) -> list[str]:
    """The kernels that are made for a platform ("cpu", "gpu", "tpu"), XLA's first."""
    return [name for name, platforms in PLATFORMS.items() if platform in platforms]
