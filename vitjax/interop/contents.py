"""What a file of weights says of its model, in our terms."""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.interop.files import WeightFile
from vitjax.interop.layout import Leaf
from vitjax.models.shapes import SHAPES
from vitjax.models.stems import stride_of
from vitjax.models.vit import vit

VIT = "vitjax.models.vit:vit"
# The options of `vit` with their defaults, apart from what the preprocessing contract gives.
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(vit).parameters.items()
    if name not in ("image_size", "channels", "precision")
} | {"num_classes": 0}
# Options that change no number at inference, at the model's own size.
RUNTIME = (
    "scan", "remat", "attention", "dropout_rate", "drop_path_rate", "head_bias",
    "position_resampling", "frozen_blocks",
    "lora_alpha", "lora_targets",  # of no meaning once lora_rank is 0
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of weights, and what lies beside it.

    Attributes:
      path: what the user named.
      weights: the arrays.
      config: the JSON beside the weights, {} where there is none.
      processor: preprocessor_config.json, {} where there is none.
      prefix: left out of the names that start with it.
    """

    path: Path
    weights: WeightFile
    config: dict[str, Any]
    processor: dict[str, Any]
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = self.weights.shapes.items()
        return {name.removeprefix(self.prefix): tuple(shape) for name, shape in found}

    def full_name(self, name: str) -> str:
        """The name in the file."""
        full = self.prefix + name
        return full if full in self.weights.shapes else name

    def read(self, name: str) -> np.ndarray:
        return self.weights.read(self.full_name(name))


@dataclasses.dataclass(frozen=True)
class Described:
    """A model and where its arrays lie in a file.

    Attributes:
      family: such as "dinov2"; export to the same format goes back to it.
      model: the block of a training config: target and arguments.
      preprocess: arguments of `Preprocess`.
      leaves: a complete table.
      unused: pattern and reason of names in the file that the model has no place for.
      assumed: what the file does not say, and what was taken instead.
      class_names: of the head's classes, or None.
      extra: what an export to the same format needs beside (the file's own config).
      loss_type: what the head was trained with, where the file says.
      contract: all of it, where the file is our own.
      read: gives an array by its name, where the file's own is not yet what is meant.
    """

    family: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    leaves: tuple[Leaf, ...]
    unused: tuple[tuple[str, str], ...] = ()
    assumed: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss_type: str | None = None
    contract: dict[str, Any] | None = None
    read: Callable[[str], np.ndarray] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file.

    Raises:
      InputError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def number(config: Mapping[str, Any], key: str, where: str, default: Any = None) -> Any:
    """A positive number of a config.

    Raises:
      InputError: it is missing, or no positive number.
    """
    value = config.get(key, default)
    if isinstance(value, list | tuple) and len(set(value)) == 1:  # [224, 224]
        value = value[0]
    if isinstance(value, list | tuple):
        raise InputError(f"{where}: {key}={value} is not square, which is all that vitjax reads")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{where}: {key} must be a positive number, got {value!r}")
    return value


def choice(value: Any, table: Mapping[Any, Any], key: str, where: str) -> Any:
    """The entry of a table for a config's value.

    Raises:
      InputError: there is none.
    """
    if value not in table:
        allowed = ", ".join(map(str, table))
        raise InputError(f"{where}: {key}={value!r} has no counterpart here; allowed: {allowed}")
    return table[value]


def full_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """The config block of a ViT: every option, with its default where not given."""
    unknown = set(options) - set(DEFAULTS)
    assert not unknown, unknown
    return {"target": VIT} | DEFAULTS | dict(options)


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names have, by the largest number in place of "{i}".

    Raises:
      InputError: numbers are missing in between.
    """
    expression = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    found = {int(m[1]) for name in names if (m := expression.match(name))}
    if found != set(range(len(found))):
        missing = sorted(set(range(max(found))) - found)
        raise InputError(f"blocks {missing} are missing of {pattern.format(i='0')} to {max(found)}")
    return len(found)


def find_heads(width: int, depth: int, where: str, given: Any = None) -> tuple[int, str]:
    """The number of heads of a published shape, and a note of where it is from.

    Raises:
      InputError: no published model has this width and depth, and none is given.
    """
    if given:
        return int(given), ""
    found = {(s.width, s.depth): (s.num_heads, name) for name, s in SHAPES.items()}
    found |= {(1536, 40): (24, "DINOv2 g"), (1280, 32): (16, "H"), (4096, 40): (32, "DINOv3 7B")}
    if (width, depth) not in found:
        raise InputError(
            f"{where} does not say how many heads its attention has, and no published model has "
            f"width {width} and depth {depth}; give it with --model.num_heads=N"
        )
    heads, name = found[width, depth]
    return heads, f"the file does not hold the number of heads: {heads}, as in {name}"


def axis_sizes(model: Mapping[str, Any], channels: int) -> dict[str, int]:
    """The lengths of the axes that the tables' patterns split; see `Leaf`."""
    patch = model.get("patch_size") or 1
    if model.get("stem", "patch") != "patch":  # patches of the stem's map; its channels follow
        patch //= stride_of(model["stem"], patch, tuple(model["stem_blocks"]))
        return {"h": model["num_heads"], "s": 3, "t": 2, "y": patch, "x": patch}
    return {"h": model.get("num_heads") or 1, "s": 3, "t": 2, "y": patch, "x": patch, "c": channels}
