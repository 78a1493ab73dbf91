"""Loading a trained model and using it: `vitjax.load`."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from vitjax import experiment, state
from vitjax import precision as precision_lib
from vitjax.checkpoints import steps
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.models import lora
from vitjax.models.functional import Model

log = logging.getLogger("vitjax")


def load(
    path: str | Path,
    *,
    step: int | None = None,
    format: str | None = None,
    key: str | None = None,
    model: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
    ignore: Sequence[str] = (),
    image_size: int | None = None,
    patch_size: int | None = None,
    defer: bool = False,
) -> "VisionModel":
    """Loads a model for inference.

    Args:
      path: a run directory (its newest step), a step directory, or a folder or file in any format
        that `vitjax import` reads.
      step: which step of a run.
      format, key, model, preprocess, ignore: see `vitjax.interop.read.open_model`; not for runs.
      image_size, patch_size: another size to run at: positions are resampled, the patch embedding
        is resized.
      defer: leave weights of other formats in their file until they are asked for: for a model
        that is written elsewhere, not run.

    Raises:
      InputError: there is nothing at the path that can be read; says what is wrong with it.
      DamagedCheckpointError: the weights are not those that were saved.
    """
    path, report = Path(path), None
    options = {"format": format, "key": key, "model": model, "preprocess": preprocess}
    given = [name for name, value in options.items() if value] + (["ignore"] if ignore else [])
    if step is not None or steps.is_checkpoint(path):
        if given:
            raise InputError(f"{path} is a checkpoint of vitjax's, which takes no {given[0]}")
        folder, contract, params = steps.open_newest(path, step)
        precision = precision_lib.make_precision(**contract["precision"])
        contract_preprocess = Preprocess.from_dict(contract["preprocess"])
        made = experiment.make_model(contract["model"], contract_preprocess, precision)
        state.check_same_tree(made.abstract_params, params, str(folder))
        if contract["model"].get("lora_rank"):
            block, params = lora.merged(contract["model"], params)
            contract = contract | {"model": block}
            made = experiment.make_model(block, contract_preprocess, precision)
    else:
        from vitjax.interop import read  # which builds models itself

        imported = read.open_model(path, **options, ignore=ignore)
        contract, report = imported.contract, imported.report
        made = experiment.make_model(
            contract["model"],
            Preprocess.from_dict(contract["preprocess"]),
            precision_lib.make_precision(**contract["precision"]),
        )
        params = imported.defer() if defer else imported.read(jax.device_put)
        for note in report.notes:
            log.warning("%s: %s", path, note)
    changes = {"image_size": image_size, "patch_size": patch_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        from vitjax.interop import read

        made, params, contract, resampled = read.resized(made, params, contract, changes)
        if report is not None:
            resampled.unused, resampled.notes = report.unused, report.notes
        report = resampled
    if not defer:
        params = jax.tree.map(jax.numpy.asarray, params)
    return VisionModel(made, params, contract, report)


class VisionModel:
    """A model with its weights and the preprocessing that they expect.

    Attributes:
      model: described; `model.apply(params, images)` runs it.
      params: nested dict of arrays.
      preprocess: the contract; see `vitjax.data.preprocess`.
      config: the model's block of the training config.
      class_names: of the head's classes, or None.
      loss_type: what the head was trained with ("softmax" or "sigmoid"), or None.
      contract: all that a checkpoint says of itself.
      report: what became of every array of a file in another format, or None.
    """

    def __init__(self, model: Model, params: Any, contract: dict[str, Any], report: Any = None):
        self.model, self.contract, self.report = model, contract, report
        self.params = params
        self.preprocess = preprocess = Preprocess.from_dict(contract["preprocess"])
        self.config: dict[str, Any] = contract["model"]
        names = contract.get("class_names")
        self.class_names: tuple[str, ...] | None = tuple(names) if names else None
        self.loss_type: str | None = contract.get("loss_type")
        self._raw = jax.jit(
            lambda p, x, given: model.apply(p, state.prepare(x, preprocess), **given)
        )
        self._ready = jax.jit(lambda p, x, given: model.apply(p, x, **given))

    @property
    def num_params(self) -> int:
        return self.model.num_params

    def program(self, output: str) -> Callable[[Any, Array], Array]:
        """A pure function of parameters and normalised images, in float32, for one output."""
        model = experiment.make_model(self.config, self.preprocess, precision_lib.Precision())
        return lambda params, images: model.apply(params, images)[output]

    def _run(self, images: Any, preprocessed: bool, inputs: Any) -> dict[str, Array]:
        p, given = self.preprocess, {}
        if inputs is not None:
            wanted = sum(self.config.get("input_sizes") or ())
            if np.shape(inputs) != (len(images), wanted) or not wanted:
                raise InputError(
                    f"inputs must be [B, {wanted}], NaN where unknown, got {np.shape(inputs)}"
                    if wanted
                    else "this model takes no inputs beside the image"
                )
            given = {"inputs": jax.numpy.asarray(inputs, jax.numpy.float32)}
        shape, dtype = np.shape(images), np.asarray(images[:0]).dtype
        if len(shape) != 4 or shape[-1] != p.channels:
            raise InputError(f"images must be [B, Y, X, {p.channels}], got {shape}")
        if preprocessed:
            if not np.issubdtype(dtype, np.floating):
                raise InputError(f"preprocessed images must be floating point, got {dtype}")
            return self._ready(self.params, images, given)
        if dtype != np.uint8:
            raise InputError(
                f"images must be uint8, got {dtype}; pass preprocessed=True for normalised floats"
            )
        fitted = np.stack([p.fit(np.asarray(image)) for image in images])
        return self._raw(self.params, fitted, given)

    def embed(
        self, images: Any, *, preprocessed: bool = False, inputs: Any = None
    ) -> Float[Array, "B D"]:
        """Pooled features.

        Args:
          images: uint8 `[B, Y, X, C]` of any size, resized and normalised as the contract says;
            or, with `preprocessed`, floats that already are.
          inputs: `[B, M]`, for a model with input tokens: numbers beside the image, NaN where
            unknown; all are by default.
        """
        return self._run(images, preprocessed, inputs)["embedding"]

    def tokens(
        self, images: Any, *, preprocessed: bool = False, inputs: Any = None
    ) -> Float[Array, "B N D"]:
        """All tokens after the final norm, the class token first where there is one."""
        return self._run(images, preprocessed, inputs)["tokens"]

    def logits(
        self, images: Any, *, preprocessed: bool = False, inputs: Any = None
    ) -> Float[Array, "B C"]:
        """The head's outputs, before softmax or sigmoid."""
        out = self._run(images, preprocessed, inputs)
        if "logits" not in out:
            raise InputError("this model has no head, so it has no logits; use embed or tokens")
        return out["logits"]

    def save(self, path: str | Path, *, format: str = "vitjax", **options: Any) -> None:
        """Writes weights and contract.

        Args:
          path: a new folder, or a file name where the format is one file.
          format: "vitjax" (the same as "safetensors", which holds everything), or another that
            `vitjax export` knows.
          options: `dtype` and `output`, see `vitjax.interop.write.export`.

        Raises:
          InputError: the format cannot express the model, or the path is taken.
        """
        from vitjax.interop import write  # whose formats load models themselves

        write.export(self, path, "safetensors" if format == "vitjax" else format, **options)
