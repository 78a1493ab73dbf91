"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) and its common variants.

Array letters: B batch, Y X image, N tokens, L layers, D width, C classes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vitjax.errors import InputError, suggest
from vitjax.models import layers
from vitjax.models.functional import Model
from vitjax.models.shapes import Geometry, Shape, count_flops, parse_shape
from vitjax.parallel import Precision, constrain

POOLS = ("cls", "gap", "map")
POSITIONS = ("learned", "sincos2d")
REMAT = ("none", "dots", "full", "offload")


def sincos2d_positions(rows: int, cols: int, width: int) -> Float[np.ndarray, "N D"]:
    """Fixed sine and cosine positions of a grid of patches, row-major.

    The four quarters of the width hold sin(x), cos(x), sin(y), cos(y) at geometric frequencies.

    Source: MoCo v3 (Chen et al. 2021, arXiv 2104.02057), as in big_vision.
    """
    if width % 4:
        raise InputError(f"sincos2d positions need a width divisible by 4, got {width}")
    y, x = np.mgrid[:rows, :cols]
    frequency = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    y = y.reshape(-1, 1) * frequency[None]
    x = x.reshape(-1, 1) * frequency[None]
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def patchify(images: Float[Array, "B Y X C"], patch_size: int) -> Float[Array, "B N P"]:
    """Cuts images into patches, row-major; each patch is flattened as (y, x, channel)."""
    b, height, width, channels = images.shape
    rows, cols = height // patch_size, width // patch_size
    x = images.reshape(b, rows, patch_size, cols, patch_size, channels)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, rows * cols, -1)


class AttentionPool(nnx.Module):
    """Multi-head attention pooling: a learned query attends to all tokens, then a residual MLP.

    Source: Zhai et al. 2021 (arXiv 2106.04560), appendix; Lee et al. 2019 (arXiv 1810.00825).
    """

    def __init__(self, shape: Shape, *, precision: Precision, rngs: nnx.Rngs, activation, norm):
        width, heads = shape.width, shape.num_heads
        head_dim = width // heads
        make = {"precision": precision, "rngs": rngs}
        limit = (6.0 / (1 + width)) ** 0.5
        self.probe = nnx.Param(
            jax.random.uniform(rngs.params(), (1, width), precision.params, -limit, limit)
        )
        self.query = layers.Linear((width,), (heads, head_dim), **make)
        self.key_value = layers.Linear((width,), (2, heads, head_dim), fan_out=width, **make)
        self.out = layers.Linear((heads, head_dim), (width,), **make)
        self.norm = layers.LayerNorm(width, precision=precision, **norm)
        self.mlp = layers.Mlp(width, shape.mlp_dim, activation=activation, **make)
        self.precision = precision

    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...][None], (tokens.shape[0], 1, tokens.shape[-1]))
        query = jnp.transpose(self.query(probe), (0, 2, 1, 3))
        key, value = jnp.transpose(self.key_value(tokens), (2, 0, 3, 1, 4))
        mixed, _ = layers.attend(query, key, value, self.precision)
        x = self.out(jnp.transpose(mixed, (0, 2, 1, 3)))
        return (x + self.mlp(self.norm(x)))[:, 0]


class ViT(nnx.Module):
    """A Vision Transformer whose blocks are stacked on a leading layer dimension.

    The blocks run under one `lax.scan`; `scan=False` unrolls it, with the same parameters.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: str,
        eps: float,
        dropout_rate: float,
        drop_path_rate: float,
        scan: bool,
        remat: str,
        head_bias: float,
    ):
        shape, d = geometry.shape, geometry.shape.width
        make = {"precision": precision, "rngs": rngs}
        norm = {"eps": eps, "use_bias": geometry.norm_bias}
        self.patch_embed = layers.Linear((geometry.patch_dim,), (d,), **make)
        self.cls_token = (
            nnx.Param(jnp.zeros((1, d), precision.params)) if geometry.pool == "cls" else None
        )
        table = jax.random.normal(rngs.params(), (geometry.num_tokens, d), precision.params)
        is_learned = geometry.positions == "learned"
        self.positions = nnx.Param(table * d**-0.5) if is_learned else None

        def make_block(key):
            return layers.Block(
                d,
                shape.mlp_dim,
                shape.num_heads,
                precision=precision,
                rngs=nnx.Rngs(params=key),
                activation=activation,
                eps=eps,
                qkv_bias=geometry.qkv_bias,
                norm_bias=geometry.norm_bias,
                qk_norm=geometry.qk_norm,
                parallel=geometry.parallel,
                dropout_rate=dropout_rate,
                use_drop_path=drop_path_rate > 0,
            )

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), shape.depth))
        self.norm = layers.LayerNorm(d, precision=precision, **norm)
        self.pool = (
            AttentionPool(shape, activation=activation, norm=norm, **make)
            if geometry.pool == "map"
            else None
        )
        self.head = (
            layers.Linear(
                (d,), (geometry.num_classes,), zero_init=True, bias_value=head_bias, **make
            )
            if geometry.num_classes
            else None
        )
        self.geometry = geometry
        self.precision = precision
        self.dropout_rate = dropout_rate
        self.drop_path_rate = drop_path_rate
        self.scan = scan
        self.remat = remat

    def embed_patches(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B N D"]:
        """Patches to tokens with positions, the class token first."""
        g, p = self.geometry, self.precision
        size = (g.image_size, g.image_size, g.channels)
        if images.shape[1:] != size:
            raise InputError(f"the model takes images of {size}, got {images.shape[1:]}")
        x = self.patch_embed(patchify(p.compute_cast(images), g.patch_size))
        if self.positions is not None:
            table = p.compute_cast(self.positions[...])
        else:
            table = sincos2d_positions(g.grid, g.grid, g.shape.width)
            table = p.compute_cast(jnp.asarray(table))
        if self.cls_token is None:
            return x + table[None]
        cls = p.compute_cast(self.cls_token[...])
        if self.positions is not None:
            cls, table = cls + table[:1], table[1:]
        cls = jnp.broadcast_to(cls[None], (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([cls, x + table[None]], axis=1)

    def encode(
        self, x: Float[Array, "B N D"], key: jax.Array | None, intermediates: bool
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """Runs all blocks; the second result holds each block's intermediates, stacked over L."""
        depth = self.geometry.shape.depth
        graphdef, stacked = nnx.split(self.blocks)
        rates = self.drop_path_rate * jnp.arange(depth) / max(depth - 1, 1)

        def body(x, layer):
            index, rate, params = layer
            x = checkpoint_name(constrain(x, "B N D"), "block_input")
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, seen = nnx.merge(graphdef, params)(x, layer_key, rate)
            return x, seen if intermediates else {}

        if self.remat != "none":
            policy = {
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                "full": None,
                "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=["block_input"],
                    offload_src="device",
                    offload_dst="pinned_host",
                ),
            }
            body = jax.checkpoint(body, policy=policy[self.remat], prevent_cse=not self.scan)
        xs = (jnp.arange(depth), rates, stacked)
        return jax.lax.scan(body, x, xs, unroll=1 if self.scan else depth)

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        key: jax.Array | None = None,
        *,
        intermediates: bool = False,
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
          images: normalised.
          key: for dropout and stochastic depth; None means inference.
          intermediates: also return `patches` (the encoder's input) and `blocks`, a dict of every
            block's norm1, attention, attention_weights, mlp and output, stacked over layers.

        Returns:
          `tokens` [B, N, D] after the final norm, `embedding` [B, D], float32 `logits` [B, C].
        """
        g = self.geometry
        x = patches = self.embed_patches(images)
        if key is not None and self.dropout_rate:
            x = layers.dropout(
                x, self.dropout_rate, jax.random.fold_in(key, g.shape.depth), whole=False
            )
        x, blocks = self.encode(x, key, intermediates)
        tokens = self.norm(x)
        if g.pool == "cls":
            embedding = tokens[:, 0]
        elif self.pool is not None:
            embedding = self.pool(tokens)
        else:
            embedding = self.precision.compute_cast(self.precision.full_cast(tokens).mean(1))
        out: dict[str, Any] = {"tokens": tokens, "embedding": embedding}
        if self.head is not None:
            out["logits"] = self.precision.full_cast(constrain(self.head(embedding), "B C"))
        if intermediates:
            out |= {"patches": patches, "blocks": blocks}
        return out


def vit(
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    shape: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    patch_size: int | None = None,
    pool: str = "gap",
    positions: str = "learned",
    qkv_bias: bool = True,
    norm_bias: bool = True,
    qk_norm: bool = False,
    parallel: bool = False,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    scan: bool = True,
    remat: str = "none",
    head_bias: float = 0.0,
    precision: Precision = Precision(),
) -> Model:
    """Describes a Vision Transformer by name, by numbers, or by a name with numbers changed.

    Args:
      image_size: pixels along each side.
      num_classes: width of the linear head, which starts at zero; 0 for no head.
      shape: a name of `shapes.SHAPES` and a patch size, as "B/16".
      width, depth, mlp_dim, num_heads, patch_size: replace the named shape's numbers; all five
        are needed without a name.
      pool: "cls" (class token), "gap" (mean over tokens) or "map" (attention pooling).
      positions: "learned" or "sincos2d".
      qk_norm: layer norm on queries and keys (ViT-22B).
      parallel: attention and MLP side by side on one norm (ViT-22B).
      activation: "gelu_tanh" (as in JAX code bases) or "gelu" (exact, as in PyTorch's).
      drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
      scan: one scan over the blocks, or the same blocks unrolled.
      remat: "none" keeps activations, "dots" keeps matrix products, "full" keeps block inputs,
        "offload" keeps them in the host's memory (TPUs and GPUs).
      head_bias: where the head's bias starts (about -log(C) for sigmoid losses).

    Raises:
      InputError: for a name, number or combination that makes no model.
    """
    named, named_patch = parse_shape(shape) if shape else (None, None)
    numbers = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    if named:
        numbers = {k: getattr(named, k) if v is None else v for k, v in numbers.items()}
    patch = patch_size or named_patch or 0
    missing = [k for k, v in (numbers | {"patch_size": patch}).items() if not v or v < 0]
    if missing:
        raise InputError(f"model.shape is not set, so model.{missing[0]} must be a positive number")
    encoder = Shape(**{k: int(v or 0) for k, v in numbers.items()})
    for name, value, allowed in (
        ("pool", pool, POOLS),
        ("positions", positions, POSITIONS),
        ("activation", activation, layers.ACTIVATIONS),
        ("remat", remat, REMAT),
    ):
        if value not in allowed:
            raise InputError(f"unknown model.{name} {value!r}; {suggest(str(value), allowed)}")
    for name, value in (("dropout_rate", dropout_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= value < 1:
            raise InputError(f"model.{name} must be in [0, 1), got {value}")
    if image_size % patch:
        raise InputError(
            f"image size {image_size} is not divisible by patch size {patch}; "
            f"the nearest sizes are {image_size // patch * patch} and "
            f"{-(-image_size // patch) * patch}"
        )
    if encoder.width % encoder.num_heads:
        raise InputError(f"width {encoder.width} is not divisible by num_heads {encoder.num_heads}")
    if num_classes < 0:
        raise InputError(f"model.num_classes must be 0 (no head) or more, got {num_classes}")
    geometry = Geometry(
        encoder, patch, image_size, channels, num_classes, pool, positions,
        qkv_bias, norm_bias, qk_norm, parallel,
    )  # fmt: skip
    arguments = {
        "geometry": geometry,
        "precision": precision,
        "activation": activation,
        "eps": eps,
        "dropout_rate": dropout_rate,
        "drop_path_rate": drop_path_rate,
        "scan": scan,
        "remat": remat,
        "head_bias": head_bias,
    }
    description = dataclasses.asdict(encoder) | {
        "patch_size": patch,
        "positions": positions,
        "pool": pool,
        "num_classes": num_classes,
        "num_tokens": geometry.num_tokens,
        "parallel": parallel,
        "remat": remat,
        "prefix_tokens": geometry.num_tokens - geometry.num_patches,
    }
    return Model(ViT, tuple(arguments.items()), tuple(description.items()), count_flops(geometry))
