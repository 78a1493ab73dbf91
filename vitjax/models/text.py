"""The text Transformer of SigLIP and CLIP: the blocks of the Vision Transformer over tokens.

Array letters: B batch, N tokens, V vocabulary, L layers, D width, E embedding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vitjax.errors import InputError, suggest
from vitjax.models import layers
from vitjax.models.functional import Model
from vitjax.models.pooling import AttentionPool
from vitjax.models.shapes import SHAPES, Shape
from vitjax.parallel import constrain
from vitjax.precision import Precision

POOLS = ("last", "eot", "map")
REMATS = ("none", "dots", "full")


class TextTransformer(nnx.Module):
    """Tokens to one vector a text; see `text_transformer`. The blocks are stacked and scanned."""

    def __init__(
        self,
        shape: Shape,
        *,
        vocab_size: int,
        length: int,
        pool: str,
        eot_id: int | None,
        is_causal: bool,
        output_dim: int,
        head_bias: bool,
        activation: str,
        eps: float,
        scan: bool,
        remat: str,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        make = {"precision": precision, "rngs": rngs}
        norm = {"eps": eps, "use_bias": True}
        width = shape.width

        def table(rows: int):
            drawn = jax.random.normal(rngs.params(), (rows, width), precision.params)
            return nnx.Param(drawn * width**-0.5)

        self.token_embed = table(vocab_size)
        self.positions = table(length)

        def make_block(key):
            return layers.Block(
                width,
                shape.mlp_dim,
                shape.num_heads,
                precision=precision,
                rngs=nnx.Rngs(params=key),
                activation=activation,
                eps=eps,
                norm_bias=True,
                parallel=False,
                gated_mlp=False,
                mlp_bias=True,
                layer_scale=None,
                dropout_rate=0.0,
                use_drop_path=False,
                lora={},
                qkv_bias=True,
                key_bias=True,
                out_bias=True,
                qk_norm=False,
                qk_norm_bias=False,
                is_causal=is_causal,
            )

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), shape.depth))
        self.norm = layers.LayerNorm(width, precision=precision, **norm)
        self.pool = (
            AttentionPool(shape, activation=activation, norm=norm, **make)
            if pool == "map"
            else None
        )
        self.head = layers.Linear((width,), (output_dim,), use_bias=head_bias, **make)
        self.depth, self.length = shape.depth, length
        self.pool_kind, self.eot_id = pool, eot_id
        self.scan, self.remat = scan, remat
        self.precision = precision

    def _last(self, x: Float[Array, "B N D"], tokens: Int[Array, "B N"]) -> Float[Array, "B D"]:
        """The token that speaks for its text."""
        if self.pool_kind == "last":
            return x[:, -1]
        ends = tokens if self.eot_id is None else tokens == self.eot_id
        return jnp.take_along_axis(x, ends.argmax(1)[:, None, None], axis=1)[:, 0]

    def __call__(self, tokens: Int[Array, "B N"]) -> dict[str, Array]:
        """Returns `tokens` [B, N, D] after the final norm, and `embedding` [B, E].

        Raises:
          InputError: the texts are longer or shorter than the model's length.
        """
        p = self.precision
        if tokens.shape[1] != self.length:
            raise InputError(f"the text tower takes {self.length} tokens, got {tokens.shape[1]}")
        x = p.compute_cast(self.token_embed[...])[tokens]
        x = x + p.compute_cast(self.positions[...])[None]
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, params):
            x = constrain(x, "B N D")
            return nnx.merge(graphdef, params)(x, None, jnp.zeros(()))[0], None

        if self.remat != "none":
            policies = {
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                "full": None,
            }
            body = jax.checkpoint(body, policy=policies[self.remat], prevent_cse=not self.scan)
        x, _ = jax.lax.scan(body, x, stacked, unroll=1 if self.scan else self.depth)
        x = self.norm(x)
        pooled = self._last(x, tokens) if self.pool is None else self.pool(x)[0]
        return {"tokens": x, "embedding": self.head(pooled)}


def _count_flops(shape: Shape, length: int, pool: str, output_dim: int) -> int:
    """FLOPs (2 x MAC) of one forward pass of one text."""
    d, f, n = shape.width, shape.mlp_dim, length
    macs = shape.depth * n * (4 * d * d + 2 * d * f + 2 * n * d) + d * output_dim
    if pool == "map":
        macs += 2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * f
    return 2 * macs


def text_transformer(
    *,
    vocab_size: int,
    length: int,
    shape: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    pool: str = "last",
    eot_id: int | None = None,
    is_causal: bool = False,
    output_dim: int | None = None,
    head_bias: bool = True,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    scan: bool = True,
    remat: str = "none",
    precision: Precision = Precision(),
) -> Model:
    """Describes a text tower by a name of `shapes.SHAPES`, by numbers, or both.

    Tokens and learned positions go through pre-norm blocks and a final norm; one vector is pooled
    and mapped to the width that images and texts share. The defaults are SigLIP's.

    Args:
      vocab_size: of the tokenizer.
      length: tokens of every text, padding among them. Padding is attended to, as SigLIP does;
        where attention is causal and the pool "eot" it changes nothing.
      shape: such as "B", without a patch size.
      width, depth, mlp_dim, num_heads: replace the named shape's numbers; all four are needed
        without a name.
      pool: "last" (the last token: SigLIP), "eot" (the end of the text: CLIP) or "map" (attention
        pooling).
      eot_id: the token that ends a text, of which the first counts; None: the largest of each
        text is its end, as in CLIP's vocabulary and that of `ByteTokenizer`.
      is_causal: a token sees itself and those before it (CLIP).
      output_dim: of the embedding; None for the width.
      head_bias: whether the last map has a bias (SigLIP) or none (CLIP).
      activation, eps, scan, remat: as of `vitjax.models.vit.vit`.

    Raises:
      InputError: for a name, number or combination that makes no model.

    Source: Zhai et al. 2023 (SigLIP, arXiv 2303.15343); Radford et al. 2021 (CLIP, 2103.00020).
    Tables are drawn with a deviation of 1 / sqrt(width), as in big_vision.
    """
    if shape is not None and shape not in SHAPES:
        raise InputError(f"unknown text.shape {shape!r}; {suggest(shape, SHAPES)}")
    named = dataclasses.asdict(SHAPES[shape]) if shape else {}
    given = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    numbers: dict[str, Any] = named | {k: v for k, v in given.items() if v is not None}
    sizes = numbers | {"vocab_size": vocab_size, "length": length, "output_dim": output_dim or 1}
    for name in (*given, "vocab_size", "length", "output_dim"):
        if (sizes.get(name) or 0) < 1:
            raise InputError(f"text.{name} must be a positive number, got {sizes.get(name)}")
    encoder = Shape(**numbers)
    if encoder.width % encoder.num_heads:
        raise InputError(
            f"text.width {encoder.width} is not divisible by text.num_heads {encoder.num_heads}"
        )
    for name, value, allowed in (
        ("pool", pool, POOLS),
        ("activation", activation, tuple(layers.ACTIVATIONS)),
        ("remat", remat, REMATS),
    ):
        if value not in allowed:
            raise InputError(f"unknown text.{name} {value!r}; {suggest(str(value), allowed)}")
    if pool != "eot" and eot_id is not None:
        raise InputError('text.eot_id is of text.pool="eot"')
    if eot_id is not None and not 0 <= eot_id < vocab_size:
        raise InputError(f"text.eot_id must be in 0 to {vocab_size - 1}, got {eot_id}")
    out = output_dim or encoder.width
    arguments = {
        "shape": encoder,
        "vocab_size": vocab_size,
        "length": length,
        "pool": pool,
        "eot_id": eot_id,
        "is_causal": is_causal,
        "output_dim": out,
        "head_bias": head_bias,
        "activation": activation,
        "eps": eps,
        "scan": scan,
        "remat": remat,
        "precision": precision,
    }
    description = numbers | {"vocab_size": vocab_size, "length": length, "output_dim": out}
    flops = _count_flops(encoder, length, pool, out)
    return Model(TextTransformer, tuple(arguments.items()), tuple(description.items()), flops)
