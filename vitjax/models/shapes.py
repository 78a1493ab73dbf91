"""Named Vision Transformer shapes, and exact parameter and FLOP counts.

Every count in the project comes from here. FLOPs are 2 x MAC, one image, forward.
"""

import dataclasses

from vitjax.errors import InputError, suggest
from vitjax.models import stems


@dataclasses.dataclass(frozen=True)
class Shape:
    """The four numbers that make a Transformer encoder."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


# Sources: ViT (arXiv 2010.11929), Scaling ViT (2106.04560), SoViT (2305.13035), ViT-22B
# (2302.05442), and big_vision for the "opt" shapes.
SHAPES = {
    "Ti": Shape(192, 12, 768, 3),
    "s": Shape(256, 6, 1024, 8),
    "S": Shape(384, 12, 1536, 6),
    "B": Shape(768, 12, 3072, 12),
    "So150m": Shape(880, 18, 2320, 16),
    "L": Shape(1024, 24, 4096, 16),
    "So400m": Shape(1152, 27, 4304, 16),
    "H": Shape(1280, 32, 5120, 16),
    "g": Shape(1408, 40, 6144, 16),
    "g-opt": Shape(1536, 40, 6144, 16),
    "G": Shape(1664, 48, 8192, 16),
    "G-opt": Shape(1536, 48, 8192, 16),
    "e": Shape(1792, 56, 15360, 16),
    "22B": Shape(6144, 48, 24576, 48),
}


def parse_shape(name: str) -> tuple[Shape, int]:
    """Splits a name such as "B/16" into the encoder's shape and the patch size in pixels."""
    size, slash, patch = name.partition("/")
    if size not in SHAPES:
        raise InputError(f"unknown model shape {size!r} in {name!r}; {suggest(size, SHAPES)}")
    if not slash or not patch.isdigit() or int(patch) == 0:
        raise InputError(
            f"model shape {name!r} needs a patch size after a slash, as in '{size}/16'"
        )
    return SHAPES[size], int(patch)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything that decides how many parameters and FLOPs a ViT has; see `vitjax.models.vit`."""

    shape: Shape
    patch_size: int
    image_size: int
    channels: int
    num_classes: int
    pool: str = "gap"
    positions: str = "learned"
    qkv_bias: bool = True
    norm_bias: bool = True
    qk_norm: bool = False
    parallel: bool = False
    key_bias: bool = True
    cls_token: bool = False
    distill_token: bool = False
    distill_head: bool = False
    num_registers: int = 0
    input_sizes: tuple[int, ...] = ()
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    mask_token: bool = False
    position_prefix: str = "cls"
    pre_norm: bool = False
    norm_after_pool: bool = False
    patch_bias: bool = True
    out_bias: bool = True
    mlp: str = "dense"
    mlp_bias: bool = True
    qk_norm_bias: bool = False
    has_layer_scale: bool = False
    pre_logits_dim: int | None = None
    projection_dim: int | None = None
    table_size: int | None = None
    stem: str = "patch"
    stem_blocks: tuple[int, ...] = ()
    stem_width: int = 64

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def table_grid(self) -> int:
        """Patches along one side of the image for which the learned positions are made."""
        return (self.table_size or self.image_size) // self.patch_size

    @property
    def qkv_biases(self) -> int:
        """How many of queries, keys and values have a bias."""
        return (2 + self.key_bias) * self.qkv_bias

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class, distillation, register and input tokens."""
        return self.num_learned + len(self.input_sizes)

    @property
    def num_learned(self) -> int:
        """Of them those that are parameters."""
        return self.cls_token + self.distill_token + self.num_registers

    @property
    def num_tokens(self) -> int:
        """Tokens in the encoder."""
        return self.num_patches + self.num_prefix

    @property
    def num_positions(self) -> int:
        """Rows of a learned table of positions."""
        prefix = {
            "none": 0,
            "cls": self.cls_token + self.distill_token,
            "all": self.num_learned,
        }
        return self.table_grid**2 + prefix[self.position_prefix]

    @property
    def patch_dim(self) -> int:
        """Values in a patch, of the image or of the stem's map."""
        return (self.patch_size // self.stem_stride) ** 2 * self.stem_counts[0]

    @property
    def stem_stride(self) -> int:
        return stems.stride_of(self.stem, self.patch_size, self.stem_blocks)

    @property
    def stem_counts(self) -> tuple[int, int, int]:
        """Channels out, parameters and multiply-accumulates of the stem."""
        return stems.count_stem(
            self.stem, self.patch_size, self.image_size, self.channels, self.shape.width,
            self.stem_blocks, self.stem_width,
        )  # fmt: skip

    @property
    def pooled_dim(self) -> int:
        return self.shape.width * (2 if self.pool == "cls_gap" else 1)

    @property
    def embedding_dim(self) -> int:
        """Width of what the head sees."""
        return self.projection_dim or self.pre_logits_dim or self.pooled_dim


def _mlp_params(g: Geometry) -> int:
    d, f = g.shape.width, g.shape.mlp_dim * (2 if g.mlp == "gated" else 1)
    return d * f + g.shape.mlp_dim * d + (f + d) * g.mlp_bias


def _lora_sides(g: Geometry) -> int:
    """Inputs and outputs of a block's layers with low-rank updates: parameters for each rank."""
    d, f, ups = g.shape.width, g.shape.mlp_dim, 2 if g.mlp == "gated" else 1
    sides = {"qkv": d + 3 * d, "out": d + d, "mlp": (d + ups * f) + (f + d)}
    return sum(sides[name] for name in g.lora_targets) if g.lora_rank else 0


def count_params(g: Geometry) -> dict[str, int]:
    """Parameters by part (embedding, blocks, head); the total is their sum."""
    d, f = g.shape.width, g.shape.mlp_dim
    head_dim = d // g.shape.num_heads
    norm = d * (1 + g.norm_bias)
    attention = 4 * d * d + d * g.qkv_biases + d * g.out_bias
    qk_norm = 2 * head_dim * (1 + g.qk_norm_bias) * g.qk_norm
    block = attention + qk_norm + _mlp_params(g) + norm * (1 if g.parallel else 2)
    block += 2 * d * g.has_layer_scale + g.lora_rank * _lora_sides(g)
    embedding = g.stem_counts[1] + g.patch_dim * d + d * g.patch_bias
    embedding += g.num_positions * d if g.positions == "learned" else 0
    embedding += (sum(g.input_sizes) + 2 * len(g.input_sizes)) * d  # kernels, biases, missing
    embedding += (g.num_learned + g.mask_token) * d + norm * g.pre_norm
    head = g.pooled_dim * (1 + g.norm_bias) if g.norm_after_pool else norm
    if g.pool == "map":  # a probe, attention with biases, a norm and an MLP
        head += d + (4 * d * d + 4 * d) + norm + 2 * d * f + f + d
    pooled = g.pooled_dim
    if g.pre_logits_dim:
        head, pooled = head + (pooled + 1) * g.pre_logits_dim, g.pre_logits_dim
    head += pooled * (g.projection_dim or 0)
    head += (g.embedding_dim + 1) * g.num_classes
    head += (d + 1) * g.num_classes * g.distill_head
    return {"embedding": embedding, "blocks": g.shape.depth * block, "head": head}


def count_flops(g: Geometry, *, elementwise: bool = False, kept: int | None = None) -> int:
    """FLOPs (2 x MAC) of one forward pass of one image.

    Args:
      g: the geometry.
      kept: how many patches are encoded; None for all.
      elementwise: also count additions, norms, softmax and GELU, one for each arithmetic
        operation but none for exp, tanh and rsqrt, as XLA's cost analysis does. So counted,
        with global average pooling and a head of 29,593 classes, the numbers equal the table of
        Zhai et al. 2021 (arXiv 2106.04560) to every printed digit. Leave it off for MFU.
    """
    d, f, depth, n = g.shape.width, g.shape.mlp_dim, g.shape.depth, g.num_tokens
    n = n if kept is None else n - g.num_patches + kept
    is_gated = g.mlp == "gated"
    macs = g.stem_counts[2] + g.num_patches * g.patch_dim * d
    macs += depth * n * (4 * d * d + (3 if is_gated else 2) * d * f) + depth * 2 * n * n * d
    macs += depth * n * g.lora_rank * _lora_sides(g) + sum(g.input_sizes) * d
    if g.pool == "map":  # keys and values of every token, one query, one MLP
        macs += 2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * f
    pooled = g.pooled_dim
    if g.pre_logits_dim:
        macs, pooled = macs + pooled * g.pre_logits_dim, g.pre_logits_dim
    macs += pooled * (g.projection_dim or 0)
    macs += (g.embedding_dim + d * g.distill_head) * g.num_classes
    total = 2 * macs
    if elementwise:
        norms = 14 if not g.parallel else 7
        biases = g.qkv_biases + g.out_bias + g.mlp_bias + 2 * g.has_layer_scale
        hidden = 9 - (not g.mlp_bias) - 3 * is_gated  # a gate's sigmoid costs less than GELU
        per_token = (norms + biases + 3) * d + hidden * f  # residuals and the query's scale
        logits = 4 * g.shape.num_heads * n * n  # max, subtract, sum, divide
        total += depth * (n * per_token + logits)
        total += n * d * (2 + 7 + 1)  # patch bias and positions, final norm, mean over tokens
    return total
