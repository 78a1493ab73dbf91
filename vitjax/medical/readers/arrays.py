"""Images that lie in memory: several arrays end to end, and slices of volumes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vitjax.errors import InputError


class Stacked:
    """Images of several arrays, one after the other.

    Args:
      arrays: uint8 `[N, Y, X]` or `[N, Y, X, C]`.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, side="right"))
        start = self.ends[number - 1] if number else 0
        return np.asarray(self.arrays[number][index - start])


class VolumeSlices:
    """Slices of volumes `[N, Z, Y, X]`: those of the first, then those of the second."""

    def __init__(self, volumes: Stacked, places: Int[np.ndarray, " S"]):
        self.volumes, self.places = volumes, places

    def __len__(self) -> int:
        return len(self.volumes) * len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        volume, place = divmod(index, len(self.places))
        return self.volumes[volume][self.places[place]]


def slice_places(depth: int, slices: str | int) -> Int[np.ndarray, " S"]:
    """Which slices of a volume are used.

    Args:
      slices: "all"; "middle", one; or how many, evenly spaced, each in the middle of its part.
    """
    if slices == "all":
        return np.arange(depth)
    count = 1 if slices == "middle" else slices
    if isinstance(count, str | bool) or not 1 <= count <= depth:
        raise InputError(
            f"slices is {slices!r}; allowed: 'all', 'middle' or a number from 1 to {depth}"
        )
    return ((np.arange(count) + 0.5) * depth / count).astype(np.int64)
