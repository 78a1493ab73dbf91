"""Loading a trained model and using it: `vitjax.load`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from vitjax import checkpoint, experiment, parallel, state
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError, suggest
from vitjax.models.functional import Model

SAVE_FORMATS = ("vitjax",)


def load(path: str | Path, *, step: int | None = None) -> "VisionModel":
    """Loads a model for inference.

    Args:
      path: a run directory (its newest step), a step directory, or a folder that `save` wrote.
      step: which step of a run.

    Raises:
      InputError: there is no checkpoint at the path.
      DamagedCheckpointError: the weights are not those that were saved.
    """
    folder = checkpoint.find_step(Path(path), step)
    contract = checkpoint.read_contract(folder)
    preprocess = Preprocess.from_dict(contract["preprocess"])
    precision = parallel.make_precision(**contract["precision"])
    model = experiment.make_model(contract["model"], preprocess, precision)
    params = checkpoint.read_params(folder)
    state.check_same_tree(model.abstract_params, params, str(folder))
    return VisionModel(model, params, preprocess, contract)


class VisionModel:
    """A model with its weights and the preprocessing that they expect.

    Attributes:
      params: nested dict of arrays.
      preprocess: the contract; see `vitjax.data.preprocess`.
      config: the model's block of the training config.
      class_names: of the head's classes, or None.
      loss_type: what the head was trained with ("softmax" or "sigmoid"), or None.
    """

    def __init__(self, model: Model, params: Any, preprocess: Preprocess, contract: dict[str, Any]):
        self.params, self.preprocess = params, preprocess
        self.config: dict[str, Any] = contract["model"]
        names = contract.get("class_names")
        self.class_names: tuple[str, ...] | None = tuple(names) if names else None
        self.loss_type: str | None = contract.get("loss_type")
        self._model, self._contract = model, contract
        self._raw = jax.jit(lambda p, x: model.apply(p, state.prepare(x, preprocess)))
        self._ready = jax.jit(lambda p, x: model.apply(p, x))

    @property
    def num_params(self) -> int:
        return self._model.num_params

    def _run(self, images: Any, preprocessed: bool) -> dict[str, Array]:
        p = self.preprocess
        shape, dtype = np.shape(images), np.asarray(images[:0]).dtype
        if len(shape) != 4 or shape[-1] != p.channels:
            raise InputError(f"images must be [B, Y, X, {p.channels}], got {shape}")
        if preprocessed:
            if not np.issubdtype(dtype, np.floating):
                raise InputError(f"preprocessed images must be floating point, got {dtype}")
            return self._ready(self.params, images)
        if dtype != np.uint8:
            raise InputError(
                f"images must be uint8, got {dtype}; pass preprocessed=True for normalised floats"
            )
        return self._raw(self.params, np.stack([p.fit(np.asarray(image)) for image in images]))

    def embed(self, images: Any, *, preprocessed: bool = False) -> Float[Array, "B D"]:
        """Pooled features.

        Args:
          images: uint8 `[B, Y, X, C]` of any size, resized and normalised as the contract says;
            or, with `preprocessed`, floats that already are.
        """
        return self._run(images, preprocessed)["embedding"]

    def tokens(self, images: Any, *, preprocessed: bool = False) -> Float[Array, "B N D"]:
        """All tokens after the final norm, the class token first where there is one."""
        return self._run(images, preprocessed)["tokens"]

    def logits(self, images: Any, *, preprocessed: bool = False) -> Float[Array, "B C"]:
        """The head's outputs, before softmax or sigmoid."""
        out = self._run(images, preprocessed)
        if "logits" not in out:
            raise InputError("this model has no head, so it has no logits; use embed or tokens")
        return out["logits"]

    def save(self, path: str | Path, *, format: str = "vitjax") -> None:
        """Writes weights and contract to a new folder that `vitjax.load` reads."""
        if format not in SAVE_FORMATS:
            raise InputError(f"unknown format {format!r}; {suggest(format, SAVE_FORMATS)}")
        checkpoint.write_params(Path(path), self.params, self._contract)
