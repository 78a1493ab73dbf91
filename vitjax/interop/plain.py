"""Plain safetensors: our arrays under our names, the contract among the file's metadata."""

import json
from typing import Any

from vitjax.errors import InputError
from vitjax.interop.contents import Described, Source
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.layout import Leaf

NAME = "safetensors"
KEY = "vitjax"


def recognise(source: Source) -> bool:
    return KEY in source.weights.metadata


def describe(source: Source, given: Any = None) -> Described:
    """The model that the contract describes."""
    del given
    try:
        contract: dict[str, Any] = json.loads(source.weights.metadata[KEY])
        model, preprocess = contract["model"], contract["preprocess"]
        names = contract["class_names"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source.path}: its {KEY!r} metadata is no contract: {error}") from error
    return Described(
        family="vitjax",
        model=model,
        preprocess=preprocess,
        leaves=tuple(Leaf(name, name) for name in source.shapes),
        class_names=tuple(names) if names else None,
        loss_type=contract.get("loss_type"),
        contract=contract,
    )


def plan(e: Exported) -> ExportPlan:
    """Every model can be written so."""
    return ExportPlan(
        family="vitjax",
        leaves=tuple(Leaf(name, name) for name in e.params),
        params=e.params,
        sizes={},
        weights="model.safetensors",
        files={},
        usage="import vitjax\n\nvit = vitjax.load(FOLDER)",
        metadata={"format": "pt", KEY: json.dumps(e.contract)},
    )
