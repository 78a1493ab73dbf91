"""Masked autoencoding: an encoder of few visible patches, a light decoder, pixels as targets.

Array letters: B batch, Y X image, C channels, P patches, O pixels and channels of a patch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.models.decoder import Decoder, DecoderShape
from vitjax.models.encoder import patchify
from vitjax.models.functional import Model
from vitjax.models.shapes import Geometry, count_flops
from vitjax.objectives.health import feature_rank
from vitjax.objectives.masking import Masking, draw_masking
from vitjax.objectives.objective import Objective

EPS = 1e-6  # beside the variance of a patch


def unpatchify(
    patches: Float[Array, "B P O"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "B Y X C"]:
    """Puts patches, flattened as (y, x, channel) and row-major, back together."""
    (rows, cols), p = grid, patch_size
    x = patches.reshape(patches.shape[0], rows, cols, p, p, -1)
    return jnp.transpose(x, (0, 1, 3, 2, 4, 5)).reshape(x.shape[0], rows * p, cols * p, -1)


@dataclasses.dataclass(frozen=True)
class MAE(Objective):
    """Predicts the pixels of masked patches; only visible ones go through the encoder.

    Attributes:
      model: without a head, of patches alone (no stem).
      mask_ratio: the share of patches that is hidden.
      decoder: sizes, see `DecoderShape`.
      normalise_targets: each patch to its own mean and deviation.

    Source: He et al. 2022 (arXiv 2111.06377).
    """

    mask_ratio: float = 0.75
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    normalise_targets: bool = True
    PLACES: ClassVar = (("params", "model"),)

    def __post_init__(self):
        facts = dict(self.model.arguments)
        geometry = facts.get("geometry")
        if not isinstance(geometry, Geometry):
            raise InputError("MAE trains Vision Transformers: model.target must be a ViT")
        if geometry.stem != "patch":
            raise InputError(
                f'MAE needs model.stem="patch", got {geometry.stem!r}: convolutions in front of '
                "the patches would see what is masked"
            )
        if geometry.num_classes:
            raise InputError(f"MAE trains no head: model.num_classes must be 0, got "
                             f"{geometry.num_classes}")  # fmt: skip
        kept = self._num_kept(geometry.num_patches)
        if not 0 < kept < geometry.num_patches:
            raise InputError(
                f"objective.mask_ratio={self.mask_ratio} of {geometry.num_patches} patches leaves "
                f"{max(kept, 0)} visible and {geometry.num_patches - kept} masked; there must be "
                "some of both"
            )
        unknown = set(self.decoder) - {f.name for f in dataclasses.fields(DecoderShape)}
        if unknown:
            raise InputError(f"objective.decoder has no {sorted(unknown)[0]!r}; it has width, "
                             "depth, num_heads and mlp_dim")  # fmt: skip
        _ = self._decoder_shape  # raises

    def _num_kept(self, num_patches: int) -> int:
        return int(num_patches * (1 - self.mask_ratio))

    @property
    def _geometry(self) -> Geometry:
        return dict(self.model.arguments)["geometry"]

    @functools.cached_property
    def _decoder_shape(self) -> DecoderShape:
        return DecoderShape(**self.decoder)

    @functools.cached_property
    def _decoder(self) -> Model:
        facts = dict(self.model.arguments)
        names = ("eps", "precision", "scan")
        arguments = {"encoder": self._geometry, "shape": self._decoder_shape}
        arguments |= {name: facts[name] for name in names}
        return Model(Decoder, tuple(arguments.items()))

    @property
    def encoder_flops(self) -> int:
        """Of one image's visible patches, forward."""
        return count_flops(self._geometry, kept=self._num_kept(self._geometry.num_patches))

    @property
    def flops_per_image(self) -> int:
        return 3 * (self.encoder_flops + self._decoder_shape.flops(self._geometry))

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Fresh parameters of encoder and decoder."""
        del batch
        first, second = jax.random.split(key)
        return {"model": self.model.init(first), "decoder": self._decoder.init(second)}, {}

    def _masking(self, images: Array, key: jax.Array | None) -> Masking:
        """Without a key the same for every batch, so that evaluations can be compared."""
        number = self._num_patches(images)
        key = jax.random.key(0) if key is None else key
        return draw_masking(key, images.shape[0], number, self._num_kept(number))

    def _grid(self, images: Array) -> tuple[int, int]:
        patch = self._geometry.patch_size
        return images.shape[1] // patch, images.shape[2] // patch

    def _num_patches(self, images: Array) -> int:
        rows, cols = self._grid(images)
        return rows * cols

    def predict(
        self, params: Any, images: Float[Array, "B Y X C"], masking: Masking,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B P O"], Float[Array, "B D"]]:  # fmt: skip
        """All patches' targets as the decoder predicts them, and the encoder's embedding."""
        seen = self.model.apply(params["model"], images, key, keep=masking.keep)
        grid = self._grid(images)
        return (
            self._decoder.apply(params["decoder"], seen["tokens"], masking.restore, grid),
            seen["embedding"],
        )

    def targets(
        self, images: Float[Array, "B Y X C"]
    ) -> tuple[Float[Array, "B P O"], Float[Array, "B P 1"], Float[Array, "B P 1"]]:
        """What the decoder predicts, and the mean and deviation that were taken from it."""
        patches = patchify(images, self._geometry.patch_size).astype(jnp.float32)
        if not self.normalise_targets:
            return patches, jnp.zeros_like(patches[..., :1]), jnp.ones_like(patches[..., :1])
        mean = patches.mean(-1, keepdims=True)
        deviation = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + EPS)
        return (patches - mean) / deviation, mean, deviation

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """The squared error, averaged over the masked patches alone."""
        images = batch["images"]
        mask_key, model_key = (None, None) if key is None else jax.random.split(key)
        masking = self._masking(images, mask_key)
        predicted, embedding = self.predict(params, images, masking, model_key)
        errors = ((predicted - self.targets(images)[0]) ** 2).mean(-1)
        masked = masking.masked.astype(jnp.float32)
        loss = (errors * masked).sum() / masked.sum()
        visible = (errors * (1 - masked)).sum() / (1 - masked).sum()
        metrics = {
            "visible_loss": visible,  # not trained: the decoder need not copy
            "prediction_std": predicted.std(-1).mean(),
            "feature_rank": feature_rank(embedding),
        }
        return loss, (extra, jax.lax.stop_gradient(metrics))

    def reconstruct(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None = None
    ) -> dict[str, Array]:
        """Images with their masked patches predicted, for people to look at.

        Returns:
          `reconstruction` [B, Y, X, C], normalised as the images, visible patches as they are;
          `masked` [B, P].
        """
        del extra
        images = batch["images"]
        masking = self._masking(images, key)
        predicted, _ = self.predict(params, images, masking)
        targets, mean, deviation = self.targets(images)
        chosen = jnp.where(masking.masked[:, :, None], predicted, targets) * deviation + mean
        image = unpatchify(chosen, self._grid(images), self._geometry.patch_size)
        return {"reconstruction": image, "masked": masking.masked}
