"""How well masked patches are predicted: a number, and pictures.

Array letters: B batch, Y X image, C channels, P patches.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess, to_unit
from vitjax.errors import InputError
from vitjax.evals.drawing import draw_grid
from vitjax.evals.evaluation import once
from vitjax.evals.passes import Pass
from vitjax.explain.grid import grid_of

GREY = 0.5
COLUMNS = ("original", "masked", "reconstruction")


def to_pixels(images: Float[Array, "B Y X C"], preprocess: Preprocess) -> Float[Array, "B Y X C"]:
    """What the model sees back to values in [0, 1]; what lies outside is cut off."""
    zero, one = (preprocess.normalise(jnp.full((1, 1, 1, images.shape[-1]), v)) for v in (0.0, 1.0))
    return jnp.clip((images - zero) / (one - zero), 0, 1)


def on_pixels(
    masked: Bool[Array, "B P"], grid: tuple[int, int], size: tuple[int, int]
) -> Bool[Array, "B Y X 1"]:
    """Which pixels lie in a masked patch."""
    cells = masked.reshape(-1, *grid)
    tall = jnp.repeat(cells, size[0] // grid[0], axis=1)
    return jnp.repeat(tall, size[1] // grid[1], axis=2)[..., None]


def psnr(squared_error: float) -> float:
    """The peak signal-to-noise ratio in dB of a mean squared error, of values in [0, 1]."""
    return -10 * math.log10(max(squared_error, 1e-10))


class Reconstruction:
    """The peak signal-to-noise ratio of masked patches' pixels, over a whole set.

    The squared error is averaged over all masked pixels of the set before the logarithm. The masks
    are the same at every evaluation.

    Args:
      objective: with `reconstruct`, such as `objectives.mae:MAE`.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
      num_pictures: images that `pictures` shows, at most a batch.
      seed: of the masks.

    Raises:
      InputError: the objective reconstructs nothing.

    Source: the pictures are those of He et al. 2022 (arXiv 2111.06377), figure 2.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        mesh: Mesh,
        batch_size: int = 256,
        num_pictures: int = 8,
        seed: int = 0,
    ):
        if not hasattr(objective, "reconstruct"):
            raise InputError(
                f"the objective {type(objective).__name__} reconstructs no images, which this "
                "evaluation needs; vitjax.objectives.mae:MAE does"
            )
        self._num_pictures = min(num_pictures, len(loader.source))

        def run(params, extra, batch):
            key = jax.random.fold_in(jax.random.key(seed), batch["index"][0])
            found = objective.reconstruct(params, extra, batch, key)
            original = to_unit(batch["pixels"])
            height, width = original.shape[1:3]
            grid = grid_of(objective.model, height, width)
            hidden = on_pixels(found["masked"], grid, (height, width))
            made = to_pixels(found["reconstruction"], loader.preprocess)
            counted = hidden & batch["mask"][:, None, None, None]
            errors = jnp.where(counted, (made - original) ** 2, 0.0).sum()
            pixels = counted.sum().astype(jnp.float32) * original.shape[-1]
            images = (original, jnp.where(hidden, GREY, original), made)
            shown = {k: to_uint8(v[:num_pictures]) for k, v in zip(COLUMNS, images, strict=True)}
            return errors, pixels, batch["mask"].sum(), shown

        def to_uint8(values):
            return jnp.round(values * 255).astype(jnp.uint8)

        self._pass = Pass(run, loader, mesh, batch_size)

    def _run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        totals, first = np.zeros(3), None
        for *sums, shown in self._pass(state):
            totals += [float(x) for x in sums]
            first = first or shown
        assert first is not None
        error = totals[0] / max(totals[1], 1)
        return {"psnr": psnr(error), "masked_mse": error, "examples": int(totals[2])}, first

    def _results(self, state: Any) -> Any:
        return once(("reconstruction", id(self), id(state)), lambda: self._run(state))

    def __call__(self, state: Any) -> dict[str, float]:
        """`psnr` in dB, and `masked_mse`, the squared error of pixels in [0, 1]."""
        return self._results(state)[0]

    def pictures(self, state: Any) -> dict[str, bytes]:
        """The first images: original, what the model sees, and its reconstruction."""
        if self._num_pictures < 1:
            return {}
        numbers, first = self._results(state)
        columns = {name: list(first[name][: self._num_pictures]) for name in COLUMNS}
        title = f"masked patches: {numbers['psnr']:.1f} dB over {numbers['examples']} images"
        return {"reconstruction": draw_grid(columns, title)}
