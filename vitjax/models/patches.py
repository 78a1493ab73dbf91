"""Patch embeddings of another patch size, or of another number of channels.

Array letters: P pixels and channels of a patch, D width.
"""

import numpy as np
from jaxtyping import Float

from vitjax.models.positions import resize_matrix

Kernel = Float[np.ndarray, "P D"]


def resize_patch_kernel(
    kernel: Kernel, patch_size: int, new_patch_size: int, channels: int
) -> Float[np.ndarray, "Q D"]:
    """Brings a patch embedding to another patch size by the pseudo-inverse of resizing.

    The new embedding of a resized patch is as near to the old embedding of the patch as it can
    be; where patches grow it is the same.

    Args:
      kernel: of patches flattened as (y, x, channel).

    Source: FlexiViT (Beyer et al. 2023, arXiv 2212.08013), section 3.4, with antialiased bilinear
    resizing.
    """
    if patch_size == new_patch_size:
        return kernel
    line = resize_matrix(patch_size, new_patch_size, "bilinear_antialias").astype(np.float64)
    inverse = np.linalg.pinv(line.T)  # the inverse of an outer product is that of its factors
    square = kernel.reshape(patch_size, patch_size, channels, -1)
    resized = np.einsum("ay,bx,yxcd->abcd", inverse, inverse, square, optimize=True)
    return resized.reshape(-1, kernel.shape[-1]).astype(kernel.dtype)


def adapt_patch_channels(
    kernel: Kernel, patch_size: int, channels: int, new_channels: int
) -> Float[np.ndarray, "Q D"]:
    """Brings a patch embedding to another number of input channels.

    One channel gets the sum over all, so a grey image is embedded as if it were repeated in every
    channel. Otherwise channels repeat in order, scaled by old / new, so that an image that is the
    same in all channels keeps its embedding where the old ones divide the new.

    Source: the common rule of timm (`adapt_input_conv`).
    """
    if channels == new_channels:
        return kernel
    square = kernel.reshape(patch_size**2, channels, -1)
    if new_channels == 1:
        adapted = square.sum(1, keepdims=True)
    else:
        adapted = square[:, np.arange(new_channels) % channels] * (channels / new_channels)
    return adapted.reshape(-1, kernel.shape[-1]).astype(kernel.dtype)
