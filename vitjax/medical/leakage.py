"""A guard against leakage: groups and images that are on both sides of a split.

Two images are the same if their decoded pixels are (compared by hash, as RGB). They are near if
they look the same when small: a signature of 256 bits differs in at most 11, and, where pixels are
at hand, thumbnails correlate by at least 0.98. A bit of the signature is the sign of a fixed
projection of the 12 x 12 lowest frequencies of a 32 x 32 grey thumbnail, each weighted by its
frequency, since pictures have little energy in high ones. Compression, resizing and brightness
turn a few bits (99% of photographs at JPEG quality 30 turn 4 at most), other pictures a hundred
(of 80,000 pairs of chest radiographs 99.9% turn 49 or more). Crops, rotations and flips are not
found.

11 bits in 12 bands leave one band equal, so a look-up by bands misses no pair and is not quadratic:
100,000 crops of radiographs take two million comparisons.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64
from PIL import Image

from vitjax.data.images import decode
from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.cohort import SPLITS, Cohort

SIDE, LOW, BITS = 32, 12, 256
LIMIT, CORRELATION = 11, 0.98
BANDS, BAND = LIMIT + 1, BITS // (LIMIT + 1)
FLAT = 2.0  # grey levels of spread, below which an image looks like all others
CHUNK = 1 << 20  # pairs that are compared at once
LISTED = 20
VERSION = 1
Pairs = tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]


@dataclasses.dataclass(frozen=True)
class Same:
    """Images with the same pixels.

    Attributes:
      ids, splits: of each.
      agree: whether their labels are the same.
    """

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    agree: bool


@dataclasses.dataclass(frozen=True)
class Near:
    """Two images that look the same, but have other pixels, and are of two groups."""

    ids: tuple[str, str]
    splits: tuple[str, str]
    correlation: float


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """What was found in a cohort, or between its splits.

    Attributes:
      exact: groups of the same pixels.
      near: pairs; of the same pixels in a split one image stands for all.
      unreadable: ids of images that could not be compared.
    """

    exact: tuple[Same, ...]
    near: tuple[Near, ...]
    looked_at: int
    unreadable: tuple[str, ...] = ()

    def across(self) -> "Duplicates":
        """Those that are in more than one split."""
        exact = tuple(x for x in self.exact if len(set(x.splits) - {""}) > 1)
        near = tuple(x for x in self.near if len(set(x.splits) - {""}) > 1)
        return dataclasses.replace(self, exact=exact, near=near)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many of each kind there are in which splits, such as {"exact": {"train/val": 8}}."""
        return {
            name: dict(Counter("/".join(s for s in (*SPLITS, "") if s in x.splits) for x in found))
            for name, found in (("exact", self.exact), ("near", self.near))
        }


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Of images: no pixels, so that it can be kept beside a checkpoint.

    Attributes:
      ids: `[N]`.
      pixels: `[N, 2]`, a hash of the decoded pixels.
      bits: `[N, 4]`, the signature.
      is_flat: `[N]`, images of one value, whose signature says nothing.
    """

    ids: np.ndarray
    pixels: UInt64[np.ndarray, "N 2"]
    bits: UInt64[np.ndarray, "N 4"]
    is_flat: Bool[np.ndarray, " N"]

    def save(self, path: str) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        np.savez_compressed(path, version=np.array(VERSION), **fields)

    @classmethod
    def load(cls, path: str) -> "Hashes":
        if not os.path.isfile(path):
            raise InputError(f"no such file: {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise InputError(f"{path} is an index of another version: make it anew")
                return cls(*(file[field.name] for field in dataclasses.fields(cls)))
        except (zipfile.BadZipFile, ValueError, OSError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read {path} as an index of hashes: {error}") from error


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Images of a cohort that another set holds too: pairs of its id and the other's."""

    exact: tuple[tuple[str, str], ...]
    near: tuple[tuple[str, str], ...]
    looked_at: int
    others: int
    splits: dict[str, int]  # of the cohort's images that are found


def check_groups(cohort: Cohort) -> None:
    """No group, and nothing that is scored as one, may be in two splits.

    Raises:
      InputError: some are; it lists the first twenty and counts the others.
    """
    problems = []
    kinds = [(cohort.group_kind, cohort.groups)]
    kinds += [] if cohort.units is None else [(cohort.unit_kind, cohort.units)]
    for kind, values in kinds:
        names, members = np.unique(values, return_inverse=True)
        words = [name for name in sorted(set(cohort.splits.tolist())) if name]
        counts = np.zeros((len(names), len(words)), np.int64)
        for number, word in enumerate(words):
            counts[:, number] = np.bincount(members[cohort.splits == word], minlength=len(names))
        for row in np.flatnonzero((counts > 0).sum(1) > 1).tolist():
            where = ", ".join(f"{n} in {w}" for w, n in zip(words, counts[row], strict=True) if n)
            problems.append(f"{kind} {names[row]}: {where}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        more = f"\n  ... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise InputError(
            f"{cohort.name}: {len(problems)} groups are on both sides of a split:{listed}{more}"
        )


def duplicates(
    cohort: Cohort, rows: Int[np.ndarray, " n"] | None = None, num_threads: int = 2
) -> Duplicates:
    """The same and nearly the same images; near ones only of different groups.

    Args:
      rows: those to compare; all by default.
    """
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    hashes, small, unreadable = _look(lambda i: cohort.images[i], cohort.ids, rows, num_threads)
    rows = np.setdiff1d(rows, unreadable, assume_unique=True) if len(unreadable) else rows
    splits, ids, targets = cohort.splits[rows], hashes.ids, cohort.targets[rows]
    _, which, sizes = np.unique(hashes.pixels, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    exact = []
    several = np.flatnonzero(sizes[which] > 1)
    several = several[np.argsort(which[several], kind="stable")]
    bounds = np.flatnonzero(np.diff(which[several])) + 1
    for group in np.split(several, bounds) if len(several) else []:
        agree = all(np.array_equal(targets[i], targets[group[0]], equal_nan=True) for i in group)
        exact.append(Same(_texts(ids[group]), _texts(splits[group]), agree))
    exact.sort(key=lambda same: same.ids)
    # One image stands for those of the same pixels in a split.
    words, numbers = np.unique(splits, return_inverse=True)
    _, first = np.unique(which * len(words) + numbers, return_index=True)
    first = np.sort(first)[~hashes.is_flat[np.sort(first)]]
    _, groups = np.unique(cohort.groups[rows], return_inverse=True)
    one, other = (first[x] for x in _close(hashes.bits[first], None))
    differ = (which[one] != which[other]) & (groups[one] != groups[other])
    one, other = one[differ], other[differ]
    alike = _correlations(small, one, other)
    near = [
        Near((str(ids[i]), str(ids[j])), (str(splits[i]), str(splits[j])), float(c))
        for i, j, c in zip(one.tolist(), other.tolist(), alike.tolist(), strict=True)
        if c >= CORRELATION
    ]
    near.sort(key=lambda pair: (-pair.correlation, pair.ids))
    names = tuple(str(cohort.ids[i]) for i in unreadable)
    return Duplicates(tuple(exact), tuple(near), len(rows), names)


def hash_index(source: Any, path: str | None = None, num_threads: int = 2) -> Hashes:
    """Hashes of a source of training data, or of a cohort, to be compared with others later.

    Args:
      path: an npz file, which is written.
    """
    if isinstance(source, Cohort):
        found, _, _ = _look(
            lambda i: source.images[i], source.ids, np.arange(len(source)), num_threads
        )
    else:
        found, _, _ = _look(
            lambda i: source[i]["image"], None, np.arange(len(source)), num_threads,
            lambda i: str(source[i].get("id", i)),
        )  # fmt: skip
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found


def overlap(
    cohort: Cohort,
    others: Hashes | str,
    rows: Int[np.ndarray, " n"] | None = None,
    num_threads: int = 2,
) -> Overlap:
    """Which images of a cohort are in another set, such as that of pretraining.

    Near ones are told by their signatures alone, for an index holds no pixels.

    Args:
      others: an index, or the path of a saved one.
    """
    others = Hashes.load(others) if isinstance(others, str) else others
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    mine, _, unreadable = _look(lambda i: cohort.images[i], cohort.ids, rows, num_threads)
    rows = np.setdiff1d(rows, unreadable, assume_unique=True) if len(unreadable) else rows
    places: dict[tuple[int, int], int] = {}
    for number, key in enumerate(map(tuple, others.pixels.tolist())):
        places.setdefault(key, number)
    found = [places.get(tuple(key), -1) for key in mine.pixels.tolist()]
    exact = [(row, place) for row, place in enumerate(found) if place >= 0]
    left = np.flatnonzero((np.array(found) < 0) & ~mine.is_flat)
    there = np.flatnonzero(~others.is_flat)
    one, other = _close(mine.bits[left], others.bits[there])
    near = list(zip(left[one].tolist(), there[other].tolist(), strict=True))
    touched = sorted({row for row, _ in exact + near})
    return Overlap(
        exact=tuple((str(mine.ids[i]), str(others.ids[j])) for i, j in exact),
        near=tuple((str(mine.ids[i]), str(others.ids[j])) for i, j in near),
        looked_at=len(rows),
        others=len(others.ids),
        splits=dict(Counter(cohort.splits[rows][touched].tolist())),
    )


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _look(
    read: Callable[[int], Any],
    ids: Sequence[str] | None,
    rows: np.ndarray,
    num_threads: int,
    name: Callable[[int], str] | None = None,
) -> tuple[Hashes, UInt8[np.ndarray, "N Y X"], np.ndarray]:
    """Hashes and thumbnails of the rows that can be read, and those that cannot."""

    def one(row: int) -> tuple[bytes, np.ndarray, bool] | None:
        try:
            return _small(decode(read(row), 3))
        except UnreadableImage:
            return None

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(one, rows.tolist(), chunksize=64))
    good = [number for number, item in enumerate(found) if item is not None]
    items = [item for item in found if item is not None]
    small = np.zeros((len(good), SIDE, SIDE), np.uint8)
    for number, (_, thumbnail, _) in enumerate(items):
        small[number] = thumbnail
    raw = b"".join(digest for digest, _, _ in items)
    names = [str(ids[row]) if ids is not None else name(row) if name else str(row)
             for row in rows[good].tolist()]  # fmt: skip
    hashes = Hashes(
        ids=np.array(names, str),
        pixels=np.frombuffer(raw, np.uint64).reshape(-1, 2),
        bits=signatures(small),
        is_flat=np.array([is_flat for _, _, is_flat in items], bool),
    )
    return hashes, small, np.delete(rows, good)


def _small(pixels: UInt8[np.ndarray, "Y X 3"]) -> tuple[bytes, np.ndarray, bool]:
    """A hash of the pixels, a thumbnail that uses all 256 grey levels, whether it has but one."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
    digest.update(repr(pixels.shape).encode())
    grey = Image.fromarray(pixels).convert("L").convert("F")
    values = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    low, high = float(values.min()), float(values.max())
    thumbnail = ((values - low) * (255 / max(high - low, 1e-6))).round().astype(np.uint8)
    return digest.digest(), thumbnail, float(values.std()) < FLAT


@functools.cache
def _projection() -> np.ndarray:
    """Signs `[F, 256]` for each frequency but the constant one, times the frequency."""
    count = LOW * LOW - 1
    stream = hashlib.shake_256(b"vitjax leakage 1").digest(count * BITS // 8)
    signs = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(count, BITS) * 2.0 - 1
    squares = np.add.outer(np.arange(LOW) ** 2, np.arange(LOW) ** 2).reshape(-1)[1:]
    return (signs * np.sqrt(squares)[:, None]).astype(np.float32)


def signatures(thumbnails: UInt8[np.ndarray, "N Y X"]) -> UInt64[np.ndarray, "N 4"]:
    """256 bits of each thumbnail of 32 x 32."""
    from scipy.fft import dctn

    packed = np.zeros((len(thumbnails), BITS // 64), np.uint64)
    for start in range(0, len(thumbnails), 4096):
        part = thumbnails[start : start + 4096].astype(np.float32)
        low = np.asarray(dctn(part, axes=(1, 2), norm="ortho"))[:, :LOW, :LOW]
        low = low.reshape(len(part), -1)[:, 1:]
        bits = np.packbits(low @ _projection() > 0, axis=1)
        packed[start : start + 4096] = bits.view(np.uint64)
    return packed


def _bands(bits: UInt64[np.ndarray, "N 4"]) -> Int[np.ndarray, "B N"]:
    """The signature in 12 bands of 21 bits."""
    each = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1)[:, : BANDS * BAND]
    weights = 1 << np.arange(BAND)
    return (each.reshape(-1, BANDS, BAND).astype(np.int32) @ weights.astype(np.int32)).T


def _close(ours: UInt64[np.ndarray, "N 4"], theirs: UInt64[np.ndarray, "M 4"] | None) -> Pairs:
    """All pairs of signatures that differ in at most 11 bits; each once, of one set or of two."""
    within = theirs is None
    others = ours if theirs is None else theirs
    keys = []
    for left, right in zip(_bands(ours), _bands(others), strict=True):
        order = np.argsort(right, kind="stable")
        ranked = right[order]
        start = np.searchsorted(ranked, left, "left")
        sizes = np.searchsorted(ranked, left, "right") - start
        ends = np.cumsum(sizes)
        begin = 0
        while begin < len(left):
            done = ends[begin - 1] if begin else 0
            stop = max(int(np.searchsorted(ends, done + CHUNK, "right")), begin + 1)
            counts = sizes[begin:stop]
            one = np.repeat(np.arange(begin, stop), counts)
            inner = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
            other = order[np.repeat(start[begin:stop], counts) + inner]
            if within:
                one, other = one[one < other], other[one < other]
            differ = np.bitwise_count(ours[one] ^ others[other]).sum(1, dtype=np.int32)
            is_close = differ <= LIMIT
            keys.append(one[is_close] * len(others) + other[is_close])
            begin = stop
    found = np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
    one, other = np.divmod(found, max(len(others), 1))
    return one, other


def _correlations(small: UInt8[np.ndarray, "N Y X"], one: np.ndarray, other: np.ndarray):
    """Of the thumbnails of each pair."""
    found = np.zeros(len(one))
    for start in range(0, len(one), 4096):
        pair = [small[x[start : start + 4096]].reshape(-1, SIDE * SIDE) for x in (one, other)]
        left, right = (x - x.mean(1, keepdims=True, dtype=np.float32) for x in pair)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        found[start : start + 4096] = (left * right).sum(1) / np.maximum(norms, 1e-6)
    return found
