"""How far attention looks, by layer and head.

Array letters: L layers, B batch, H heads, N patches.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals.drawing import COLOURS, new_figure, to_png
from vitjax.evals.evaluation import once
from vitjax.evals.passes import Pass
from vitjax.explain.grid import geometry_of, grid_of, has_attention


def patch_distances(grid: tuple[int, int], patch_size: int) -> Float[np.ndarray, "N N"]:
    """Between the middles of patches, row-major, in pixels."""
    rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    down, across = rows[:, None] - rows[None], cols[:, None] - cols[None]
    return (np.hypot(down, across) * patch_size).astype(np.float32)


def mean_distances(
    attention: Float[Array, "L B H N N"], distances: Float[Array, "N N"]
) -> Float[Array, "L B H"]:
    """The distance from a patch to what it attends to, weighted by the attention, averaged over
    patches. Rows are first scaled to sum to 1."""
    weighed = jnp.einsum("lbhnm,nm->lbhn", attention, distances)
    return (weighed / jnp.maximum(attention.sum(-1), 1e-12)).mean(-1)


class AttentionDistance:
    """The mean attention distance of every head, over the first images of a set.

    Among patches alone: attention to class tokens, registers and the like is left out, and what
    remains of a row is scaled to sum to 1.

    Args:
      objective: with `model`, a Vision Transformer, and `backbone`.
      loader: of the set.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide. The attention of all layers is in
        memory at once: L x B x H x N x N numbers.
      num_images: that are looked at.

    Raises:
      InputError: the model has no attention, or num_images is not positive.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), figure 7 right and appendix D.7: 128 images.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        mesh: Mesh,
        batch_size: int = 16,
        num_images: int = 128,
    ):
        model = objective.model
        if not has_attention(model):
            raise InputError("attention distance needs a Vision Transformer; this model is none")
        if num_images < 1:
            raise InputError(f"num_images must be at least 1, got {num_images}")
        g, size = geometry_of(model), loader.preprocess.image_size
        grid = grid_of(model, size, size)
        self._num_images = num_images
        self._uniform = float(patch_distances(grid, g.patch_size).mean())

        def sums(params, extra, batch):
            out = model.apply(
                objective.backbone(params, extra), batch["images"], intermediates=True
            )
            attention = out["blocks"]["attention_weights"][..., g.num_prefix :, g.num_prefix :]
            found = mean_distances(attention, jnp.asarray(patch_distances(grid, g.patch_size)))
            mask = batch["mask"].astype(jnp.float32)
            return (found * mask[None, :, None]).sum(1), mask.sum()

        self._pass = Pass(sums, loader, mesh, batch_size)

    def _run(self, state: Any) -> tuple[Float[np.ndarray, "L H"], int]:
        found, counts = zip(*self._pass(state, num_images=self._num_images), strict=True)
        count = float(np.sum(counts))
        return np.sum(found, axis=0) / max(count, 1), int(count)

    def _results(self, state: Any) -> Any:
        return once(("attention distance", id(self), id(state)), lambda: self._run(state))

    def __call__(self, state: Any) -> dict[str, float]:
        """In pixels, the mean over heads of the first and the last layer; `uniform` is what a head
        that attends to all patches alike would have."""
        found, count = self._results(state)
        return {
            "first_layer": float(found[0].mean()),
            "last_layer": float(found[-1].mean()),
            "uniform": self._uniform,
            "examples": count,
        }

    def pictures(self, state: Any) -> dict[str, bytes]:
        """A dot for every head, over layers."""
        found, count = self._results(state)
        layers = np.arange(1, len(found) + 1)
        figure = new_figure(4.8, 3.2)
        axes = figure.subplots()
        across = np.repeat(layers[:, None], found.shape[1], axis=1)
        axes.scatter(
            across, found, s=22, color=COLOURS[0], alpha=0.75, linewidths=0, label="a head"
        )
        axes.plot(layers, found.mean(1), color=COLOURS[1], linewidth=1.4, label="mean of heads")
        axes.axhline(self._uniform, color="#777777", linewidth=1, linestyle="--",
                     label="all patches alike")  # fmt: skip
        axes.set_xlabel("layer")
        axes.set_ylabel("mean attention distance, pixels")
        axes.set_ylim(bottom=0, top=1.12 * max(self._uniform, float(found.max())))
        axes.set_xticks(layers[:: max(1, -(-len(layers) // 12))])
        axes.set_xlim(0.5, len(found) + 0.5)
        axes.set_title(f"how far patches attend, {count} images", loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return {"attention_distance": to_png(figure)}
