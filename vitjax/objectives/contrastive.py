"""Images and texts in one space: SigLIP's sigmoid loss and CLIP's softmax.

Array letters: B batch, N tokens, D embedding.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vitjax import config as config_lib
from vitjax.errors import InputError, suggest
from vitjax.models.functional import Model
from vitjax.objectives.objective import Objective, Place
from vitjax.objectives.pairwise import LOSSES, Pairs, pair_loss
from vitjax.parallel import constrain

MAX_SCALE = 100.0  # of the softmax loss
FIRST_SCALE = {"sigmoid": 10.0, "softmax": 1 / 0.07}


def normalised(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Of length one, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


@jax.custom_vjp
def at_most(x: Float[Array, ""], limit: Float[Array, ""]) -> Float[Array, ""]:
    """The smaller one. Beyond the limit x has a gradient only where it leads back."""
    return jnp.minimum(x, limit)


def _at_most_forward(x, limit):
    return at_most(x, limit), x < limit


def _at_most_backward(is_below, grad):
    return jnp.where(is_below | (grad > 0), grad, 0.0), None


at_most.defvjp(_at_most_forward, _at_most_backward)


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Each image with its own text against all others of the batch.

    The batch has `texts` [B, N], from captions and `data.tokenizer`. Parameters are `model` (the
    image tower), `text`, `scale` (the log of what cosines are multiplied with) and, of the sigmoid
    loss, `bias`. No device holds the matrix of all pairs; see `pairwise`. With accumulation each
    part is a batch of its own: an image meets the texts of its part only.

    Attributes:
      model: the image tower, without a head; its embedding, which `model.projection_dim` may
        narrow, is compared.
      text: the block of the text tower, such as `vitjax.models.text:text_transformer`; its
        precision is the image tower's.
      loss_type: "sigmoid" (Zhai et al. 2023, SigLIP, arXiv 2303.15343) or "softmax" (Radford et
        al. 2021, CLIP, arXiv 2103.00020).
      scale: where what multiplies the cosines starts: the inverse temperature. None for the
        papers': 10, or 1 / 0.07. Of the softmax it is at most 100.
      bias: where the sigmoid loss's bias starts; the paper's is -10, since nearly all pairs are
        none.
      chunk_size: texts that a device compares its images with at a time.
      mesh: given by the experiment.
    """

    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss_type: str = "sigmoid"
    scale: float | None = None
    bias: float = -10.0
    chunk_size: int = 1024
    mesh: Mesh | None = None
    PLACES: ClassVar[tuple[Place, ...]] = (("params", "model"),)

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise InputError(
                f"unknown objective.loss_type {self.loss_type!r}; {suggest(self.loss_type, LOSSES)}"
            )
        if self.scale is not None and not 0 < self.scale <= MAX_SCALE:
            raise InputError(f"objective.scale must be in (0, {MAX_SCALE:g}], got {self.scale}")
        if self.chunk_size < 1:
            raise InputError(f"objective.chunk_size must be at least 1, got {self.chunk_size}")
        described = dict(self.model.description)
        if described.get("num_classes"):
            raise InputError(
                "images and texts have no classes to learn: set model.num_classes=0, it is "
                f"{described['num_classes']}"
            )
        if dict(self.model.arguments).get("frozen_blocks"):
            raise InputError(
                "model.frozen_blocks does not tell the towers apart; set it to 0 and name what "
                "should not change in optimizer.freeze, such as ('model/.*',)"
            )
        if not self.text.get("target"):
            raise InputError(
                "objective.text is not set: give the block of a text tower, such as "
                '{"target": "vitjax.models.text:text_transformer", ...}'
            )
        assert self.text_model is not None  # built here, so that what is wrong is said at once

    @functools.cached_property
    def text_model(self) -> Model:
        precision = dict(self.model.arguments)["precision"]
        return config_lib.build(self.text, precision=precision)

    @property
    def flops_per_image(self) -> int:
        """Of an image with its text."""
        return 3 * (self.model.flops_per_image + self.text_model.flops_per_image)

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """Fresh parameters of both towers; there is nothing extra. Of the batch only shapes are
        used.

        Raises:
          InputError: the batch has no texts, or texts of another length; or the towers' embeddings
            are not of one width.
        """
        self._check(batch)
        image_key, text_key = jax.random.split(key)
        first = FIRST_SCALE[self.loss_type] if self.scale is None else self.scale
        params = {
            "model": self.model.init(image_key),
            "text": self.text_model.init(text_key),
            "scale": jnp.asarray(math.log(first), jnp.float32),
        }
        if self.loss_type == "sigmoid":
            params["bias"] = jnp.asarray(self.bias, jnp.float32)
        return params, {}

    def _check(self, batch: dict[str, Any]) -> None:
        if "texts" not in batch:
            raise InputError(
                "learning from images and texts needs data.tokenizer, such as "
                '{"target": "vitjax.data.text:ByteTokenizer", "length": 64}'
            )
        images, texts = (
            jax.ShapeDtypeStruct(batch[k].shape, kind)
            for k, kind in (("images", jnp.float32), ("texts", jnp.int32))
        )
        length = dict(self.text_model.description).get("length")
        if length != texts.shape[1]:
            raise InputError(
                f"objective.text.length is {length}, but data.tokenizer.length is {texts.shape[1]}"
            )
        widths = [
            jax.eval_shape(model.apply, model.abstract_params, x)["embedding"].shape[-1]
            for model, x in ((self.model, images), (self.text_model, texts))
        ]
        if widths[0] != widths[1]:
            raise InputError(
                f"the image tower gives {widths[0]} numbers and the text tower {widths[1]}: set "
                f"objective.text.output_dim={widths[0]}, or model.projection_dim={widths[1]}"
            )

    def embed_images(
        self, params: Any, images: Float[Array, "B Y X C"], key: jax.Array | None = None
    ) -> Float[Array, "B D"]:
        """Images in the common space, of length one."""
        found = self.model.apply(params["model"], images, key)["embedding"]
        return normalised(constrain(found, "B D"))

    def embed_texts(self, params: Any, texts: Int[Array, "B N"]) -> Float[Array, "B D"]:
        """Tokens in the common space, of length one."""
        found = self.text_model.apply(params["text"], texts)["embedding"]
        return normalised(constrain(found, "B D"))

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """The mean loss over the images.

        Metrics: `scale`, `bias`; `accuracy`, the share of images whose own text has the largest
        logit of all and alone (texts that are the same as another image's never have);
        `positive_logit` and `negative_logit`, their means; `image_std` and `text_std`, the
        embeddings' deviation over the batch times sqrt(D): 1 where they fill the space, 0 where
        all are the same.
        """
        if "mix_labels" in batch:
            raise InputError(
                "the texts of mixed images are not mixed: leave Mixup and CutMix out of augment"
            )
        images = self.embed_images(params, batch["images"], key)
        texts = self.embed_texts(params, batch["texts"])
        log_scale = params["scale"]
        if self.loss_type == "softmax":
            log_scale = at_most(log_scale, jnp.log(MAX_SCALE))
        scale = jnp.exp(log_scale)
        bias = params.get("bias", jnp.zeros((), jnp.float32))
        how = Pairs(self.loss_type, self.chunk_size, self.mesh)
        result: Any = pair_loss(how, images, texts, scale, bias)
        loss, seen = result
        count = images.shape[0]
        total, own = seen["sum"].sum(), seen["pair"].sum()
        metrics = {
            "scale": scale,
            "accuracy": (seen["pair"] > seen["best_other"]).mean(dtype=jnp.float32),
            "positive_logit": own / count,
            "negative_logit": (total - own) / max(count * (count - 1), 1),
        }
        for name, x in (("image_std", images), ("text_std", texts)):
            metrics[name] = jnp.sqrt(x.var(0).sum())
        if self.loss_type == "sigmoid":
            metrics["bias"] = bias
        return loss, (extra, jax.lax.stop_gradient(metrics))
