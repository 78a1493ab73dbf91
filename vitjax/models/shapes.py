"""Named Vision Transformer shapes, and exact parameter and FLOP counts.

Every count in the project comes from here. FLOPs are 2 x MAC, one image, forward.
"""

import dataclasses

from vitjax.errors import InputError, suggest


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
    """Everything that decides how many parameters and FLOPs a ViT has."""

    shape: Shape
    patch_size: int
    image_size: int
    channels: int
    num_classes: int
    pool: str
    positions: str
    qkv_bias: bool
    norm_bias: bool
    qk_norm: bool
    parallel: bool

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_tokens(self) -> int:
        """Tokens in the encoder: the patches, and the class token where there is one."""
        return self.num_patches + (self.pool == "cls")

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.channels


def count_params(g: Geometry) -> dict[str, int]:
    """Parameters by part (embedding, blocks, head); the total is their sum."""
    d, f = g.shape.width, g.shape.mlp_dim
    head_dim = d // g.shape.num_heads
    norm = d * (1 + g.norm_bias)
    mlp = 2 * d * f + f + d
    attention = 4 * d * d + (3 * d) * g.qkv_bias + d
    qk_norm = 2 * head_dim * g.qk_norm
    block = attention + qk_norm + mlp + norm * (1 if g.parallel else 2)
    embedding = g.patch_dim * d + d
    embedding += g.num_tokens * d if g.positions == "learned" else 0
    embedding += d if g.pool == "cls" else 0
    head = norm + (d * g.num_classes + g.num_classes if g.num_classes else 0)
    if g.pool == "map":  # a probe, attention with biases, a norm and an MLP
        head += d + (4 * d * d + 4 * d) + norm + mlp
    return {"embedding": embedding, "blocks": g.shape.depth * block, "head": head}


def count_flops(g: Geometry, *, elementwise: bool = False) -> int:
    """FLOPs (2 x MAC) of one forward pass of one image.

    Args:
      g: the geometry.
      elementwise: also count additions, norms, softmax and GELU, one for each arithmetic
        operation but none for exp, tanh and rsqrt, as XLA's cost analysis does. So counted,
        with global average pooling and a head of 29,593 classes, the numbers equal the table of
        Zhai et al. 2021 (arXiv 2106.04560) to every printed digit. Leave it off for MFU.
    """
    d, f, depth, n = g.shape.width, g.shape.mlp_dim, g.shape.depth, g.num_tokens
    macs = g.num_patches * g.patch_dim * d
    macs += depth * n * (4 * d * d + 2 * d * f) + depth * 2 * n * n * d
    macs += d * g.num_classes
    if g.pool == "map":  # keys and values of every token, one query, one MLP
        macs += 2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * f
    total = 2 * macs
    if elementwise:
        norms = 14 if not g.parallel else 7
        per_token = (norms + 3 * g.qkv_bias + 5) * d + 9 * f  # biases, residuals, query scale, GELU
        logits = 4 * g.shape.num_heads * n * n  # max, subtract, sum, divide
        total += depth * (n * per_token + logits)
        total += n * d * (2 + 7 + 1)  # patch bias and positions, final norm, mean over tokens
    return total
