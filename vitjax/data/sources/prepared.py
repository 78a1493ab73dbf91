"""A data set as `vitjax data prepare` wrote it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.data.preparing import card as card_lib
from vitjax.data.sources.array_record import parse_example
from vitjax.data.sources.labels import AllLabels, Labels
from vitjax.data.sources.names import Names
from vitjax.errors import InputError, UnreadableImage, suggest

PREPARING = ".preparing"  # in the folder, while it is being prepared


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What ArrayRecordDataSource asks of a file, so that it need not open all to count records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """One split of a prepared folder; labels and groups are known without reading an image.

    Args:
      root: the folder that `--out` named.
      split: as it was prepared.

    Raises:
      InputError: it is no such folder, was not finished, or lacks the split.
    """

    def __init__(self, root: str, split: str = "train"):
        import grain

        folder = Path(root)
        if not root or not folder.is_dir():
            raise InputError(f"no such folder: {root!r}")
        card = card_lib.read_card(folder)
        splits = card["splits"] if card else {}
        if split not in splits:
            if (folder / PREPARING / split).is_dir():
                raise InputError(
                    f"{folder} is not finished: run the same `vitjax data prepare` of its split "
                    f"{split!r} again to go on"
                )
            if card is None:
                raise InputError(
                    f"{folder} has no {card_lib.NAME}: it was not made by `vitjax data prepare`"
                )
            raise InputError(f"{folder} has no split {split!r}; {suggest(split, splits)}")
        assert card is not None
        self.card = card
        self.num_classes: int = card["num_classes"]
        names = card["class_names"]
        self.class_names: tuple[str, ...] | None = tuple(names) if names else None
        self.is_multi_label: bool = splits[split]["multi_label"]
        self._groups = None
        index = folder / f"{split}.index.npz"
        try:
            with np.load(index, allow_pickle=False) as file:
                labels, sizes = file["labels"], file["shard_examples"]
                self._bytes = file["shard_bytes"].tolist()
                ends = file["label_ends"] if self.is_multi_label else None
                if "group_numbers" in file.files:
                    self._groups = Names.from_packed(file["group_letters"], file["group_ends"])
                    self._group_numbers = file["group_numbers"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read {index}: {error}") from error
        self._labels = Labels(labels, ends)
        self._paths = shard_paths(folder, split, len(sizes))
        shards: Any = [
            _Shard(str(path), 0, size, size)
            for path, size in zip(self._paths, sizes.tolist(), strict=True)
        ]
        if sizes.sum() != len(self._labels) or not len(labels):
            raise InputError(
                f"{index} has {len(self._labels)} labels for {sizes.sum()} examples: it is damaged"
            )
        self._records: Any = grain.sources.ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from google.protobuf.message import DecodeError

        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            record = parse_example(self._records[index])
            image, example_id = record["image"][0], record["id"][0]
        except (RuntimeError, ValueError, OSError, DecodeError, KeyError, IndexError) as error:
            raise UnreadableImage(f"damaged record: {error}") from error
        example = {"image": image, "label": self._labels[index], "id": os.fsdecode(example_id)}
        if self._groups is not None:
            example["group"] = self._groups[int(self._group_numbers[index])]
        return example

    def all_labels(self) -> AllLabels:
        return self._labels.of_all()

    def all_groups(self) -> list[str] | None:
        """A name for each example; None if the data set has no groups."""
        if self._groups is None:
            return None
        names = list(self._groups)
        return [names[number] for number in self._group_numbers]

    def problems(self) -> list[str]:
        """Shards that are gone, or whose size has changed."""
        found = []
        for path, size in zip(self._paths, self._bytes, strict=True):
            if not path.is_file():
                found.append(f"{path} is missing")
            elif (now := path.stat().st_size) != size:
                found.append(f"{path} has {now} bytes; when it was prepared it had {size}")
        return found


def shard_paths(folder: Path, split: str, num_shards: int) -> list[Path]:
    return [
        folder / f"{split}-{number:05}-of-{num_shards:05}.array_record"
        for number in range(num_shards)
    ]
