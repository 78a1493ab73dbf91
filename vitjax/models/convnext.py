"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545): a convolutional network built like a Transformer.

Array letters: B batch, Y X image, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from vitjax.errors import InputError, suggest
from vitjax.models import layers
from vitjax.models.bit import Stage
from vitjax.models.conv import Conv, check_images, outputs
from vitjax.models.functional import Model
from vitjax.parallel import constrain
from vitjax.precision import Precision

SIZES = {
    "T": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "S": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "B": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "L": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "XL": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
INNER_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a ConvNeXt."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int
    channels: int
    num_classes: int


class Block(nnx.Module):
    """A depthwise convolution, then an MLP on every pixel."""

    def __init__(self, width: int, activation: str, layer_scale: float | None, precision, rngs):
        make: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.depthwise = Conv(width, width, 7, padding=3, groups=width, use_bias=True, **make)
        self.norm = layers.LayerNorm(width, precision=precision, eps=INNER_EPS, use_bias=True)
        self.up = layers.Linear((width,), (4 * width,), **make)
        self.down = layers.Linear((4 * width,), (width,), **make)
        start = jax.numpy.full((width,), layer_scale or 0.0, precision.params)
        self.layer_scale = None if layer_scale is None else nnx.Param(start)
        self.activation, self.precision = activation, precision

    def __call__(
        self, x: Float[Array, "B Y X C"], key: jax.Array | None, rate: float
    ) -> Float[Array, "B Y X C"]:
        y = self.norm(self.depthwise(x))
        y = self.down(layers.ACTIVATIONS[self.activation](self.up(y)))
        if self.layer_scale is not None:
            y = y * self.precision.compute_cast(self.layer_scale[...])[None, None, None]
        if key is not None and rate:
            flat = layers.dropout(y.reshape(y.shape[0], -1, y.shape[-1]), rate, key, whole=True)
            y = flat.reshape(y.shape)
        return x + y


class ConvNeXt(nnx.Module):
    """The network; see `convnext`."""

    def __init__(
        self,
        plan: Plan,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: str,
        eps: float,
        layer_scale: float | None,
        drop_path_rate: float,
        head_bias: float,
    ):
        make: dict[str, Any] = {"precision": precision, "rngs": rngs}
        norm: dict[str, Any] = {"precision": precision, "eps": INNER_EPS, "use_bias": True}
        widths, patch = plan.widths, plan.patch_size
        self.stem = Conv(plan.channels, widths[0], patch, stride=patch, use_bias=True, **make)
        self.stem_norm = layers.LayerNorm(widths[0], **norm)
        for number, (count, width) in enumerate(zip(plan.blocks, widths, strict=True), 1):
            stage: Any = Stage()
            if number > 1:
                before = widths[number - 2]
                stage.down_norm = layers.LayerNorm(before, **norm)
                stage.down = Conv(before, width, 2, stride=2, use_bias=True, **make)
            for unit in range(1, count + 1):
                block = Block(width, activation, layer_scale, precision, rngs)
                setattr(stage, f"unit{unit}", block)
            setattr(self, f"stage{number}", stage)
        self.norm = layers.LayerNorm(widths[-1], precision=precision, eps=eps, use_bias=True)
        head = {"zero_init": True, "bias_value": head_bias}
        self.head = (
            layers.Linear((widths[-1],), (plan.num_classes,), **make, **head)
            if plan.num_classes
            else None
        )
        self.plan, self.precision, self.drop_path_rate = plan, precision, drop_path_rate

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        key: jax.Array | None = None,
        *,
        intermediates: bool = False,
        offsets: Mapping[str, Array] | None = None,
    ) -> dict[str, Any]:
        """`tokens` [B, N, C] is the last map, row-major; else as a ViT's.

        `intermediates` adds `stages`: the output of the stem and of every stage. `offsets` may hold
        `features`, which are added to the last map [B, Y, X, C], for gradients with respect to it.
        """
        stride = self.plan.patch_size * 2 ** (len(self.plan.blocks) - 1)
        check_images(images, self.plan.channels, smallest=stride)
        x = self.stem_norm(self.stem(images))
        seen, index, total = [x], 0, sum(self.plan.blocks)
        for number, count in enumerate(self.plan.blocks, 1):
            stage: Any = getattr(self, f"stage{number}")
            if number > 1:
                x = stage.down(stage.down_norm(x))
            for unit in range(1, count + 1):
                rate = self.drop_path_rate * index / max(total - 1, 1)
                block_key = None if key is None else jax.random.fold_in(key, index)
                x = constrain(getattr(stage, f"unit{unit}")(x, block_key, rate), "B Y X C")
                index += 1
            seen.append(x)
        x = layers.displaced(x, "features", offsets)
        p = self.precision
        embedding = self.norm(p.compute_cast(p.full_cast(x).mean((1, 2))))
        out = outputs(x, embedding, self.head, p)
        return out | {"stages": seen} if intermediates else out


def count_params(plan: Plan, has_layer_scale: bool) -> int:
    """Parameters of the network, exactly."""
    first, last = plan.widths[0], plan.widths[-1]
    total = (plan.patch_size**2 * plan.channels + 1) * first + 2 * first
    for number, (count, width) in enumerate(zip(plan.blocks, plan.widths, strict=True)):
        if number:
            before = plan.widths[number - 1]
            total += 2 * before + (4 * before + 1) * width
        block = 50 * width + 2 * width + (width + 1) * 4 * width + (4 * width + 1) * width
        total += count * (block + width * has_layer_scale)
    return total + 2 * last + (last + 1) * plan.num_classes


def count_flops(plan: Plan, image_size: int) -> int:
    """FLOPs (2 x MAC) of the convolutions, the MLPs and the head, one image."""
    side = image_size // plan.patch_size
    macs = plan.patch_size**2 * plan.channels * plan.widths[0] * side**2
    for number, (count, width) in enumerate(zip(plan.blocks, plan.widths, strict=True)):
        if number:
            side //= 2
            macs += 4 * plan.widths[number - 1] * width * side**2
        macs += count * (49 * width + 8 * width * width) * side**2
    return 2 * (macs + plan.widths[-1] * plan.num_classes)


def convnext(
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    size: str | None = "T",
    blocks: tuple[int, ...] | None = None,
    widths: tuple[int, ...] | None = None,
    patch_size: int = 4,
    activation: str = "gelu",
    eps: float = 1e-6,
    layer_scale: float | None = 1e-6,
    drop_path_rate: float = 0.0,
    head_bias: float = 0.0,
    precision: Precision = Precision(),
) -> Model:
    """Describes a ConvNeXt by name ("T", "S", "B", "L", "XL") or by numbers.

    Args:
      num_classes: of the head, which starts at zero; 0 for no head.
      blocks, widths: of each stage; replace those of the named size.
      patch_size: of the stem, in pixels; every later stage halves the image.
      eps: of the last norm; the others have 1e-6.
      layer_scale: where the learned scale of each block starts; None for none.
      drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
      InputError: a name or numbers that make no model.
    """
    if not (blocks and widths) and size not in SIZES:
        raise InputError(f"unknown model.size {size!r}; {suggest(str(size), SIZES)}")
    named = SIZES.get(str(size), ((), ()))
    blocks, widths = tuple(blocks or named[0]), tuple(widths or named[1])
    if len(blocks) != len(widths) or min((*blocks, *widths, patch_size, num_classes + 1)) < 1:
        raise InputError(f"model.blocks={blocks} and model.widths={widths} make no network")
    if activation not in layers.ACTIVATIONS:
        raise InputError(
            f"unknown model.activation {activation!r}; {suggest(activation, layers.ACTIVATIONS)}"
        )
    if not 0 <= drop_path_rate < 1:
        raise InputError(f"model.drop_path_rate must be in [0, 1), got {drop_path_rate}")
    if layer_scale is not None and layer_scale <= 0:
        raise InputError(f"model.layer_scale must be positive or None, got {layer_scale}")
    stride = patch_size * 2 ** (len(blocks) - 1)
    if image_size < stride:
        raise InputError(f"image size {image_size} is below the network's stride of {stride}")
    plan = Plan(blocks, widths, patch_size, channels, num_classes)
    description = {
        "width": widths[-1],
        "depth": sum(blocks),
        "num_classes": num_classes,
        "num_tokens": (image_size // stride) ** 2,
        "patch_size": stride,
        "pool": "gap",
        "prefix_tokens": 0,
    }
    arguments = {
        "plan": plan,
        "activation": activation,
        "eps": eps,
        "layer_scale": layer_scale,
        "drop_path_rate": drop_path_rate,
        "head_bias": head_bias,
        "precision": precision,
    }
    flops = count_flops(plan, image_size)
    return Model(ConvNeXt, tuple(arguments.items()), tuple(description.items()), flops)
