"""The light Transformer that completes images from the tokens of visible patches (MAE).

Array letters: B batch, N tokens, P prefix tokens, K visible patches, M masked ones, D width,
W the decoder's width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vitjax.errors import InputError
from vitjax.models import layers
from vitjax.models.positions import sincos2d_positions
from vitjax.models.shapes import Geometry
from vitjax.parallel import constrain
from vitjax.precision import Precision


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder; the defaults are those of He et al. 2022.

    Raises:
      InputError: sizes that make no decoder.
    """

    width: int = 512
    depth: int = 8
    num_heads: int = 16
    mlp_dim: int | None = None  # four times the width

    def __post_init__(self):
        for name in ("width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"the decoder's {name} must be positive, got {self}")
        if self.width % self.num_heads or self.width % 4:
            raise InputError(
                f"the decoder's width {self.width} must be divisible by its {self.num_heads} "
                "heads, and by 4"
            )

    @property
    def hidden(self) -> int:
        return self.mlp_dim or 4 * self.width

    def flops(self, encoder: Geometry) -> int:
        """FLOPs (2 x MAC) of completing one image of an encoder of that geometry, all patches
        visible or not."""
        w, n, pixels = self.width, encoder.num_tokens, encoder.patch_size**2 * encoder.channels
        block = n * (4 * w * w + 2 * w * self.hidden) + 2 * n * n * w
        return 2 * (n * encoder.shape.width * w + self.depth * block + n * w * pixels)


class Decoder(nnx.Module):
    """Embeds the encoder's tokens, puts mask tokens between them, and predicts every patch.

    Positions are fixed sines and cosines. The blocks are stacked and scanned as the encoder's.

    Source: He et al. 2022 (arXiv 2111.06377), section 3 and its appendix.
    """

    def __init__(
        self, encoder: Geometry, shape: DecoderShape, *, eps: float, precision: Precision,
        scan: bool, rngs: nnx.Rngs,
    ):  # fmt: skip
        make: dict[str, Any] = {"precision": precision, "rngs": rngs}
        w = shape.width
        self.embed = layers.Linear((encoder.shape.width,), (w,), **make)
        drawn = jax.random.normal(rngs.params(), (1, w), precision.params)
        self.mask_token = nnx.Param(0.02 * drawn)

        def make_block(key):
            return layers.Block(
                w, shape.hidden, shape.num_heads, precision=precision, rngs=nnx.Rngs(params=key),
                activation="gelu", eps=eps, qkv_bias=True, key_bias=True, out_bias=True,
                norm_bias=True, qk_norm=False, qk_norm_bias=False, parallel=False,
                gated_mlp=False, mlp_bias=True, layer_scale=None, dropout_rate=0.0,
                use_drop_path=False, lora={},
            )  # fmt: skip

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), shape.depth))
        self.norm = layers.LayerNorm(w, precision=precision, eps=eps, use_bias=True)
        pixels = encoder.patch_size**2 * encoder.channels
        self.predict = layers.Linear((w,), (pixels,), **make)
        self.num_prefix, self.precision, self.scan = encoder.num_prefix, precision, scan

    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        restore: Int[Array, "B P"],
        grid: tuple[int, int],
    ) -> Float[Array, "B P O"]:
        """Predicts the pixels of all patches, row-major.

        Args:
          tokens: of the encoder: prefix tokens, then the visible patches in the order they were
            kept.
          restore: for each patch where it stands in "visible, then masked".
          grid: rows and columns of patches.
        """
        p = self.precision
        x = self.embed(tokens)
        prefix, visible = x[:, : self.num_prefix], x[:, self.num_prefix :]
        token = p.compute_cast(self.mask_token[...])[None]
        missing = (x.shape[0], restore.shape[1] - visible.shape[1], x.shape[2])
        x = jnp.concatenate([visible, jnp.broadcast_to(token, missing)], axis=1)
        x = jnp.take_along_axis(x, restore[:, :, None], axis=1)
        table = sincos2d_positions(*grid, x.shape[2])
        x = x + p.compute_cast(jnp.asarray(table))[None]
        x = jnp.concatenate([prefix, x], axis=1)
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, params):
            x = constrain(x, "B N D")
            return nnx.merge(graphdef, params)(x, None, jnp.zeros(()))[0], None

        depth = jax.tree.leaves(stacked)[0].shape[0]
        x, _ = jax.lax.scan(body, x, stacked, unroll=1 if self.scan else depth)
        return p.full_cast(self.predict(self.norm(x)[:, self.num_prefix :]))
