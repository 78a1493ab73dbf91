"""A model and a method, ready to explain: names, checks, batches.

Array letters: B batch, Y X image, S side of the model's input, C channels, K classes, R rows and
W columns of a map.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from vitjax import experiment, state
from vitjax import precision as precision_lib
from vitjax.errors import InputError, suggest
from vitjax.explain.attention import relevance, rollout
from vitjax.explain.features import gradcam
from vitjax.explain.grid import has_attention
from vitjax.explain.perturbation import area, deletion_insertion, occlusion
from vitjax.inference import VisionModel

BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
      run: a pure function of (model, params, normalised images [B, Y, X, C], target classes [B]),
        jitted, to maps [B, R, W].
      unit: what a map's values are.
      needs_attention: only for Vision Transformers.
    """

    run: Callable[..., jax.Array]
    unit: str
    is_class_specific: bool = True
    needs_attention: bool = False


METHODS = {
    "rollout": Method(rollout, "attention", is_class_specific=False, needs_attention=True),
    "relevance": Method(relevance, "relevance", needs_attention=True),
    "gradcam": Method(gradcam, "class activation"),
    "occlusion": Method(occlusion, "drop of the logit"),
}


def check_method(name: str) -> Method:
    """The method of this name.

    Raises:
      InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]


def class_names(vision: VisionModel) -> list[str]:
    """The names of the head's classes; their numbers where they have none."""
    names = list(vision.class_names or ())
    return names + [str(i) for i in range(len(names), vision.config["num_classes"])]


def find_class(vision: VisionModel, wanted: str | int) -> int:
    """The index of a class given by name or by index; a name goes first.

    Raises:
      InputError: the head has no such class.
    """
    names, text = class_names(vision), str(wanted)
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    index = int(text) if text.isdecimal() else -1
    if 0 <= index < len(names):
        return index
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise InputError(
        f"the head has no class {wanted!r}; {hint}it has {len(names)}: {some}, or by index 0 to "
        f"{len(names) - 1}"
    )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Maps of what predictions rest on.

    Attributes:
      maps: one for each image, at the resolution of the model's grid; class, distillation and
        register tokens are not in them.
      classes: the index of the class that each map is for; if not `is_class_specific`, of the one
        that `probabilities` are of, and the map is the same for any other.
    """

    maps: Float[np.ndarray, "B R W"]
    classes: Int[np.ndarray, "B"]
    probabilities: Float[np.ndarray, "B"]
    is_class_specific: bool


class Explainer:
    """A model in float32 with a method.

    Raises:
      InputError: an unknown method, one that the model does not take, or a model without a head.
    """

    def __init__(
        self, vision: VisionModel, method: str, *, batch_size: int = BATCH_SIZE, **options: Any
    ):
        """`options` go to the method: `window` of occlusion."""
        self.method = check_method(method)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if not vision.config["num_classes"]:
            raise InputError(
                "the checkpoint has no head (num_classes=0), so there is no class to explain; "
                "fine-tune it first"
            )
        config = dict(vision.config)
        if "remat" in config:
            config["remat"] = "none"  # some of them only work on accelerators
        self.model = experiment.make_model(config, vision.preprocess, precision_lib.Precision())
        if self.method.needs_attention and not has_attention(self.model):
            others = [name for name, m in METHODS.items() if not m.needs_attention]
            raise InputError(
                f"method {method!r} needs attention, which {config['target']} has not; methods "
                f"that work: {', '.join(others)}"
            )
        self.vision, self.batch_size, self.options = vision, batch_size, options
        self.is_multi_label = vision.loss_type == "sigmoid"
        self.params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), vision.params)
        squash = jax.nn.sigmoid if self.is_multi_label else jax.nn.softmax
        self._prepare = jax.jit(lambda x: state.prepare(x, vision.preprocess))
        self._squash = jax.jit(lambda p, x: squash(self.model.apply(p, x)["logits"]))

    def _batched(self, run: Callable, images: np.ndarray, *others: np.ndarray) -> Any:
        """Runs a function on batches of one size, so that it compiles once; drops the padding."""
        parts = []
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(images), self.batch_size):
                rows = [a[start : start + self.batch_size] for a in (images, *others)]
                count = len(rows[0])
                rows = [np.resize(a, (self.batch_size, *a.shape[1:])) for a in rows]
                done = run(self._prepare(rows[0]), *rows[1:])
                parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], done))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def probabilities(self, images: UInt8[np.ndarray, "B S S C"]) -> Float[np.ndarray, "B K"]:
        """Of every class."""
        return self._batched(functools.partial(self._squash, self.params), images)

    def maps(
        self,
        images: UInt8[np.ndarray, "B S S C"],
        targets: Int[np.ndarray, "B"],
        params: Any = None,
    ) -> Float[np.ndarray, "B R W"]:
        """The maps for a class of each image; with other parameters if given."""
        params = self.params if params is None else params
        run = functools.partial(self.method.run, self.model, params, **self.options)
        return self._batched(run, images, targets.astype(np.int32))

    def faithfulness(
        self,
        images: UInt8[np.ndarray, "B S S C"],
        targets: Int[np.ndarray, "B"],
        maps: Float[np.ndarray, "B R W"],
    ) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
        """Areas under the deletion curve (the lower, the better) and the insertion curve."""
        run = functools.partial(
            deletion_insertion, self.model, self.params, is_multi_label=self.is_multi_label
        )
        deleted, inserted = self._batched(run, images, targets.astype(np.int32), maps)
        return area(deleted), area(inserted)


def explain(
    vision: VisionModel,
    images: Any,
    *,
    method: str = "relevance",
    target: str | int | Sequence[str | int] | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Explanation:
    """Explains a model's predictions for images.

    Args:
      images: uint8 [B, Y, X, C], or several [Y, X, C] of any sizes; resized and normalised as the
        contract says.
      method: one of METHODS.
      target: a class by name or index, or one for each image; the top class by default.
      options: of the method: `window` of occlusion, in cells of the grid.

    Raises:
      InputError: an unknown method or class, a method that the model does not take, or a model
        without a head.
    """
    check_method(method)
    channels = vision.preprocess.channels
    is_whole = not isinstance(target, str | int | None)
    if is_whole and len(target) != len(images):
        raise InputError(f"{len(target)} targets were given for {len(images)} images")
    shapes = {(a.dtype.name, *a.shape[2:]) for a in map(np.asarray, images) if a.ndim == 3}
    if shapes != {("uint8", channels)} or any(np.ndim(a) != 3 for a in images):
        raise InputError(f"images must be one or more of uint8 [Y, X, {channels}]")
    explainer = Explainer(vision, method, batch_size=batch_size, **options)
    wanted = list(target) if is_whole else [target] * len(images)
    chosen = [None if name is None else find_class(vision, name) for name in wanted]
    fitted = np.stack([vision.preprocess.fit(np.asarray(image)) for image in images])
    probabilities = explainer.probabilities(fitted)
    tops = probabilities.argmax(1)
    given = [top if c is None else c for c, top in zip(chosen, tops, strict=True)]
    classes = np.asarray(given, np.int64)
    return Explanation(
        explainer.maps(fitted, classes),
        classes,
        probabilities[np.arange(len(classes)), classes],
        explainer.method.is_class_specific,
    )
