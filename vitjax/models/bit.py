"""BiT: a ResNet-v2 with group norm and standardised weights (arXiv 1912.11370).

The convolutional baseline of the Vision Transformer papers, in the same trainer.
Array letters: B batch, Y X image, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.errors import InputError, suggest
from vitjax.models import layers
from vitjax.models.conv import Conv, check_images, max_pool, outputs
from vitjax.models.functional import Model
from vitjax.models.norms import GroupNorm
from vitjax.parallel import constrain
from vitjax.precision import Precision

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a BiT: blocks of each stage, channels of the root and behind each stage."""

    blocks: tuple[int, ...]
    root: int
    widths: tuple[int, ...]
    groups: int
    channels: int
    num_classes: int

    def units(self) -> list[tuple[str, int, int, int, bool]]:
        """Path, channels in and out, stride, and whether it is a stage's first unit, in order.

        First units have a convolution in their shortcut, even where it would not need one.
        """
        found, channels = [], self.root
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            for unit in range(1, count + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                found.append((f"stage{stage}/unit{unit}", channels, width, stride, unit == 1))
                channels = width
        return found


class Unit(nnx.Module):
    """A bottleneck with its norms first (He et al. 2016, arXiv 1603.05027)."""

    def __init__(
        self, channels: int, width: int, stride: int, is_first: bool, groups: int, precision, rngs
    ):
        inner = width // 4
        make: dict[str, Any] = {"precision": precision, "rngs": rngs, "standardisation": "variance"}
        norm: dict[str, Any] = {"precision": precision, "eps": EPS, "groups": groups}
        self.norm1 = GroupNorm(channels, **norm)
        self.shortcut = Conv(channels, width, 1, stride=stride, **make) if is_first else None
        self.conv1 = Conv(channels, inner, 1, **make)
        self.norm2 = GroupNorm(inner, **norm)
        self.conv2 = Conv(inner, inner, 3, stride=stride, padding=1, **make)
        self.norm3 = GroupNorm(inner, **norm)
        self.conv3 = Conv(inner, width, 1, **make)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "..."]:
        y = jax.nn.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(jax.nn.relu(self.norm2(self.conv1(y))))
        return shortcut + self.conv3(jax.nn.relu(self.norm3(y)))


class Stage(nnx.Module):
    """Units, by number."""


class BiT(nnx.Module):
    """The network; see `bit`."""

    def __init__(self, plan: Plan, *, head_bias: float, precision: Precision, rngs: nnx.Rngs):
        make: dict[str, Any] = {"precision": precision, "rngs": rngs}
        self.root = Conv(
            plan.channels, plan.root, 7, stride=2, padding=3, standardisation="variance", **make
        )
        for path, channels, width, stride, is_first in plan.units():
            stage, unit = path.split("/")
            if not hasattr(self, stage):
                setattr(self, stage, Stage())
            made = Unit(channels, width, stride, is_first, plan.groups, precision, rngs)
            setattr(getattr(self, stage), unit, made)
        width = plan.widths[-1]
        self.norm = GroupNorm(width, precision=precision, eps=EPS, groups=plan.groups)
        head = {"zero_init": True, "bias_value": head_bias}
        self.head = (
            layers.Linear((width,), (plan.num_classes,), **make, **head)
            if plan.num_classes
            else None
        )
        self.plan, self.precision = plan, precision

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        key: jax.Array | None = None,
        *,
        intermediates: bool = False,
        offsets: Mapping[str, Array] | None = None,
    ) -> dict[str, Any]:
        """`tokens` [B, N, C] is the last map after its norm, row-major; else as a ViT's.

        There is nothing random, so the key does nothing. `intermediates` adds `stages`: the output
        of the root and of every stage. `offsets` may hold `features`, which are added to the last
        map [B, Y, X, C], for gradients with respect to it.
        """
        del key
        check_images(images, self.plan.channels, smallest=1)
        x = self.root(images)
        x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), "VALID")
        seen = [x]
        for number, count in enumerate(self.plan.blocks, 1):
            stage = getattr(self, f"stage{number}")
            for unit in range(1, count + 1):
                x = constrain(getattr(stage, f"unit{unit}")(x), "B Y X C")
            seen.append(x)
        x = layers.displaced(jax.nn.relu(self.norm(x)), "features", offsets)
        p = self.precision
        embedding = p.compute_cast(p.full_cast(x).mean((1, 2)))
        out = outputs(x, embedding, self.head, p)
        return out | {"stages": seen} if intermediates else out


def count_params(plan: Plan) -> int:
    """Parameters of the network, exactly."""
    total = 49 * plan.channels * plan.root
    for _, channels, width, _, is_first in plan.units():
        inner = width // 4
        total += channels * inner + 9 * inner * inner + inner * width + 2 * (channels + 2 * inner)
        total += channels * width * is_first
    return total + 2 * plan.widths[-1] + (plan.widths[-1] + 1) * plan.num_classes


def count_flops(plan: Plan, image_size: int) -> int:
    """FLOPs (2 x MAC) of the convolutions and the head, one image."""
    side = (image_size + 1) // 2
    macs = 49 * plan.channels * plan.root * side * side
    side = (side - 1) // 2 + 1
    for _, channels, width, stride, is_first in plan.units():
        inner, before = width // 4, side
        side = (side - 1) // stride + 1
        macs += channels * inner * before**2 + (9 * inner * inner + inner * width) * side**2
        macs += channels * width * side**2 * is_first
    return 2 * (macs + plan.widths[-1] * plan.num_classes)


def bit(
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    depth: int = 50,
    width_factor: int = 1,
    blocks: tuple[int, ...] | None = None,
    widths: tuple[int, ...] | None = None,
    root_width: int | None = None,
    groups: int = 32,
    head_bias: float = 0.0,
    precision: Precision = Precision(),
) -> Model:
    """Describes a BiT by depth and width factor, or by numbers.

    Args:
      num_classes: of the head, which starts at zero; 0 for no head.
      depth: 50, 101 or 152.
      width_factor: multiplies all channels (1, 2, 3 or 4 in the paper).
      blocks, widths, root_width: replace the numbers that depth and width factor give.
      groups: of the group norms; they divide all channels.

    Raises:
      InputError: numbers that make no model.
    """
    if blocks is None and depth not in DEPTHS:
        raise InputError(f"unknown model.depth {depth}; {suggest(str(depth), map(str, DEPTHS))}")
    blocks = tuple(blocks or DEPTHS[depth])
    widths = tuple(widths or (256 * width_factor * 2**i for i in range(len(blocks))))
    root = root_width or 64 * width_factor
    if len(widths) != len(blocks) or min((*blocks, *widths, num_classes + 1)) < 1:
        raise InputError(f"model.blocks={blocks} and model.widths={widths} make no network")
    if groups < 1:
        raise InputError(f"model.groups must be at least 1, got {groups}")
    if any(width % (4 * groups) for width in widths) or root % groups:
        raise InputError(
            f"model.groups={groups} must divide the root's {root} channels and a quarter of "
            f"the widths {widths}"
        )
    plan = Plan(blocks, root, widths, groups, channels, num_classes)
    side = image_size
    for _ in range(1 + len(blocks)):
        side = (side + 1) // 2
    description = {
        "width": widths[-1],
        "depth": sum(blocks),
        "num_classes": num_classes,
        "num_tokens": side * side,
        "patch_size": 2 ** (1 + len(blocks)),
        "pool": "gap",
        "prefix_tokens": 0,
    }
    arguments = {"plan": plan, "head_bias": head_bias, "precision": precision}
    flops = count_flops(plan, image_size)
    return Model(BiT, tuple(arguments.items()), tuple(description.items()), flops)
