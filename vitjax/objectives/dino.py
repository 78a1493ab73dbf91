"""Self-distillation without labels: DINOv2, with DINOv3's Gram anchoring as an option.

Array letters: B batch, V crops, N tokens, M masked places, D width, K prototypes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitjax.errors import InputError, suggest
from vitjax.models.functional import Model
from vitjax.models.projection import ProjectionHead, head_flops
from vitjax.models.shapes import Geometry, count_flops
from vitjax.objectives import self_distillation as terms
from vitjax.objectives.health import feature_rank, feature_std
from vitjax.objectives.masking import draw_blobs, most_masked
from vitjax.objectives.objective import Objective

HEAD = {"prototypes": 65536, "hidden": 2048, "bottleneck": 256, "num_layers": 3}
CENTRE_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class DINO(Objective):
    """The student agrees with a moving average of itself: across crops by the embedding, on masked
    patches by tokens.

    The batch must hold `global_images` and, with `num_local`, `local_images`: see
    `vitjax.data.multicrop:MultiCrop`. What is evaluated and exported is the teacher.

    Attributes:
      model: without a head, with a mask token where `masked_weight` is not 0.
      total_steps: of the run, given by the config.
      global_size, local_size, num_local: as MultiCrop's.
      head: prototypes, hidden, bottleneck and num_layers of the projection heads.
      share_head: one head for crops and patches.
      temperature: of the student.
      teacher_temperature: of the teacher at first and after `teacher_warmup_steps`.
      momentum: of the teacher at first; rises to 1 as a cosine.
      centring: "sinkhorn" (DINOv2) or "centre" (DINO).
      crop_weight, masked_weight, koleo_weight, gram_weight: of the loss's terms.
      mask_ratio: between which shares of a global crop's patches the masked ones are drawn.
      mask_probability: with which a global crop is masked at all.
      freeze_last_layer_steps: for so long the prototypes stay as they are drawn.
      gram_every: steps after which the Gram anchor becomes the teacher of that moment.

    Sources: Caron et al. 2021 (arXiv 2104.14294), Zhou et al. 2022 (iBOT, arXiv 2111.07832), Oquab
    et al. 2023 (DINOv2, arXiv 2304.07193), Simeoni et al. 2025 (DINOv3, arXiv 2508.10104).
    """

    total_steps: int = 1
    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    head: Mapping[str, int] = dataclasses.field(default_factory=dict)
    share_head: bool = False
    temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup_steps: int = 0
    momentum: float = 0.992
    centring: str = "sinkhorn"
    crop_weight: float = 1.0
    masked_weight: float = 1.0
    koleo_weight: float = 0.1
    gram_weight: float = 0.0
    gram_every: int = 10_000
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = 0.5
    freeze_last_layer_steps: int = 0
    PLACES: ClassVar = (("extra", "teacher", "model"), ("params", "model"))

    def __post_init__(self):
        geometry = dict(self.model.arguments).get("geometry")
        if not isinstance(geometry, Geometry):
            raise InputError("DINO trains Vision Transformers: model.target must be a ViT")
        if geometry.num_classes:
            raise InputError(
                f"DINO trains no head: model.num_classes must be 0, got {geometry.num_classes}"
            )
        if self.masked_weight and not geometry.mask_token:
            raise InputError(
                "objective.masked_weight needs model.mask_token=True; set it, or masked_weight=0"
            )
        sizes = {"global_size": self.global_size}
        sizes |= {"local_size": self.local_size} if self.num_local else {}
        for name, size in sizes.items():
            if size < geometry.patch_size or size % geometry.patch_size:
                raise InputError(
                    f"objective.{name}={size} is not divisible by the patch size "
                    f"{geometry.patch_size}"
                )
        low, high = self.mask_ratio
        patches = (self.global_size // geometry.patch_size) ** 2
        if not 0 < low <= high < 1 or most_masked(patches, high) < 1:
            raise InputError(
                f"objective.mask_ratio={tuple(self.mask_ratio)} of {patches} patches must leave "
                "some visible and mask at least one"
            )
        if self.centring not in ("sinkhorn", "centre"):
            options = ("sinkhorn", "centre")
            raise InputError(
                f"unknown objective.centring {self.centring!r}; {suggest(self.centring, options)}"
            )
        for name in self.head:
            if name not in HEAD:
                raise InputError(f"objective.head has no {name!r}; {suggest(name, HEAD)}")
        for name in ("temperature", "crop_weight", "koleo_weight", "gram_weight"):
            if getattr(self, name) < (1e-6 if name == "temperature" else 0):
                raise InputError(
                    f"objective.{name} must not be negative, got {getattr(self, name)}"
                )
        if not 0 <= self.momentum <= 1:
            raise InputError(f"objective.momentum must be in [0, 1], got {self.momentum}")

    # Sizes.

    @property
    def _geometry(self) -> Geometry:
        return dict(self.model.arguments)["geometry"]

    @functools.cached_property
    def _head_sizes(self) -> dict[str, int]:
        return HEAD | dict(self.head)

    @functools.cached_property
    def _heads(self) -> dict[str, Model]:
        """By name; their inputs are an embedding and a token."""
        precision = dict(self.model.arguments)["precision"]
        widths = {"crop_head": self._geometry.embedding_dim}
        if self.masked_weight and not self.share_head:
            widths["masked_head"] = self._geometry.shape.width
        return {
            name: Model(
                ProjectionHead,
                (("width", width), *self._head_sizes.items(), ("precision", precision)),
            )
            for name, width in widths.items()
        }

    @property
    def flops_per_image(self) -> int:
        """Student forward and backward, teacher forward, heads and Gram anchor."""
        g = self._geometry
        table = g.table_size or g.image_size

        def forward(size):
            return count_flops(dataclasses.replace(g, image_size=size, table_size=table))

        whole, part = forward(self.global_size), forward(self.local_size) if self.num_local else 0
        total = 3 * (2 * whole + self.num_local * part) + 2 * whole
        total += 2 * whole if self.gram_weight else 0
        row = head_flops(g.embedding_dim, **self._head_sizes)
        total += row * (3 * (2 + self.num_local) + 2)
        if self.masked_weight:
            masked = most_masked((self.global_size // g.patch_size) ** 2, self.mask_ratio[1])
            total += head_flops(g.shape.width, **self._head_sizes) * 2 * masked * 4
        return total

    # State.

    def init(self, key: jax.Array, batch: dict[str, Any]) -> tuple[Any, Any]:
        """The student; the teacher, equal to it, with its centres and its count of updates."""
        del batch
        keys = jax.random.split(key, 1 + len(self._heads))
        params = {"model": self.model.init(keys[0])}
        for name, own in zip(self._heads, keys[1:], strict=True):
            params[name] = self._heads[name].init(own)
        extra = {"teacher": jax.tree.map(jnp.copy, params), "updates": jnp.zeros((), jnp.int32)}
        if self.centring == "centre":
            kinds = self._head_sizes["prototypes"]
            extra["centres"] = {n: jnp.zeros((kinds,)) for n in ("crop", "masked")}
        if self.gram_weight:
            extra["gram"] = {"model": jax.tree.map(jnp.copy, params["model"])}
        return params, extra

    def teacher_momentum(self, updates: Array) -> Array:
        """At the update after so many."""
        done = jnp.minimum(updates / max(self.total_steps, 1), 1.0)
        return 1 - (1 - self.momentum) * (jnp.cos(jnp.pi * done) + 1) / 2

    def after_update(self, params: Any, extra: Any) -> Any:
        """Moves the teacher."""
        updates, m = extra["updates"] + 1, self.teacher_momentum(extra["updates"])

        def mix(old, new):
            return (m * old + (1 - m) * new).astype(old.dtype)

        teacher = jax.tree.map(mix, extra["teacher"], params)
        moved = extra | {"teacher": teacher, "updates": updates}
        if self.gram_weight:
            is_due = updates % self.gram_every == 0
            anchor = jax.tree.map(
                lambda old, new: jnp.where(is_due, new, old), extra["gram"]["model"],
                teacher["model"],
            )  # fmt: skip
            moved["gram"] = {"model": anchor}
        return moved

    # Loss.

    def _project(self, params: Any, name: str, x: Array, is_frozen: Any = False) -> Array:
        name = name if name in self._heads else "crop_head"
        return self._heads[name].apply(params[name], x, is_frozen)

    def _targets(
        self, logits: Float[Array, "R K"], weights: Array | None, temperature: Array, extra: Any,
        name: str,
    ) -> tuple[Float[Array, "R K"], Any]:  # fmt: skip
        """Of the teacher's logits, and the moved centre."""
        if self.centring == "sinkhorn":
            return terms.sinkhorn(logits, temperature, weights), None
        centre = extra["centres"][name]
        w = jnp.ones(logits.shape[:1]) if weights is None else weights
        mean = (logits * w[:, None]).sum(0) / jnp.maximum(w.sum(), 1.0)
        moved = CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean
        return terms.centred(logits, temperature, centre), moved

    def _check_crops(self, batch: dict[str, Array]) -> None:
        """Raises InputError for a batch without the crops that the objective counts on."""
        wanted = {"global_images": (2, self.global_size)}
        wanted |= {"local_images": (self.num_local, self.local_size)} if self.num_local else {}
        for name, (count, size) in wanted.items():
            if name not in batch:
                raise InputError(
                    f"DINO needs {name}: put vitjax.data.multicrop:MultiCrop with the objective's "
                    "global_size, local_size and num_local into the config's augment"
                )
            found = batch[name].shape
            if found[1:4] != (count, size, size):
                raise InputError(
                    f"the objective wants {count} {name} of {size} x {size} pixels, MultiCrop "
                    f"gives {found[1]} of {found[2]} x {found[3]}: set the same sizes in both"
                )

    def loss(
        self, params: Any, extra: Any, batch: dict[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], tuple[Any, dict[str, Array]]]:
        """Cross entropies between crops and on masked patches, KoLeo, and the Gram distance."""
        self._check_crops(batch)
        mask_key, model_key = jax.random.split(jax.random.key(0) if key is None else key)
        model_key = None if key is None else model_key
        views = batch["global_images"]
        number, prefix = views.shape[0], self._geometry.num_prefix
        views = views.reshape(-1, *views.shape[2:])  # an image's crops one after the other
        patch = self._geometry.patch_size
        grid = views.shape[1] // patch, views.shape[2] // patch
        blobs = draw_blobs(mask_key, 2 * number, grid, self.mask_ratio, self.mask_probability)
        low, high = self.teacher_temperature
        warm = jnp.minimum(extra["updates"] / max(self.teacher_warmup_steps, 1), 1.0)
        hot = low + (high - low) * (warm if self.teacher_warmup_steps else jnp.ones(()))
        is_frozen = extra["updates"] < self.freeze_last_layer_steps

        teacher = jax.lax.stop_gradient(extra["teacher"])
        seen = self.model.apply(teacher["model"], views)
        masked = {"masked": blobs.masked} if self.masked_weight else {}
        own = self.model.apply(params["model"], views, model_key, **masked)

        logits = self._project(teacher, "crop_head", seen["embedding"])
        targets, centre = self._targets(logits, None, hot, extra, "crop")
        targets = targets.reshape(number, 2, -1)
        embeddings = own["embedding"].reshape(number, 2, -1)
        scores = self._project(params, "crop_head", embeddings, is_frozen)
        if self.num_local:
            parts = batch["local_images"]
            local = self.model.apply(
                params["model"], parts.reshape(-1, *parts.shape[2:]),
                None if model_key is None else jax.random.fold_in(model_key, 1),
            )["embedding"]  # fmt: skip
            local = self._project(
                params, "crop_head", local.reshape(number, parts.shape[1], -1), is_frozen
            )
            scores = jnp.concatenate([scores, local], axis=1)
        logs = jax.nn.log_softmax(scores / self.temperature, axis=-1)
        pairs = -jnp.einsum("bgk,bvk->bgv", targets, logs)  # of a teacher's and a student's crop
        differ = ~jnp.eye(2, pairs.shape[2], dtype=bool)[None]
        crop_loss = jnp.where(differ, pairs, 0.0).sum() / (number * (2 + 2 * self.num_local))
        sharpness = terms.entropy(targets).mean()
        metrics = {
            "crop_loss": crop_loss,
            "teacher_entropy": sharpness,
            "kl": crop_loss - sharpness,
            "feature_rank": feature_rank(seen["embedding"]),
            "feature_std": feature_std(seen["embedding"]),
            "teacher_momentum": self.teacher_momentum(extra["updates"]),
        }
        loss, centres = self.crop_weight * crop_loss, {"crop": centre}
        if self.masked_weight:
            pick = blobs.places[:, :, None] + prefix
            valid = blobs.valid.astype(jnp.float32)
            theirs = jnp.take_along_axis(seen["tokens"], pick, axis=1)
            mine = jnp.take_along_axis(own["tokens"], pick, axis=1)
            logits = self._project(teacher, "masked_head", theirs)
            kinds = logits.shape[-1]
            goal, centres["masked"] = self._targets(
                logits.reshape(-1, kinds), valid.reshape(-1), hot, extra, "masked"
            )
            logs = jax.nn.log_softmax(
                self._project(params, "masked_head", mine, is_frozen) / self.temperature, axis=-1
            )
            each = -(goal.reshape(logs.shape) * logs).sum(-1)
            per_image = (each * valid).sum(1) / jnp.maximum(valid.sum(1), 1.0)
            metrics["masked_loss"] = per_image.mean()  # crops without a mask count as 0
            loss = loss + self.masked_weight * metrics["masked_loss"]
        if self.koleo_weight:
            metrics["koleo"] = (terms.koleo(embeddings[:, 0]) + terms.koleo(embeddings[:, 1])) / 2
            loss = loss + 2 * self.koleo_weight * metrics["koleo"]
        if self.gram_weight:
            anchor = jax.lax.stop_gradient(extra["gram"]["model"])
            wanted = self.model.apply(anchor, views)["tokens"][:, prefix:]
            metrics["gram"] = terms.gram_distance(own["tokens"][:, prefix:], wanted)
            loss = loss + self.gram_weight * metrics["gram"]
        if self.centring == "centre":
            extra = extra | {"centres": extra["centres"] | centres}
        return loss, (jax.lax.stop_gradient(extra), jax.lax.stop_gradient(metrics))
