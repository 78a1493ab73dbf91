"""What patch tokens differ in most: their first principal components as colours.

Array letters: B images, N rows (patches of all images), D width, K components.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals.drawing import draw_grid
from vitjax.evals.evaluation import once
from vitjax.evals.passes import Pass
from vitjax.evals.segmentation import patch_tokens
from vitjax.explain.grid import grid_of

NUM_COMPONENTS = 3
EDGES = (1.0, 99.0)  # percentiles that become 0 and 255


def components(
    x: Float[np.ndarray, "N D"], count: int = NUM_COMPONENTS
) -> tuple[Float[np.ndarray, "N K"], float]:
    """The rows' coordinates along the first principal axes, and the share of the variance there.

    Each axis points where its largest entry is positive.
    """
    x = x.astype(np.float64)
    x = x - x.mean(0)[None]
    values, vectors = np.linalg.eigh(x.T @ x)
    axes = vectors[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(0)
    axes = axes * np.sign(axes[largest, np.arange(axes.shape[1])])[None]
    share = np.maximum(values[::-1][:count], 0).sum() / max(values.sum(), 1e-30)
    return x @ axes, float(share)


def to_colours(coordinates: Float[np.ndarray, "N 3"]) -> UInt8[np.ndarray, "N 3"]:
    """Each component from its first to its 99th percentile."""
    low, high = np.percentile(coordinates, EDGES, axis=0)
    scaled = (coordinates - low[None]) / np.maximum(high - low, 1e-12)[None]
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


class FeaturePCA:
    """Three principal components of the patch tokens of a few images, all images together.

    Args:
      objective: with `model` and `backbone`; the tokens have at least 3 dimensions.
      loader: of the set.
      mesh: where it runs.
      num_images: the first so many.

    Raises:
      InputError: num_images is not positive.

    Source: Oquab et al. 2023 (DINOv2, arXiv 2304.07193), figure 1, which also leaves out the
    background by a threshold of the first component; here nothing is left out.
    """

    def __init__(self, objective: Any, loader: Loader, mesh: Mesh, num_images: int = 8):
        if num_images < 1:
            raise InputError(f"num_images must be at least 1, got {num_images}")
        size, self._num_images = loader.preprocess.image_size, num_images
        self._grid = grid_of(objective.model, size, size)

        def tokens(params, extra, batch):
            params = objective.backbone(params, extra)
            found, _ = patch_tokens(objective.model, params, batch["images"])
            return found, batch["pixels"], batch["mask"]

        self._pass = Pass(tokens, loader, mesh, num_images)

    def _run(self, state: Any) -> Any:
        tokens, pixels, mask = next(iter(self._pass(state, num_images=self._num_images)))
        tokens, pixels = np.nan_to_num(tokens[mask]), pixels[mask]
        found, share = components(tokens.reshape(-1, tokens.shape[-1]))
        colours = to_colours(found).reshape(len(tokens), *self._grid, NUM_COMPONENTS)
        return share, colours, pixels

    def _results(self, state: Any) -> Any:
        return once(("feature pca", id(self), id(state)), lambda: self._run(state))

    def __call__(self, state: Any) -> dict[str, float]:
        """The `explained` share of the tokens' variance."""
        share, _, pixels = self._results(state)
        return {"explained": share, "examples": len(pixels)}

    def pictures(self, state: Any) -> dict[str, bytes]:
        """Each image beside its patches' components as red, green and blue."""
        share, colours, pixels = self._results(state)
        size = pixels.shape[1]
        repeats = [max(1, size // side) for side in self._grid]
        maps = [c.repeat(repeats[0], 0).repeat(repeats[1], 1) for c in colours]
        columns = {"image": list(pixels), "patches": maps}
        title = f"principal components 1-3 as RGB: {share:.0%} of the patch tokens' variance"
        return {"feature_pca": draw_grid(columns, title)}
