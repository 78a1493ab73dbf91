"""The Vision Transformer as a module; `vitjax.models.vit` describes it by name and options.

Array letters: B batch, Y X image, N tokens, P patches, K of them kept, L layers, D width,
C classes.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vitjax.errors import InputError
from vitjax.models import layers
from vitjax.models.inputs import InputTokens
from vitjax.models.pooling import AttentionPool, pool_tokens
from vitjax.models.positions import resize_positions, rope_angles, sincos2d_positions
from vitjax.models.shapes import Geometry
from vitjax.models.stems import ConvStem, ResNetStem, conv_widths
from vitjax.parallel import constrain
from vitjax.precision import Precision


def patchify(images: Float[Array, "B Y X C"], patch_size: int) -> Float[Array, "B N P"]:
    """Cuts images into patches, row-major; each patch is flattened as (y, x, channel)."""
    b, height, width, channels = images.shape
    rows, cols = height // patch_size, width // patch_size
    x = images.reshape(b, rows, patch_size, cols, patch_size, channels)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(b, rows * cols, -1)


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
        rope_theta: float,
        position_resampling: str,
        layer_scale: float | None,
        dropout_rate: float,
        drop_path_rate: float,
        scan: bool,
        remat: str,
        attention: str,
        head_bias: float,
        frozen_blocks: int,
        lora_scale: float,
    ):
        g, shape, d = geometry, geometry.shape, geometry.shape.width
        # What is not in a block keeps the type of compute: its rows are few, or its width is.
        outside = dataclasses.replace(precision, products="compute")
        make = {"precision": outside, "rngs": rngs}
        norm = {"eps": eps, "use_bias": g.norm_bias}

        def tokens(count: int, scale: float = 0.0):
            if not count:
                return None
            drawn = jax.random.normal(rngs.params(), (count, d), precision.params)
            return nnx.Param(drawn * scale if scale else jnp.zeros_like(drawn))

        stem: Any = None
        if g.stem == "conv":
            stem = ConvStem(g.channels, conv_widths(g.patch_size, d), **make)
        elif g.stem == "resnet":
            stem = ResNetStem(g.channels, g.stem_width, g.stem_blocks, **make)
        self.stem = stem
        self.patch_embed = layers.Linear((g.patch_dim,), (d,), use_bias=g.patch_bias, **make)
        self.cls_token = tokens(int(g.cls_token))
        self.distill_token = tokens(int(g.distill_token))
        self.registers = tokens(g.num_registers, scale=0.02)
        self.mask_token = tokens(int(g.mask_token))
        inputs = InputTokens(g.input_sizes, d, **make) if g.input_sizes else None
        self.inputs: Any = inputs
        is_learned = g.positions == "learned"
        self.positions = tokens(g.num_positions, scale=d**-0.5) if is_learned else None
        self.pre_norm = layers.LayerNorm(d, precision=precision, **norm) if g.pre_norm else None

        def make_block(key):
            return layers.Block(
                d,
                shape.mlp_dim,
                shape.num_heads,
                precision=precision,
                rngs=nnx.Rngs(params=key),
                activation=activation,
                eps=eps,
                qkv_bias=g.qkv_bias,
                key_bias=g.key_bias,
                out_bias=g.out_bias,
                norm_bias=g.norm_bias,
                qk_norm=g.qk_norm,
                qk_norm_bias=g.qk_norm_bias,
                parallel=g.parallel,
                gated_mlp=g.mlp == "gated",
                mlp_bias=g.mlp_bias,
                layer_scale=layer_scale,
                dropout_rate=dropout_rate,
                use_drop_path=drop_path_rate > 0,
                lora=dict.fromkeys(g.lora_targets, (g.lora_rank, lora_scale)),
                kernel=attention,
            )

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), shape.depth))
        norm_dim = g.pooled_dim if g.norm_after_pool else d
        self.norm = layers.LayerNorm(norm_dim, precision=precision, **norm)
        self.pool = (
            AttentionPool(shape, activation=activation, norm=norm, **make)
            if g.pool == "map"
            else None
        )

        def dense(dim_in: int, dim_out: int | None, **options):
            return layers.Linear((dim_in,), (dim_out,), **make, **options) if dim_out else None

        head = {"zero_init": True, "bias_value": head_bias}
        self.pre_logits = dense(g.pooled_dim, g.pre_logits_dim)
        self.projection = dense(g.pre_logits_dim or g.pooled_dim, g.projection_dim, use_bias=False)
        self.head = dense(g.embedding_dim, g.num_classes, **head)
        self.distill_head = dense(d, g.num_classes if g.distill_head else 0, **head)
        self.geometry = geometry
        self.precision = precision
        self.rope_theta = rope_theta
        self.position_resampling = position_resampling
        self.dropout_rate = dropout_rate
        self.drop_path_rate = drop_path_rate
        self.scan = scan
        self.remat = remat
        self.frozen_blocks = frozen_blocks

    def _grid(self, images: Array) -> tuple[int, int]:
        """Rows and columns of patches of these images."""
        g, (height, width, channels) = self.geometry, images.shape[1:]
        if channels != g.channels:
            raise InputError(f"the model takes images of {g.channels} channels, got {channels}")
        if height % g.patch_size or width % g.patch_size or not height or not width:
            raise InputError(
                f"images of {height} x {width} pixels cannot be cut into patches of {g.patch_size}"
            )
        return height // g.patch_size, width // g.patch_size

    def embed_patches(
        self,
        images: Float[Array, "B Y X C"],
        masked: Bool[Array, "B P"] | None = None,
        inputs: Float[Array, "B M"] | None = None,
        keep: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Patches to tokens with positions; before them class, distillation and register tokens,
        and those of other inputs. Of the patches all, or those to keep."""
        g, p = self.geometry, self.precision
        grid = self._grid(images)
        x = p.compute_cast(images)
        x = x if self.stem is None else self.stem(x)
        x = self.patch_embed(patchify(x, g.patch_size // g.stem_stride))
        if masked is not None:
            if self.mask_token is None:
                raise InputError("the model has no mask token; set model.mask_token=True")
            token = p.compute_cast(self.mask_token[...])[None]
            x = jnp.where(masked[:, :, None], token, x)
        parts = [t for t in (self.cls_token, self.distill_token, self.registers) if t is not None]
        prefix = [p.compute_cast(part[...]) for part in parts]
        if self.positions is not None:
            table = p.full_cast(self.positions[...])
            placed = g.num_positions - g.table_grid**2  # rows of tokens before the patches
            own, table = p.compute_cast(table[:placed]), table[placed:]
            square = (g.table_grid, g.table_grid)
            table = resize_positions(table, square, grid, self.position_resampling)
            x = x + p.compute_cast(jnp.asarray(table))[None]
            if placed:
                first = jnp.concatenate(prefix)
                prefix = [first[:placed] + own, first[placed:]]
        elif g.positions == "sincos2d":
            table = sincos2d_positions(*grid, g.shape.width)
            x = x + p.compute_cast(jnp.asarray(table))[None]
        if keep is not None:
            x = jnp.take_along_axis(x, keep[:, :, None], axis=1)
        before = [jnp.broadcast_to(t[None], (x.shape[0], *t.shape)) for t in prefix]
        if self.inputs is not None:
            before.append(self.inputs(inputs, x.shape[0]))
        if before:
            x = jnp.concatenate([*before, x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def encode(
        self,
        x: Float[Array, "B N D"],
        key: jax.Array | None,
        intermediates: bool,
        grid: tuple[int, int],
        offsets: Mapping[str, Array] | None = None,
        keep: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """Runs all blocks; the second result holds each block's intermediates, stacked over L."""
        g, depth = self.geometry, self.geometry.shape.depth
        graphdef, stacked = nnx.split(self.blocks)
        rates = self.drop_path_rate * jnp.arange(depth) / max(depth - 1, 1)
        rope = None
        if g.positions == "rope":
            rope = rope_angles(*grid, g.shape.width // g.shape.num_heads, self.rope_theta)
            rope = rope if keep is None else tuple(jnp.asarray(a)[keep] for a in rope)

        def body(x, layer):
            index, rate, params, displacements = layer
            x = checkpoint_name(constrain(x, "B N D"), "block_input")
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, seen = nnx.merge(graphdef, params)(
                x, layer_key, rate, rope, displacements, intermediates
            )
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
        xs = (jnp.arange(depth), rates, stacked, offsets)

        def run(x, xs, count):
            return jax.lax.scan(body, x, xs, unroll=1 if self.scan else count)

        frozen = self.frozen_blocks if offsets is None else 0
        if not frozen:
            return run(x, xs, depth)
        # No gradient passes the frozen blocks, so nothing of them is kept for the way back.
        first, others = (jax.tree.map(operator.itemgetter(part), xs)
                         for part in (slice(frozen), slice(frozen, None)))  # fmt: skip
        x, seen = run(*jax.lax.stop_gradient((x, first)), frozen)
        x, more = run(jax.lax.stop_gradient(x), others, depth - frozen)
        return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, more)

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        key: jax.Array | None = None,
        *,
        masked: Bool[Array, "B P"] | None = None,
        inputs: Float[Array, "B M"] | None = None,
        keep: Int[Array, "B K"] | None = None,
        intermediates: bool = False,
        offsets: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
          images: normalised, of any size that the patch size divides; learned positions are
            resampled to a grid that is not the model's own.
          key: for dropout and stochastic depth; None means inference.
          masked: patches that the mask token replaces.
          inputs: numbers beside the image (see `InputTokens`), NaN where unknown; None: all are.
          keep: row-major numbers of the patches to encode, in any order; the others cost nothing
            behind the patch embedding. None: all.
          intermediates: also return `patches` (the encoder's input) and `blocks`, a dict of every
            block's norm1, attention, attention_weights, max_logit, mlp and output, stacked over
            layers; and with attention pooling `pool`, with the same attention_weights of it.
          offsets: arrays that are added where intermediates of the same name arise, so that a
            gradient with respect to them can be taken: `blocks` may hold norm1 and
            attention_weights, `pool` attention_weights.

        Returns:
          `tokens` [B, N, D] after the final norm (before it where that comes after pooling),
          `embedding` [B, E], float32 `logits` [B, C].
        """
        g, p = self.geometry, self.precision
        x = patches = self.embed_patches(images, masked, inputs, keep)
        if key is not None and self.dropout_rate:
            x = layers.dropout(
                x, self.dropout_rate, jax.random.fold_in(key, g.shape.depth), whole=False
            )
        given = offsets or {}
        grid = self._grid(images)
        x, blocks = self.encode(x, key, intermediates, grid, given.get("blocks"), keep)
        seen: dict[str, Any] = {"patches": patches, "blocks": blocks}
        tokens = x if g.norm_after_pool else self.norm(x)
        if self.pool is not None:
            embedding, seen["pool"] = self.pool(tokens, given.get("pool"))
        else:
            embedding = pool_tokens(tokens, g.pool, g.num_prefix, p)
        if g.norm_after_pool:
            embedding = self.norm(embedding)
        if self.pre_logits is not None:
            embedding = jnp.tanh(self.pre_logits(embedding))
        if self.projection is not None:
            embedding = self.projection(embedding)
        out: dict[str, Any] = {"tokens": tokens, "embedding": embedding}
        if self.head is not None:
            logits = self.head(embedding)
            if self.distill_head is not None:
                logits = (logits + self.distill_head(tokens[:, 1])) / 2
            out["logits"] = p.full_cast(constrain(logits, "B C"))
        return out | seen if intermediates else out
