"""Reading weights in any format: recognised, checked whole, and only then loaded."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vitjax import experiment
from vitjax import precision as precision_lib
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError, suggest
from vitjax.interop import google, hf, openclip, plain, reference, timm
from vitjax.interop.contents import Described, Source, axis_sizes, read_json
from vitjax.interop.files import open_weights
from vitjax.interop.layout import (
    check_complete,
    check_shapes,
    defer_params,
    expected_shapes,
    named_leaves,
    nested,
    read_params,
)
from vitjax.interop.merge import Report, matches, plan_merge
from vitjax.models.functional import Model

# In the order in which they are asked; the names alone decide for the last three.
FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (plain, hf, timm, google, openclip, reference)
}
WRAPPER = re.compile(r"(module|_orig_mod|backbone)\.|params/")
CONFIGS = ("config.json", "open_clip_config.json")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model read from a file.

    Attributes:
      model: described, with nothing allocated.
      contract: what a checkpoint of ours says of itself; see `experiment`.
      report: what became of every array.
      source: the file, not yet read.
      described: what it says.
    """

    model: Model
    contract: dict[str, Any]
    report: Report
    source: Source
    described: Described

    def defer(self) -> Any:
        """The parameters as a nested dict of arrays that are read when they are asked for."""
        sizes = axis_sizes(self.described.model, self.contract["preprocess"]["channels"])
        read = self.described.read or self.source.read
        return defer_params(self.described.leaves, self.model.abstract_params, read, sizes)

    def read(self, place: Callable[[np.ndarray], Any] = lambda x: x) -> Any:
        """The parameters as a nested dict of float32 arrays, each given to `place` when read."""
        sizes = axis_sizes(self.described.model, self.contract["preprocess"]["channels"])
        read = self.described.read or self.source.read
        abstract = self.model.abstract_params
        return read_params(self.described.leaves, abstract, read, sizes, place)


def open_source(path: Path, key: str | None = None) -> Source:
    """Opens weights, and the configs that lie beside them; reads headers only."""
    if not path.exists():
        raise InputError(f"no such checkpoint, file or folder: {path}")
    weights = open_weights(path, key)
    folder = path if path.is_dir() else path.parent
    config: dict[str, Any] = {}
    is_named = path.is_dir() or re.match(r"(model|open_clip|pytorch_model)", path.name)
    for name in CONFIGS if is_named else ():
        config = config or read_json(folder / name)
    if weights.path.suffix == ".npz":
        config = config or read_json(weights.path.with_suffix(".json"))
    processor = read_json(folder / "preprocessor_config.json") if is_named else {}
    prefix = _shared_prefix(list(weights.shapes))
    return Source(path, weights, config, processor, prefix)


def _shared_prefix(names: list[str]) -> str:
    """What wrappers put in front of the names: "module.", "_orig_mod.", "backbone.", "params/"."""
    prefix = ""
    while True:
        matched = [WRAPPER.match(name.removeprefix(prefix)) for name in names
                   if name.startswith(prefix)]  # fmt: skip
        found = {match[0] for match in matched if match}
        if len(found) != 1:
            return prefix
        prefix += found.pop()


def recognise(source: Source, format: str | None = None) -> ModuleType:
    """The format of a file: what the user says, or the first that knows it.

    Raises:
      InputError: none knows it; names some of its arrays.
    """
    if format is not None:
        if format not in FORMATS:
            raise InputError(f"unknown format {format!r}; {suggest(format, FORMATS)}")
        if not FORMATS[format].recognise(source):
            raise InputError(f"{source.path} is not of the format {format!r}; it {_looks(source)}")
        return FORMATS[format]
    for module in FORMATS.values():
        if module.recognise(source):
            return module
    raise InputError(
        f"{source.path} is of no architecture that vitjax knows: it {_looks(source)}; "
        f"known formats: {', '.join(FORMATS)}"
    )


def _looks(source: Source) -> str:
    names = list(source.weights.shapes)
    shown = ", ".join(f"{n} {tuple(source.weights.shapes[n])}" for n in names[:4])
    return f"holds {len(names)} arrays: {shown}{' ...' if len(names) > 4 else ''}"


def open_model(
    path: str | Path,
    *,
    format: str | None = None,
    key: str | None = None,
    model: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
) -> Imported:
    """Describes the model in a file and checks all shapes; reads no weights yet.

    Args:
      format: a name of FORMATS; None recognises it.
      key: which state dict of a torch file that holds several.
      model, preprocess: what the file does not say, or says wrongly.
      ignore: patterns of the file's names that may be left out.

    Raises:
      InputError: not weights, an unknown model, arrays missing, too many, or of wrong shapes.
    """
    source = open_source(Path(path), key)
    module = recognise(source, format)
    described = module.describe(source, model or {})
    for name, changes, known in (
        ("model", model or {}, described.model),
        ("preprocess", preprocess or {}, experiment.PREPROCESS_KEYS),
    ):
        for option in changes:
            if option not in known:
                raise InputError(f"unknown --{name}.{option}; {suggest(option, known)}")
    contract = Preprocess.from_dict(described.preprocess | dict(preprocess or {}))
    block = described.model | dict(model or {})
    made = experiment.make_model(block, contract, precision_lib.Precision())
    check_complete(described.leaves, made.abstract_params)
    sizes = axis_sizes(block, contract.channels)
    expected = expected_shapes(described.leaves, made.abstract_params, sizes)
    check_shapes(expected, source.shapes, str(path))
    report = Report(notes=list(described.assumed))
    unknown = []
    for name in source.shapes:
        reasons = [why for pattern, why in described.unused if re.fullmatch(pattern, name)]
        if name in expected:
            continue
        if matches(ignore, name):
            report.unused[name] = "listed"
        elif reasons:
            report.unused[name] = reasons[0]
        else:
            unknown.append(name)
    if unknown:
        raise InputError(
            f"{path} holds {len(unknown)} arrays that the model has no place for: "
            f"{', '.join(unknown[:5])}; list them (--ignore=PATTERN) if they may be left out"
        )
    report.loaded += list(named_leaves(made.abstract_params))
    dtypes = Counter(source.weights.dtypes[source.full_name(name)] for name in expected)
    said: dict[str, Any] = {
        "model": block,
        "description": dict(made.description),
        "preprocess": dataclasses.asdict(contract),
    }
    others = {
        "format": "vitjax-1",
        "class_names": described.class_names,
        "loss_type": described.loss_type or ("softmax" if block.get("num_classes") else None),
        "precision": {},
        "origin": {
            "format": module.NAME,
            "family": described.family,
            "file": source.weights.path.name,
            "dtype": dtypes.most_common(1)[0][0],
            "extra": json.loads(json.dumps(described.extra)),
        },
    }
    return Imported(made, (described.contract or others) | said, report, source, described)


def resized(
    imported_model: Model, params: Any, contract: Mapping[str, Any], changes: Mapping[str, int]
) -> tuple[Model, Any, dict[str, Any], Report]:
    """The model at another image or patch size: positions resampled, patches resized.

    Args:
      changes: "image_size", "patch_size", or both.

    Raises:
      InputError: sizes that do not divide.
    """
    block, preprocess = dict(contract["model"]), dict(contract["preprocess"])
    if "image_size" in changes:
        preprocess["image_size"] = changes["image_size"]
        if "table_size" in block:
            block["table_size"] = None
    if "patch_size" in changes:
        block["patch_size"] = changes["patch_size"]
    fitted = Preprocess.from_dict(preprocess)
    model = experiment.make_model(block, fitted, dict(imported_model.arguments)["precision"])
    arrays = named_leaves(params)
    merge = plan_merge(arrays, imported_model, named_leaves(model.abstract_params), model)
    contract = dict(contract) | {
        "model": block,
        "preprocess": dataclasses.asdict(fitted),
        "description": dict(model.description),
    }
    if contract.get("origin"):  # resampled numbers do not fit into the file's narrow type again
        contract["origin"] = contract["origin"] | {"dtype": "float32"}
    return model, nested(merge.apply(arrays, {})), contract, merge.report
