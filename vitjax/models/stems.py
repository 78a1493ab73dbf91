"""What comes before the Transformer where it is not patches alone: convolutions.

Array letters: B batch, Y X image, C channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.models.conv import Conv, max_pool
from vitjax.models.layers import LayerNorm
from vitjax.models.norms import GroupNorm
from vitjax.precision import Precision

STEMS = ("patch", "conv", "resnet")
EPS = 1e-6


def stride_of(stem: str, patch_size: int, blocks: tuple[int, ...]) -> int:
    """Pixels of the image along one side of a value of the stem's map."""
    if stem == "conv":
        return patch_size
    return 1 if stem == "patch" else 4 * 2 ** max(len(blocks) - 1, 0)


def conv_widths(patch_size: int, width: int) -> list[int]:
    """Channels of each stride-2 convolution: doubling, up to the Transformer's width."""
    count = int(math.log2(patch_size))
    return [width // 2 ** (count - 1 - i) for i in range(count)]


def check_stem(stem: str, patch_size: int, width: int, blocks: tuple[int, ...]) -> None:
    """Raises InputError for a stem that does not fit the patch size or the width."""
    stride = stride_of(stem, patch_size, blocks)
    if stem == "conv" and patch_size not in (4, 8, 16, 32):
        raise InputError(
            f'model.stem="conv" needs a patch size of 4, 8, 16 or 32, got {patch_size}'
        )
    if stem == "conv" and width % (patch_size // 2):
        raise InputError(
            f'model.stem="conv" needs a width divisible by {patch_size // 2}, got {width}'
        )
    if stem == "resnet" and patch_size % stride:
        raise InputError(
            f"model.patch_size={patch_size} must be a multiple of the ResNet's stride of {stride}"
        )


class ConvStem(nnx.Module):
    """Convolutions of 3 x 3 and stride 2, each with layer norm over channels and ReLU.

    Source: Xiao et al. 2021 (arXiv 2106.14881), with layer norm in the place of batch norm, which
    has a running state.
    """

    def __init__(self, channels: int, widths: list[int], *, precision: Precision, rngs: nnx.Rngs):
        for index, width in enumerate(widths, 1):
            conv = Conv(channels, width, 3, stride=2, padding=1, precision=precision, rngs=rngs)
            setattr(self, f"conv{index}", conv)
            norm = LayerNorm(width, precision=precision, eps=EPS, use_bias=True)
            setattr(self, f"norm{index}", norm)
            channels = width
        self.count = len(widths)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 D"]:
        for index in range(1, self.count + 1):
            x = getattr(self, f"norm{index}")(getattr(self, f"conv{index}")(x))
            x = jax.nn.relu(x)
        return x


class Unit(nnx.Module):
    """A bottleneck with its norms last."""

    def __init__(self, channels: int, inner: int, stride: int, precision, rngs):
        width = 4 * inner
        make: dict[str, Any] = {
            "precision": precision, "rngs": rngs, "padding": "SAME", "standardisation": "deviation",
        }  # fmt: skip
        norm: dict[str, Any] = {"precision": precision, "eps": EPS}
        is_first = channels != width or stride != 1
        self.shortcut = Conv(channels, width, 1, stride=stride, **make) if is_first else None
        self.shortcut_norm = GroupNorm(width, **norm) if is_first else None
        self.conv1 = Conv(channels, inner, 1, **make)
        self.norm1 = GroupNorm(inner, **norm)
        self.conv2 = Conv(inner, inner, 3, stride=stride, **make)
        self.norm2 = GroupNorm(inner, **norm)
        self.conv3 = Conv(inner, width, 1, **make)
        self.norm3 = GroupNorm(width, **norm)
        self.norm3.scale[...] = jnp.zeros_like(self.norm3.scale[...])  # a unit starts as a shortcut

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "..."]:
        shortcut = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut(x))
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        return jax.nn.relu(shortcut + self.norm3(self.conv3(y)))


class Stage(nnx.Module):
    """Units, by number."""


class ResNetStem(nnx.Module):
    """The ResNet of the hybrid Vision Transformers: group norm and standardised weights.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1, as in vision_transformer.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: tuple[int, ...],
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.root = Conv(
            channels, width, 7, stride=2, padding="SAME", standardisation="deviation",
            precision=precision, rngs=rngs,
        )  # fmt: skip
        self.root_norm = GroupNorm(width, precision=precision, eps=EPS)
        before = width
        for stage, count in enumerate(blocks):
            made: Any = Stage()
            inner = width * 2**stage
            for unit in range(count):
                stride = 2 if stage and not unit else 1
                setattr(made, f"unit{unit + 1}", Unit(before, inner, stride, precision, rngs))
                before = 4 * inner
            setattr(self, f"stage{stage + 1}", made)
        self.blocks = blocks

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 D"]:
        x = max_pool(jax.nn.relu(self.root_norm(self.root(x))), "SAME")
        for stage, count in enumerate(self.blocks, 1):
            for unit in range(1, count + 1):
                x = getattr(getattr(self, f"stage{stage}"), f"unit{unit}")(x)
        return x


def count_stem(
    stem: str, patch_size: int, image_size: int, channels: int, width: int,
    blocks: tuple[int, ...], root: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Channels out, parameters, and multiply-accumulates of one image."""
    if stem == "patch":
        return channels, 0, 0
    params = macs = 0
    side = image_size
    if stem == "conv":
        for out in conv_widths(patch_size, width):
            side //= 2
            params += 9 * channels * out + 2 * out
            macs += 9 * channels * out * side**2
            channels = out
        return channels, params, macs
    side = -(-side // 2)
    params, macs = 49 * channels * root + 2 * root, 49 * channels * root * side**2
    side, channels = -(-side // 2), root
    for stage, count in enumerate(blocks):
        inner = root * 2**stage
        for unit in range(count):
            before, stride = side, 2 if stage and not unit else 1
            side = -(-side // stride)
            kernels = (channels * inner, 9 * inner * inner, 4 * inner * inner)
            params += sum(kernels) + 2 * (inner + inner + 4 * inner)
            macs += kernels[0] * before**2 + (kernels[1] + kernels[2]) * side**2
            if channels != 4 * inner or stride != 1:
                params += 4 * channels * inner + 8 * inner
                macs += 4 * channels * inner * side**2
            channels = 4 * inner
    return channels, params, macs
