"""Tar shards in the layout of webdataset, with random access."""

import array
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitjax.data.sources.labels import (
    AllLabels,
    LabelCodes,
    Labels,
    count_classes,
    label_problems,
)
from vitjax.data.sources.names import Names
from vitjax.data.sources.shards import OpenFiles, find_files
from vitjax.data.sources.tar_index import Layout, read_shards
from vitjax.errors import InputError, UnreadableImage

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "dcm")


def split_labels(text: str) -> list[str]:
    """Labels parted by commas or spaces, or a JSON list of them.

    Raises:
      ValueError: it begins as a list does, but is none.
    """
    if text.startswith("["):
        return [str(label) for label in json.loads(text)]
    return [part for part in re.split(r"[,\s]+", text) if part]


class TarShards:
    """Tar files whose members are grouped by their name up to the first dot of its last part.

    `000123.jpg` and `000123.cls` make the sample 000123. Where the members lie is read once and
    kept in a small file beside the shards, `.vitjax-tar-*.npz`, or in the user's cache folder;
    shards that changed since (size or time) are read again. Samples without an image or a label
    are left out, and named in `problems()`.

    Args:
      pattern: a glob, or several; also with braces, `train-{000000..000127}.tar`.
      num_classes: the largest label and one more, or as many as class_names, by default.
      class_names: one a class, in the labels' order; labels may then be these names too.
      image: extensions of the image's member, the preferred first.
      label: extension of the label's member: an integer or a name as text, or "json".
      label_key: where the label is in a JSON member.
      multi_label: labels are parted by commas or spaces, or a JSON list.

    Source: the layout as documented by webdataset (Aizman et al. 2019, arXiv 2001.01858).
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        image: str | Sequence[str] = IMAGES,
        label: str = "cls",
        label_key: str = "label",
        multi_label: bool = False,
    ):
        paths = find_files(pattern)
        images = (image,) if isinstance(image, str) else tuple(image)
        layout = Layout(tuple(e.lower().lstrip(".") for e in images), label.lower(), label_key)
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        self._shards = read_shards(paths, patterns, layout)
        self._problems = [problem for shard in self._shards for problem in shard.problems]
        codes, found = LabelCodes(class_names), []
        number, row = array.array("i"), array.array("i")
        for i, shard in enumerate(self._shards):
            for j, text in enumerate(shard.labels):
                try:
                    parts = split_labels(text) if multi_label else [text]
                    label_codes = [codes(part) for part in parts]
                except ValueError as error:
                    self._problems.append(f"{paths[i]}: sample {shard.keys[j]}: {error}")
                    continue
                found.append(label_codes if multi_label else label_codes[0])
                number.append(i)
                row.append(j)
            shard.labels = Names()  # they are numbers from here on
        if not found:
            listed = "\n  ".join(self._problems[:5])
            raise InputError(f"no whole samples in {pattern!r}:\n  {listed or 'it is empty'}")
        self._shard, self._row = np.asarray(number, np.int32), np.asarray(row, np.int32)
        self._labels = Labels.pack(found, multi_label).renumbered(codes.table())
        self.class_names = codes.class_names
        self.num_classes = count_classes(
            num_classes, self.class_names, self._labels.largest, str(pattern)
        )
        self._files = OpenFiles(paths)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = int(self._shard[index]), int(self._row[index])
        shard = self._shards[number]
        key = shard.keys[row]
        size = int(shard.sizes[row])
        if not size:
            raise UnreadableImage(f"{self._files.paths[number]}/{key} is empty")
        return {
            "image": self._files.read(number, int(shard.starts[row]), size),
            "label": self._labels[index],
            "id": f"{self._files.paths[number]}/{key}",
        }

    def all_labels(self) -> AllLabels:
        return self._labels.of_all()

    def problems(self) -> list[str]:
        return self._problems + label_problems(self.all_labels(), self.num_classes)
