"""Where a patch lies: fixed and rotary positions, and learned ones brought to another grid.

Array letters: N patches, D width, K head width, R C rows and columns of patches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitjax.errors import InputError, suggest
from vitjax.precision import Precision

RESAMPLINGS = ("bicubic", "bicubic_antialias", "bilinear_antialias", "bilinear_corners")


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


def rope_angles(
    rows: int, cols: int, head_dim: int, theta: float
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
    """Sine and cosine of the rotary angles of a grid of patches, row-major.

    Patch centres lie in [-1, 1] along each side whatever the grid, so a model runs at any size.

    Source: DINOv3 (Simeoni et al. 2025, arXiv 2508.10104), axial frequencies after Heo et al.
    2024 (arXiv 2403.13298).
    """
    y, x = np.mgrid[:rows, :cols].astype(np.float32).reshape(2, -1)
    centres = np.stack([(y + 0.5) / rows, (x + 0.5) / cols], axis=1).astype(np.float32) * 2 - 1
    exponents = np.arange(head_dim // 4, dtype=np.float32) * np.float32(4 / head_dim)
    frequency = 1 / np.float32(theta) ** exponents
    angles = (2 * np.pi * centres[:, :, None] * frequency[None, None]).astype(np.float32)
    angles = np.tile(angles.reshape(len(centres), -1), (1, 2))
    return np.sin(angles), np.cos(angles)


def rotate(
    x: Float[Array, "B H M K"],
    angles: tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]
    | tuple[Float[Array, "B N K"], Float[Array, "B N K"]],
    precision: Precision,
) -> Float[Array, "B H M K"]:
    """Turns queries or keys of the patches, the last N of M tokens, by their angles in float32.

    The angles are the same for all images, or each image's own.
    """
    sin, cos = (jnp.expand_dims(jnp.asarray(a), (0, 1) if a.ndim == 2 else 1) for a in angles)
    tokens = x.shape[2]
    prefix = tokens - sin.shape[2]
    patches = precision.full_cast(jax.lax.slice_in_dim(x, prefix, tokens, axis=2))
    first, second = jnp.split(patches, 2, axis=-1)
    turned = patches * cos + jnp.concatenate([-second, first], axis=-1) * sin
    first_tokens = jax.lax.slice_in_dim(x, 0, prefix, axis=2)
    return jnp.concatenate([first_tokens, precision.compute_cast(turned)], axis=2)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def resize_matrix(size: int, new_size: int, method: str) -> Float[np.ndarray, "M N"]:
    """The weights with which a line of `size` values becomes one of `new_size`.

    Args:
      method: "bicubic" (no antialiasing, a = -0.75: PyTorch's default, as in Hugging Face's
        models), "bicubic_antialias" (a = -0.5, as in Pillow and timm), "bilinear_antialias" (as
        in FlexiViT and SigLIP 2), or "bilinear_corners" (first and last values kept, as in
        Google's vision_transformer and big_vision).
    """
    if method not in RESAMPLINGS:
        raise InputError(f"unknown position_resampling {method!r}; {suggest(method, RESAMPLINGS)}")
    target, source = np.arange(new_size)[:, None], np.arange(size)[None]
    if method == "bilinear_corners":
        centre = target * ((size - 1) / max(new_size - 1, 1))
        return np.maximum(0, 1 - np.abs(centre - source)).astype(np.float32)
    scale = size / new_size
    if method == "bicubic":
        centre = (target + 0.5) * scale - 0.5
        weights = np.zeros((new_size, size))
        for offset in range(-1, 3):  # beyond the border the last value counts again
            at = np.floor(centre[:, 0]).astype(int) + offset
            share = _cubic(centre[:, 0] - at, -0.75)
            np.add.at(weights, (np.arange(new_size), at.clip(0, size - 1)), share)
        return weights.astype(np.float32)
    stretch = max(scale, 1.0)
    distance = (source + 0.5 - (target + 0.5) * scale) / stretch
    kernel = _cubic(distance, -0.5) if "cubic" in method else np.maximum(0, 1 - np.abs(distance))
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def resize_positions(
    table: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: str,
) -> Float[Array, "M D"] | Float[np.ndarray, "M D"]:
    """Brings a learned table of patch positions to another grid; see `resize_matrix`.

    Args:
      table: row-major, patches only: no class token, no registers.

    Raises:
      InputError: the table does not hold `grid` positions.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.2.
    """
    if len(table) != grid[0] * grid[1]:
        raise InputError(f"a table of {len(table)} positions is no grid of {grid[0]} x {grid[1]}")
    if grid == new_grid:
        return table
    rows, cols = (resize_matrix(n, m, method) for n, m in zip(grid, new_grid, strict=True))
    square = table.reshape(*grid, -1)
    if isinstance(table, np.ndarray):
        return np.einsum("rn,cm,nmd->rcd", rows, cols, square, optimize=True).reshape(
            -1, square.shape[-1]
        )
    return jnp.einsum("rn,cm,nmd->rcd", rows, cols, square).reshape(-1, square.shape[-1])
