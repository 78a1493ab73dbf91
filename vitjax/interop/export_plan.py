"""What an export will write, decided before anything is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vitjax.data.preprocess import Preprocess
from vitjax.interop.layout import Leaf


@dataclasses.dataclass(frozen=True)
class Exported:
    """What is exported, apart from the numbers.

    Attributes:
      model: the config block: target and every option.
      params: the arrays by path, on a device or the host.
      contract: all that a checkpoint says of itself.
      origin: what import noted of the file that the weights came from, or {}.
    """

    model: Mapping[str, Any]
    params: Mapping[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...] | None
    loss_type: str | None
    contract: Mapping[str, Any]
    origin: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A format's decision.

    Attributes:
      family: what the model is called there.
      leaves: the table.
      params: the arrays by path, widened to the format's options.
      sizes: of the axes that the table's patterns split.
      weights: the name of the file of arrays.
      files: JSON to write beside it, by name.
      metadata: strings inside of the file of arrays, where the format has room for them.
      usage: lines of Python that load it there.
      notes: what was rewritten, for the report and the model card.
    """

    family: str
    leaves: tuple[Leaf, ...]
    params: Mapping[str, Any]
    sizes: Mapping[str, int]
    weights: str
    files: Mapping[str, Any]
    usage: str
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
