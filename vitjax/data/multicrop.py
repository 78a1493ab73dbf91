"""Several random crops of each image, on the device.

Array letters: B batch, V crops of an image, Y X image, S size of a crop, C channels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.config import build_all
from vitjax.data.augment import Batch, check_interval
from vitjax.errors import InputError


def _weights(
    start: Float[Array, "B"], length: Float[Array, "B"], size: int, pixels: int
) -> Float[Array, "B S Y"]:
    """With which a line of pixels becomes `size` values of the part that begins at `start`:
    bilinear, and where it shrinks a triangle of that width."""
    scale = length / size
    centre = start[:, None] + (jnp.arange(size)[None] + 0.5) * scale[:, None] - 0.5
    stretch = jnp.maximum(scale, 1.0)[:, None, None]
    distance = jnp.abs(jnp.arange(pixels)[None, None] - centre[:, :, None]) / stretch
    kernel = jnp.maximum(0.0, 1.0 - distance)
    return kernel / jnp.maximum(kernel.sum(-1, keepdims=True), 1e-6)


def random_crops(
    key: jax.Array,
    images: Float[Array, "B Y X C"],
    size: int,
    area: tuple[float, float],
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "B S S C"]:
    """A random part of each image, resized with antialiasing.

    Two matrix products an image, in which rows and columns are weighted: no gathers.

    Args:
      area: between which shares of the image's area a part's is drawn.
      aspect: its width over its height; a side that would be longer than the image is cut.
    """
    number, height, width, _ = images.shape
    keys = jax.random.split(key, 4)
    share = jax.random.uniform(keys[0], (number,), minval=area[0], maxval=area[1])
    low, high = (math.log(a) for a in aspect)
    ratio = jnp.exp(jax.random.uniform(keys[1], (number,), minval=low, maxval=high))
    y = jnp.minimum(jnp.sqrt(height * width * share / ratio), height)
    x = jnp.minimum(jnp.sqrt(height * width * share * ratio), width)
    top = jax.random.uniform(keys[2], (number,)) * (height - y)
    left = jax.random.uniform(keys[3], (number,)) * (width - x)
    rows, columns = _weights(top, y, size, height), _weights(left, x, size, width)
    return jnp.einsum("bsy,btx,byxc->bstc", rows, columns, images, optimize=True)


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """Adds `global_images` [B, 2, S, S, C] and `local_images` [B, V, s, s, C] to a batch.

    Attributes:
      global_size, local_size: pixels along their sides, divisible by the model's patch size.
      num_local: local crops of an image, 0 for none.
      global_area, local_area: shares of the image's area between which theirs are drawn.
      operations: blocks of other augmentations, run on each crop by itself; of global crops the
        second goes through `second_operations`, where they are given.

    Source: Caron et al. 2020 (arXiv 2006.09882) and 2021 (arXiv 2104.14294).
    """

    global_size: int
    local_size: int = 0
    num_local: int = 0
    global_area: tuple[float, float] = (0.32, 1.0)
    local_area: tuple[float, float] = (0.05, 0.32)
    operations: Sequence[Any] = ()
    second_operations: Sequence[Any] | None = None

    def __post_init__(self):
        if self.global_size < 1 or self.num_local < 0 or (self.num_local and self.local_size < 1):
            raise InputError(
                "MultiCrop needs a positive global_size, num_local of 0 or more, and with local "
                f"crops a positive local_size; got {self.global_size}, {self.num_local}, "
                f"{self.local_size}"
            )
        for name in ("global_area", "local_area"):
            check_interval(f"MultiCrop.{name}", getattr(self, name), 1e-3, 1)
        second = self.operations if self.second_operations is None else self.second_operations
        object.__setattr__(self, "_built", (build_all(self.operations), build_all(second)))

    def _crop(self, key, images, size, area, operations):
        keys = jax.random.split(key, 1 + len(operations))
        batch = {"images": random_crops(keys[0], images, size, area)}
        for operation, own in zip(operations, keys[1:], strict=True):
            batch = operation(own, batch)
        return batch["images"]

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images, (first, second) = batch["images"], self._built  # type: ignore[attr-defined]
        keys = jax.random.split(key, 2 + self.num_local)
        whole = [
            self._crop(k, images, self.global_size, self.global_area, operations)
            for k, operations in zip(keys[:2], (first, second), strict=True)
        ]
        added = {"global_images": jnp.stack(whole, axis=1)}
        if self.num_local:
            parts = [
                self._crop(k, images, self.local_size, self.local_area, first) for k in keys[2:]
            ]
            added["local_images"] = jnp.stack(parts, axis=1)
        return batch | added
