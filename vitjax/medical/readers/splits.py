"""Splits where a data set has none: by group, each class in each, whatever the order of rows."""

import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import SPLITS

Labels = Float[np.ndarray, "N"] | Float[np.ndarray, "N L"]


def draw(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and a name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def held_out(groups: np.ndarray, fraction: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Rows of a fraction of the groups: those with the smallest hash, so one group at least.

    Raises:
      InputError: the fraction is not in [0, 1), or there is one group only.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, got {fraction}")
    names, members = np.unique(groups, return_inverse=True)
    if not fraction:
        return np.zeros(len(groups), bool)
    if len(names) < 2:
        raise InputError(f"val_fraction is {fraction}, but there is only one group: {names}")
    draws = np.array([draw(seed, name) for name in names.tolist()])
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    chosen = np.zeros(len(names), bool)
    chosen[np.argsort(draws, kind="stable")[:count]] = True
    return chosen[members]


def carve(
    groups: np.ndarray, labels: Labels, fractions: Mapping[str, float], seed: int
) -> np.ndarray:
    """A split for each row: no group is parted, and each class is in each split where it can be.

    A group counts for the rarest class that it has. Of each class the groups come in the order of
    their hash; one goes to each split, the largest first, and the others to where most rows lack.

    Args:
      groups: of each row.
      labels: numbers of classes `[N]`, or 0 and 1 `[N, L]`; NaN where unknown.
      fractions: of rows, such as {"train": 0.7, "val": 0.1, "test": 0.2}; they sum to 1.

    Raises:
      InputError: the fractions are no such thing, or there are fewer groups than splits.
    """
    for name in fractions:
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r}; {suggest(name, SPLITS)}")
    total = sum(fractions.values())
    if min(fractions.values(), default=0) < 0 or abs(total - 1) > 1e-6:
        raise InputError(f"fractions must not be negative and sum to 1, got {dict(fractions)}")
    order = sorted((n for n in fractions if fractions[n]), key=lambda n: (-fractions[n], n))
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < len(order):
        raise InputError(f"{len(order)} splits cannot be made of {len(names)} groups")
    shares = np.array([fractions[name] for name in order])
    return np.array(order)[_assign(names, members, labels, shares, seed)[members]]


def folds(groups: np.ndarray, labels: Labels, k: int, seed: int) -> Int[np.ndarray, " N"]:
    """The fold, 0 to k - 1, of each row: as `carve`, in k equal parts."""
    names, members = np.unique(groups, return_inverse=True)
    if not 2 <= k <= len(names):
        raise InputError(f"k must be 2 to {len(names)}, the number of groups; got {k}")
    return _assign(names, members, labels, np.full(k, 1 / k), seed)[members]


def complete(
    splits: np.ndarray,
    groups: np.ndarray,
    labels: Labels,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Splits with those that are missing carved, of train or of all rows, and a note on it.

    Args:
      splits: "train", "val", "test" or "" of each row. Where there is any, rows of "" stay so.
      val_fraction, test_fraction: of the rows that are carved, where there is no such split.
    """
    present = set(splits.tolist()) - {""}
    shares = {"val": val_fraction, "test": test_fraction}
    shares = {name: part for name, part in shares.items() if name not in present and part}
    if not shares or (present and "train" not in present):
        return splits, ()
    rows = np.flatnonzero(splits == "train") if present else np.arange(len(splits))
    made = np.array(splits, "U5")
    fractions = {"train": 1 - sum(shares.values()), **shares}
    made[rows] = carve(groups[rows], labels[rows], fractions, seed)
    names = " and ".join(shares)
    return made, (f"{names} carved by group from {'train' if present else 'all rows'}.",)


def _assign(
    names: np.ndarray, members: np.ndarray, labels: Labels, shares: np.ndarray, seed: int
) -> Int[np.ndarray, " G"]:
    """The part of each group."""
    strata = _strata(members, labels, len(names))
    sizes = np.bincount(members, minlength=len(names))
    draws = np.array([draw(seed, name) for name in names.tolist()])
    parts = np.zeros(len(names), np.int64)
    filled = np.zeros(len(shares))
    for stratum in np.unique(strata):
        chosen = np.flatnonzero(strata == stratum)
        chosen = chosen[np.argsort(draws[chosen], kind="stable")]
        first = np.lexsort((filled, -shares))  # the largest; of equal ones, the emptiest
        counts = np.zeros(len(shares))
        rows = sizes[chosen].sum()
        for number, group in enumerate(chosen.tolist()):
            lack = shares * rows - counts
            part = int(first[number] if number < len(shares) else lack.argmax())
            parts[group] = part
            counts[part] += sizes[group]
        filled += counts
    for part in np.setdiff1d(np.arange(len(shares)), parts):  # none may be empty
        largest = np.bincount(parts, minlength=len(shares)).argmax()
        parts[min(np.flatnonzero(parts == largest), key=lambda g: draws[g])] = part
    return parts


def _strata(members: np.ndarray, labels: Labels, count: int) -> Int[np.ndarray, " G"]:
    """The rarest class of each group; -1 of one that has none."""
    labels = np.asarray(labels, np.float64)
    if labels.ndim == 1:
        known = np.isfinite(labels)
        classes = np.unique(labels[known])
        has = (labels[:, None] == classes[None, :]) if len(classes) else labels[:, None] != labels
        has = has & known[:, None]
    else:
        has = np.nan_to_num(labels) > 0.5
    strata = np.full(count, -1)
    frequency = has.sum(0)
    for number in np.argsort(-frequency, kind="stable"):  # the rarest is written last
        strata[members[has[:, number]]] = number
    return strata
