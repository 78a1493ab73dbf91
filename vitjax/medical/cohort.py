"""A cohort: one table that a reader makes of a medical data set, whatever its files look like.

A row is an image. What is scored may be larger (a study of several views, a slide), and what must
not be parted between splits larger still (a patient, a lesion, a centre).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from vitjax.errors import InputError, UnreadableImage, suggest

KINDS = ("single", "multi", "ordinal")
SPLITS = ("train", "val", "test")
AGGREGATES = ("max", "mean")


@runtime_checkable
class Images(Protocol):
    """What is read by number: a list, an array, or a class such as `Files`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """One question that is asked of an image.

    Attributes:
      name: such as "finding".
      kind: "single" (one of the classes), "ordinal" (one of the classes, which have an order), or
        "multi" (each class is there or not).
      classes: their names, in the labels' order.
    """

    name: str
    kind: str
    classes: tuple[str, ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"label set {self.name!r}: {suggest(self.kind, KINDS)}")
        if len(self.classes) < (1 if self.kind == "multi" else 2):
            raise InputError(f"label set {self.name!r} has {len(self.classes)} classes")
        if len(set(self.classes)) != len(self.classes):
            raise InputError(f"label set {self.name!r}: two classes have the same name")

    @property
    def num_columns(self) -> int:
        """Of its labels: one for each class of "multi", else one that holds the class's number."""
        return len(self.classes) if self.kind == "multi" else 1

    @property
    def num_logits(self) -> int:
        """Of the head: one a class, or one for each step between ordered classes."""
        return len(self.classes) - (self.kind == "ordinal")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Images with labels, splits, groups and what else is known.

    Attributes:
      name: of the data set.
      images: `images[i]` is an encoded file or an array as `vitjax.data.images.decode` takes; read
        from many threads, raises UnreadableImage.
      ids: of each image, unique.
      label_sets: what is asked.
      labels: of each label set by name: `[N]` numbers of classes ("single", "ordinal"), or
        `[N, L]` with 1, 0 or a probability between ("multi"); float32, NaN where unknown.
      splits: "train", "val" or "test" of each image; "" where the data set does not say.
      groups: what may not be parted between splits, of each image.
      group_kind: what a group is: "patient", "lesion", "slide", "image".
      units: what is scored, of each image; the image itself by default.
      unit_kind: what a unit is: "study", "image", "slide".
      aggregate: how the images of a unit make one score: "max" or "mean" of probabilities.
      columns: what else is known of each image, such as age (float, NaN where blank), sex, view,
        centre (str, "" where blank): for the subgroup audit and as inputs.
      policy: of `vitjax.data.policies`, that suits the images; None for none.
      min_crop_area: the least part of an image that a random crop may have, because the label is of
        its centre; 0 for any.
      official: import path of the data set's own metric, `vitjax.medical.official:...`, or None.
      task: what the data set calls its task, where the official metric asks.
      channels: 1 for grey, 3 for RGB.
      notes: what a reader of a report must know of this data, a sentence each.
      licence: what its publisher says, a line.
      files: what was read, for the data's hash.
      folds: for cross-validation, of each image the fold that it is in, -1 of one that is never
        trained on; None without.
    """

    name: str
    images: Images
    ids: Sequence[str]
    label_sets: tuple[LabelSet, ...]
    labels: Mapping[str, Float[np.ndarray, "N ..."]]
    splits: np.ndarray
    groups: np.ndarray
    group_kind: str = "image"
    units: np.ndarray | None = None
    unit_kind: str = "image"
    aggregate: str = "mean"
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    policy: str | None = None
    min_crop_area: float = 0.0
    official: str | None = None
    task: str | None = None
    channels: int = 1
    notes: tuple[str, ...] = ()
    licence: str = ""
    files: tuple[str, ...] = ()
    folds: Int[np.ndarray, " N"] | None = None

    def __post_init__(self):
        total = len(self.images)
        if not total:
            raise InputError(f"{self.name} has no image that can be used")
        if self.aggregate not in AGGREGATES:
            raise InputError(f"{self.name}: {suggest(self.aggregate, AGGREGATES)}")
        sizes = {"ids": self.ids, "splits": self.splits, "groups": self.groups, **self.columns}
        sizes |= {} if self.units is None else {"units": self.units}
        for name, values in sizes.items():
            if len(values) != total:
                raise InputError(f"{self.name}: {total} images, but {len(values)} {name}")
        for label_set in self.label_sets:
            found = self.labels[label_set.name].shape
            wanted = (total, label_set.num_columns) if label_set.kind == "multi" else (total,)
            if found != wanted:
                raise InputError(
                    f"{self.name}: labels {label_set.name!r} are {found}, not {wanted}"
                )
        unknown = sorted(set(self.splits.tolist()) - {*SPLITS, ""})
        if unknown:
            raise InputError(f"{self.name}: {suggest(unknown[0], SPLITS)}")

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, split: str, seed: int | None = None) -> Int[np.ndarray, " n"]:
        """The numbers of the images of a split.

        Args:
          seed: with folds, "val" is the fold of that number, counted round, and "train" all other
            folds; None for the data set's own splits.
        """
        if self.folds is None or seed is None or split not in ("train", "val"):
            return np.flatnonzero(self.splits == split)
        is_held_out = self.folds == seed % (self.folds.max() + 1)
        return np.flatnonzero(is_held_out if split == "val" else (self.folds >= 0) & ~is_held_out)

    def label_set(self, name: str) -> LabelSet:
        found = {s.name: s for s in self.label_sets}
        if name not in found:
            raise InputError(f"{self.name} has no label set {name!r}; {suggest(name, found)}")
        return found[name]

    @property
    def targets(self) -> Float[np.ndarray, "N W"]:
        """All label sets side by side: what an objective sees of them."""
        parts = [np.asarray(self.labels[s.name], np.float32) for s in self.label_sets]
        return np.concatenate([p if p.ndim == 2 else p[:, None] for p in parts], 1)


class CohortSource:
    """Some rows of a cohort as a source of training data: labels are vectors with NaN for unknown.

    Args:
      rows: numbers of images; all by default.
      inputs: `[N, M]` of the whole cohort: numbers beside the image, NaN where unknown.
    """

    may_lack_classes = True

    def __init__(
        self,
        cohort: Cohort,
        rows: Int[np.ndarray, " n"] | None = None,
        inputs: Float[np.ndarray, "N M"] | None = None,
    ):
        self.cohort, self.inputs = cohort, inputs
        self.rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
        self.targets = cohort.targets
        self.num_targets = self.targets.shape[1]
        self.num_inputs = 0 if inputs is None else inputs.shape[1]
        self.num_classes = sum(s.num_logits for s in cohort.label_sets)
        first = cohort.label_sets[0]
        is_plain = len(cohort.label_sets) == 1 and first.kind != "ordinal"
        self.class_names = first.classes if is_plain else None  # of the head's logits

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        record = {
            "image": self.cohort.images[row],
            "label": self.targets[row],
            "id": str(self.cohort.ids[row]),
            "group": str(self.cohort.groups[row]),
        }
        return record if self.inputs is None else record | {"inputs": self.inputs[row]}

    def all_groups(self) -> list[str]:
        return self.cohort.groups[self.rows].tolist()

    def all_labels(self) -> np.ndarray | None:
        """Where there is one set of one class each, all known; else None."""
        if [s.kind for s in self.cohort.label_sets] != ["single"]:
            return None
        labels = self.targets[self.rows, 0]
        return None if np.isnan(labels).any() else labels.astype(np.int64)


class Files:
    """Image files as a sequence, read when they are asked for."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        try:
            with open(self.paths[index], "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(f"{error.strerror}: {self.paths[index]}") from error
