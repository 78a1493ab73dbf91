"""How well a linear head on patch tokens tells the classes of pixels.

Array letters: B batch, Y X image, N patches, R C rows and columns of them, D width, K classes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from vitjax.data.loader import Loader
from vitjax.errors import InputError
from vitjax.evals import ridge
from vitjax.evals.drawing import draw_grid
from vitjax.evals.evaluation import once
from vitjax.evals.passes import Pass
from vitjax.explain.grid import grid_of
from vitjax.models.functional import Model

PALETTE = (
    (68, 1, 84), (253, 231, 37), (33, 145, 140), (209, 73, 91), (59, 82, 139), (94, 201, 98),
    (201, 138, 27), (255, 255, 255),
)  # fmt: skip
UNKNOWN = (128, 128, 128)


def patch_tokens(
    model: Model, params: Any, images: Float[Array, "B Y X C"]
) -> tuple[Float[Array, "B N D"], tuple[int, int]]:
    """The tokens of the patches, float32, and their rows and columns."""
    tokens = model.apply(params, images)["tokens"].astype(jnp.float32)
    prefix = dict(model.description)["prefix_tokens"]
    return tokens[:, prefix:], grid_of(model, images.shape[1], images.shape[2])


def class_shares(
    masks: Int[Array, "B Y X"], grid: tuple[int, int], num_classes: int
) -> tuple[Float[Array, "B N K"], Float[Array, "B N"]]:
    """The share of each class in the pixels of a patch whose class is known, and the share of these
    in all. Classes outside 0 to num_classes - 1 are not known."""
    (rows, cols), (b, height, width) = grid, masks.shape
    known = jax.nn.one_hot(masks, num_classes)
    parts = known.reshape(b, rows, height // rows, cols, width // cols, num_classes)
    sums = parts.mean((2, 4)).reshape(b, rows * cols, num_classes)
    weight = sums.sum(-1)
    return sums / jnp.maximum(weight, 1e-12)[..., None], weight


def confusion(
    truth: Int[Array, "B Y X"], found: Int[Array, "B Y X"], num_classes: int
) -> Int[Array, "K K"]:
    """How many pixels of each class (rows) are found to be of each (columns); those whose class is
    outside 0 to num_classes - 1 do not count."""
    is_known = (truth >= 0) & (truth < num_classes)
    cell = jnp.where(is_known, truth * num_classes + found, num_classes**2)
    counts = jnp.zeros(num_classes**2 + 1, jnp.int32).at[cell.ravel()].add(1)
    return counts[:-1].reshape(num_classes, num_classes)


def scores(counts: Int[np.ndarray, "K K"]) -> tuple[Float[np.ndarray, "K"], float]:
    """The intersection over union of each class, NaN where it neither is nor is found, and the
    share of pixels that are right."""
    right = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - right
    each = np.where(union > 0, right / np.maximum(union, 1), np.nan)
    return each, float(right.sum() / max(counts.sum(), 1))


class Segmentation:
    """Ridge regression from a patch's token to the shares of the classes in it.

    Its outputs are brought to the model's input size bilinearly, and the largest counts. The
    penalty is chosen on a fixed random tenth of the training images.

    Args:
      objective: with `model` and `backbone`; the model has a grid of patches.
      loader: of the set that is scored; its source gives masks (see
        `data.sources.segmentation_folder`).
      train_loader: of the set that is learned from.
      mesh: where it runs.
      batch_size: global; rounded up to what the devices divide.
      penalties: of the squared kernel, beside the mean squared error on standardised features.
      balance: divide the outputs by the classes' shares in the training set, so that rare classes
        are found too: of what is thinner than a patch no share is ever the largest.
      ignore_index: the class, in the source's masks, of pixels that do not count.
      num_pictures: images that `pictures` shows, at most a batch.

    Raises:
      InputError: a source gives no masks, or the two have other classes.

    Source: linear segmentation of frozen patch tokens as in DINOv2 (Oquab et al. 2023, arXiv
    2304.07193, section 7.4), there by SGD on pixels.
    """

    def __init__(
        self,
        objective: Any,
        loader: Loader,
        train_loader: Loader,
        mesh: Mesh,
        batch_size: int = 32,
        penalties: Sequence[float] = ridge.PENALTIES,
        balance: bool = False,
        ignore_index: int = 255,
        num_pictures: int = 4,
    ):
        ridge.check_penalties(penalties)
        sources: list[Any] = [loader.source, train_loader.source]
        for name, part in zip(("source", "train_source"), sources, strict=True):
            if not hasattr(part, "num_mask_classes"):
                raise InputError(
                    f"{name} ({type(part).__name__}) gives no masks, which a segmentation needs; "
                    "vitjax.data.sources.segmentation_folder:SegmentationFolder does"
                )
        names = [part.mask_names for part in sources]
        if names[0] != names[1]:
            raise InputError(
                f"source has the classes {', '.join(names[0])}, but train_source has "
                f"{', '.join(names[1])}"
            )
        self._names, num_classes = names[0], sources[0].num_mask_classes
        self._penalties, self._balance = tuple(penalties), balance
        self._num_pictures = min(num_pictures, len(loader.source))
        size = loader.preprocess.image_size
        rows, _ = grid_of(objective.model, size, size)
        if size % rows:
            raise InputError(
                f"data.image_size={size} is not a multiple of the model's {rows} rows of patches, "
                "which a segmentation needs"
            )
        held = ridge.hold_out(len(train_loader.source))

        def truth_of(batch):
            masks = batch["masks"].astype(jnp.int32)
            masks = jnp.where(masks == ignore_index, -1, masks)
            return jnp.where(batch["mask"][:, None, None], masks, -1)

        def moments(params, extra, batch):
            params = objective.backbone(params, extra)
            tokens, grid = patch_tokens(objective.model, params, batch["images"])
            shares, weight = class_shares(truth_of(batch), grid, num_classes)
            is_held = jnp.asarray(held)[batch["index"] % len(held)]
            is_held = jnp.broadcast_to(is_held[:, None], weight.shape)
            x, y = (a.reshape(-1, a.shape[-1]) for a in (tokens, shares))
            return ridge.take_both(x, y, weight.ravel(), is_held.ravel())

        def test(params, extra, batch, kernel, bias):
            params = objective.backbone(params, extra)
            tokens, grid = patch_tokens(objective.model, params, batch["images"])
            logits = jnp.matmul(tokens, kernel, precision=jax.lax.Precision.HIGHEST)
            logits = (logits + bias[None, None]).reshape(-1, *grid, num_classes)
            size = (*batch["images"].shape[:3], num_classes)
            found = jax.image.resize(logits, size, "bilinear").argmax(-1)
            truth = truth_of(batch)
            pictured = {"image": batch["pixels"], "truth": truth, "found": found}
            pictured = {k: v[:num_pictures] for k, v in pictured.items()}
            return confusion(truth, found, num_classes), batch["mask"].sum(), pictured

        self._moments = Pass(moments, train_loader, mesh, batch_size)
        self._test = Pass(test, loader, mesh, batch_size)

    def _run(self, state: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        regression = ridge.choose(self._moments(state), self._penalties)
        linear = regression.linear
        scale = np.maximum(regression.means, 1e-6) if self._balance else np.ones(1)
        given = ((linear.kernel / scale[None]).astype(np.float32),
                 (linear.bias / scale).astype(np.float32))  # fmt: skip
        counts, examples, first = None, 0, None
        for found, number, pictured in self._test(state, *given):
            counts = found.astype(np.int64) + (0 if counts is None else counts)
            examples += int(number)
            first = first or pictured
        assert counts is not None and first is not None
        each, right = scores(counts)
        numbers = {f"iou_{name}": float(value) for name, value in
                   zip(self._names, each, strict=True) if np.isfinite(value)}  # fmt: skip
        return numbers | {
            "miou": float(np.nanmean(each)),
            "pixel_accuracy": right,
            "penalty": regression.penalty,
            "examples": examples,
        }, first

    def _results(self, state: Any) -> Any:
        return once(("segmentation", id(self), id(state)), lambda: self._run(state))

    def __call__(self, state: Any) -> dict[str, float]:
        """`iou_CLASS` of each class that is there or is found, their mean `miou`, over all pixels
        of the set that count, and `pixel_accuracy`."""
        return self._results(state)[0]

    def pictures(self, state: Any) -> dict[str, bytes]:
        """The first images, their masks, and what was found."""
        if self._num_pictures < 1:
            return {}
        numbers, first = self._results(state)
        shown = {name: part[: self._num_pictures] for name, part in first.items()}
        columns = {
            "image": list(shown["image"]),
            "mask": [_coloured(mask) for mask in shown["truth"]],
            "found": [_coloured(mask) for mask in shown["found"]],
        }
        title = f"mean IoU {numbers['miou']:.3f} over {numbers['examples']} images"
        return {"segmentation": draw_grid(columns, title, side=1.7)}


def _coloured(mask: Int[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X 3"]:
    """A colour for each class, over again from the ninth; grey where it is not known."""
    table = np.array([*PALETTE, UNKNOWN], np.uint8)
    return table[np.where(mask < 0, len(PALETTE), mask % len(PALETTE))]
