"""Putting weights into a model that is not quite theirs: strictly, and with a report.

Every array of the model and every array of the weights is accounted for. What can be deduced is
done (positions resampled, patches resized, input channels adapted); what cannot be is an error,
unless it is listed.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.models.functional import Model
from vitjax.models.patches import adapt_patch_channels, resize_patch_kernel
from vitjax.models.positions import resize_positions
from vitjax.models.shapes import Geometry

PATCHES, POSITIONS = "patch_embed/kernel", "positions"


@dataclasses.dataclass
class Report:
    """What became of every array, by path.

    Attributes:
      loaded: taken as they are.
      resampled: brought to another grid, patch size or number of channels; with what was done.
      fresh: of the model, not taken: they start afresh.
      dropped: of the weights, not used, as listed.
      unused: of the weights, which the model has no place for; with the reason.
      notes: what the file does not say, and what was taken instead.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    resampled: dict[str, str] = dataclasses.field(default_factory=dict)
    fresh: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"loaded: {len(self.loaded)} arrays"]
        for title, names in (("fresh", self.fresh), ("dropped", self.dropped)):
            if names:
                lines.append(f"{title}: {len(names)} arrays: {_shown(names)}")
        lines += [f"resampled: {name}: {what}" for name, what in self.resampled.items()]
        for reason in dict.fromkeys(self.unused.values()):
            names = [name for name, why in self.unused.items() if why == reason]
            lines.append(f"unused: {len(names)} arrays ({reason}): {_shown(names)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _shown(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge, decided on shapes alone.

    Attributes:
      changes: what to do with an array on its way, by path; nothing for those not named.
      report: what became of every array.
    """

    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    report: Report

    def apply(self, params: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arrays by path, from the weights and from freshly drawn ones."""
        taken: dict[str, Any] = {name: params[name] for name in self.report.loaded}
        for name in self.report.resampled:
            taken[name] = self.changes[name](np.asarray(params[name]))
        return taken | {name: fresh[name] for name in self.report.fresh}


def geometry_of(model: Model) -> Geometry | None:
    return dict(model.arguments).get("geometry")


def _patches(old: Geometry, new: Geometry) -> tuple[Callable, str]:
    def change(kernel: np.ndarray) -> np.ndarray:
        kernel = resize_patch_kernel(kernel, old.patch_size, new.patch_size, old.channels)
        return adapt_patch_channels(kernel, new.patch_size, old.channels, new.channels)

    said = []
    if old.patch_size != new.patch_size:
        said.append(f"patches of {old.patch_size} to {new.patch_size} pixels (pseudo-inverse)")
    if old.channels != new.channels:
        said.append(f"{old.channels} to {new.channels} input channels")
    return change, ", ".join(said)


def _positions(old: Geometry, new: Geometry, method: str) -> tuple[Callable, str]:
    grids = (old.table_grid, old.table_grid), (new.table_grid, new.table_grid)
    before, after = (g.num_positions - g.table_grid**2 for g in (old, new))

    def change(table: np.ndarray) -> np.ndarray:
        rows = np.zeros((after, table.shape[1]), table.dtype)
        kept = min(before, after)
        rows[:kept] = table[:kept]
        return np.concatenate([rows, resize_positions(table[before:], *grids, method)])

    said = []
    if grids[0] != grids[1]:
        said.append(f"{grids[0][0]} x {grids[0][1]} to {grids[1][0]} x {grids[1][1]} ({method})")
    if before != after:
        said.append(f"{before} to {after} rows of tokens before the patches")
    return change, ", ".join(said)


def plan_merge(
    weights: Mapping[str, Any],
    source: Model | None,
    params: Mapping[str, Any],
    target: Model,
    *,
    skip: Sequence[str] = (),
    drop: Sequence[str] = (),
    where: str = "the weights",
) -> Merge:
    """Decides what becomes of every array.

    Args:
      weights: the arrays there are, or their shapes, by path.
      source: the model that they are of; without it nothing is resampled.
      params: the arrays that are wanted, or their shapes, by path.
      skip: patterns of the model's arrays that start afresh, whatever the weights hold.
      drop: patterns of the weights' arrays that may be left over.

    Raises:
      InputError: an array is missing, left over, or of a shape that nothing known explains, and
        is not listed.
    """
    report, changes, lines = Report(), {}, []
    old, new = (geometry_of(source) if source else None), geometry_of(target)
    method = dict(target.arguments).get("position_resampling", "bicubic_antialias")
    for name, array in params.items():
        if matches(skip, name):
            report.fresh.append(name)
            continue
        if name not in weights:
            lines.append(f"{name} {array.shape}: not there (model.skip it to start it afresh)")
            continue
        there, wanted = tuple(weights[name].shape), tuple(array.shape)
        change, said = None, ""
        if old is not None and new is not None and old.shape.width == new.shape.width:
            if name == PATCHES and old.stem == new.stem == "patch":
                change, said = _patches(old, new)
            elif name == POSITIONS:
                change, said = _positions(old, new, method)
        if said and change is not None:
            report.resampled[name], changes[name] = said, change
        elif there == wanted:
            report.loaded.append(name)
        else:
            lines.append(f"{name}: {there} there, {wanted} wanted")
    left = [name for name in weights if name not in params]
    report.dropped += [name for name in left if matches(drop, name)]
    lines += [f"{name}: left over" for name in left if not matches(drop, name)]
    used = {*report.loaded, *report.resampled, *report.dropped}
    report.dropped += [name for name in weights if name in params and name not in used
                       and name in report.fresh]  # fmt: skip
    if lines:
        shown = "\n  ".join(lines[:6])
        raise InputError(
            f"{where} and the model differ in {len(lines)} arrays:\n  {shown}\n"
            "list the model's arrays that may start afresh (init.skip) and those of the weights "
            "that may be left over (init.drop), as in init.skip=('head/.*',)"
        )
    return Merge(changes, report)
