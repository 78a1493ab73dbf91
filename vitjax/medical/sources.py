"""A cohort's rows as the data of a training run, by import path in its config."""

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vitjax import config as config_lib
from vitjax.config import Block
from vitjax.errors import InputError, suggest
from vitjax.medical import leakage
from vitjax.medical.cohort import Cohort, CohortSource
from vitjax.medical.readers import splits

TARGET = "vitjax.medical.sources:cohort_rows"


def open_cohort(
    block: Block, val_fraction: float = 0.15, test_fraction: float = 0.2, folds: int = 0
) -> Cohort:
    """What the reader that a block names makes of its files; the same block is read once.

    A set without a validation or a test split gets one, by group, always the same.

    Args:
      block: of a reader.
      val_fraction, test_fraction: of the images, where they must be carved.
      folds: above 0, so many folds of the training and validation images, by group, and images
        that look alike in one fold.

    Raises:
      InputError: a fraction or a number of folds that cannot be.
    """
    text = json.dumps(config_lib.plain(block), sort_keys=True)
    return _opened(text, val_fraction, test_fraction, folds)


@functools.lru_cache(maxsize=4)
def _opened(text: str, val_fraction: float, test_fraction: float, folds: int) -> Cohort:
    if folds:
        return _in_folds(_opened(text, val_fraction, test_fraction, 0), folds)
    cohort = config_lib.build(json.loads(text))
    if not isinstance(cohort, Cohort):
        raise InputError(f"cohort.target gives {type(cohort).__name__}, not a Cohort")
    fractions = {"val": val_fraction, "test": test_fraction}
    missing = {k: v for k, v in fractions.items() if not len(cohort.rows(k))}
    if not missing:
        return cohort
    for name, value in missing.items():
        if not 0 < value < 1:
            raise InputError(f"{name}_fraction must be between 0 and 1, got {value}")
    rows = np.flatnonzero(np.isin(cohort.splits, ["train", ""]))
    if not len(rows):
        raise InputError(f"{cohort.name} has no images to train on, only {set(cohort.splits)}")
    labels = np.asarray(cohort.labels[cohort.label_sets[0].name])[rows]
    shares = {"train": 1 - sum(missing.values()), **missing}
    made = cohort.splits.astype("U5")
    made[rows] = splits.carve(cohort.groups[rows], labels, shares, seed=0)
    note = f"Carved from the training images by {cohort.group_kind}: {', '.join(missing)}."
    return dataclasses.replace(cohort, splits=made, notes=(*cohort.notes, note))


def _in_folds(cohort: Cohort, number: int) -> Cohort:
    rows = np.flatnonzero(np.isin(cohort.splits, ["train", "val"]))
    groups = joined_groups(cohort)[rows]
    most = len(np.unique(groups))
    if not 2 <= number <= most:
        raise InputError(
            f"folds must be 0 for none, or 2 to {most}, the number of {cohort.group_kind}s that "
            f"do not look alike; got {number}"
        )
    labels = np.asarray(cohort.labels[cohort.label_sets[0].name])[rows]
    folds = np.full(len(cohort), -1)
    folds[rows] = splits.folds(groups, labels, number, seed=0)
    note = (
        f"Cross-validated: the {len(rows)} training and validation images are in {number} folds, "
        "those that look alike in one. A seed is trained on all folds but one, which validates it."
    )
    return dataclasses.replace(cohort, folds=folds, notes=(*cohort.notes, note))


def joined_groups(cohort: Cohort) -> np.ndarray:
    """A group of each image, as the cohort's, where images that look alike are of one group.

    Only training and validation images are joined to others.
    """
    names, members = np.unique(cohort.groups, return_inverse=True)
    row_of = {str(name): row for row, name in enumerate(cohort.ids)}
    found = leakage.duplicates(cohort)
    a, b = [], []
    for same in (*found.exact, *found.near):
        rows = [row_of[i] for i, s in zip(same.ids, same.splits, strict=True) if s != "test"]
        a += members[rows[:-1]].tolist()
        b += members[rows[1:]].tolist()
    links = coo_array((np.ones(len(a)), (a, b)), shape=(len(names), len(names)))
    joined = connected_components(links, directed=False)[1]
    first = np.unique(joined, return_index=True)[1]
    return names[first[joined[members]]]


def cohort_rows(
    cohort: Block,
    split: str,
    labelled: float = 1.0,
    seed: int = 0,
    inputs: Sequence[str] = (),
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    folds: int = 0,
) -> CohortSource:
    """The rows of a split.

    Args:
      cohort: the block of a reader.
      labelled: the share of the split's groups that is used, or above 1 the number of its images;
        smaller parts lie within larger ones of the same seed.
      inputs: columns that the model sees beside the image.
      val_fraction, test_fraction, folds: see `open_cohort`; the seed holds a fold out.
    """
    opened = open_cohort(cohort, val_fraction, test_fraction, folds)
    rows = part_of(opened, opened.rows(split, seed), labelled, seed)
    encoded = encode_inputs(opened, inputs)[0] if inputs else None
    return CohortSource(opened, rows, encoded)


def part_of(cohort: Cohort, rows: np.ndarray, labelled: float, seed: int) -> np.ndarray:
    """A part of the rows, whole groups, with as many of each class as there are in all.

    Args:
      labelled: the share, or above 1 the number of images that it should have.
    """
    if labelled <= 0:
        raise InputError(f"labelled must be a share or a number above 0, got {labelled}")
    share = labelled if labelled <= 1 else labelled / len(rows)
    if share >= 1:
        return rows
    keys = _strata(cohort, rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    # The groups in a random order; each takes its place within its class.
    groups, place = np.unique(cohort.groups[rows][order], return_index=True)
    of_group = keys[order][place]
    chosen: set = set()
    for key in np.unique(of_group):
        members = groups[of_group == key][np.argsort(place[of_group == key])]
        chosen.update(members[: max(1, round(share * len(members)))].tolist())
    return rows[[g in chosen for g in cohort.groups[rows].tolist()]]


def _strata(cohort: Cohort, rows: np.ndarray) -> np.ndarray:
    """What should be shared out evenly: the class, or whether there is any finding."""
    first = cohort.label_sets[0]
    labels = np.nan_to_num(np.asarray(cohort.labels[first.name])[rows], nan=-1)
    return labels if labels.ndim == 1 else (labels > 0.5).any(1).astype(float)


def encode_inputs(
    cohort: Cohort, names: Sequence[str]
) -> tuple[Float[np.ndarray, "N M"], tuple[int, ...]]:
    """Columns as numbers, and how many each has; NaN where unknown.

    Numbers are centred and scaled as in the training split, categories are 0 and 1 for each value
    that the training split has.
    """
    parts, train = [], cohort.splits == "train"
    for name in names:
        if name not in cohort.columns:
            raise InputError(
                f"{cohort.name} has no column {name!r} for inputs; "
                f"{suggest(name, list(cohort.columns) or ['(none)'])}"
            )
        values = np.asarray(cohort.columns[name])
        if values.dtype.kind == "f":
            centre, scale = np.nanmean(values[train]), np.nanstd(values[train])
            parts.append(((values - centre) / max(float(scale), 1e-6))[:, None])
            continue
        kinds = sorted({v for v in values[train].tolist() if v})
        if not kinds:
            raise InputError(f"column {name!r} of {cohort.name} is blank in the training split")
        found = np.array([[float(v == kind) for kind in kinds] for v in values.tolist()])
        parts.append(np.where(np.isin(values, kinds)[:, None], found, np.nan))
    return np.concatenate(parts, 1).astype(np.float32), tuple(p.shape[1] for p in parts)
