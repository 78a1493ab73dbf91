"""What `vitjax data prepare` is asked to do, and the source that it names."""

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

from vitjax import config as config_lib
from vitjax.data.preparing import shard as shard_lib
from vitjax.data.preparing.encoding import Encoding
from vitjax.data.sources import ask
from vitjax.data.sources.labels import label_problems
from vitjax.errors import InputError

LISTED = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """How to prepare a split.

    Attributes:
      source: a folder or a zip of class folders, or the import path of a source.
      arguments: of the source.
      num_shards: None for about 256 MB each.
      num_workers: processes.
      max_unreadable: the share of the examples above which the work stops.
    """

    source: str
    split: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    short_side: int | None = None
    quality: int = 92
    channels: int = 3
    num_shards: int | None = None
    num_workers: int = 1
    keep_duplicates: bool = False
    max_unreadable: float = 0.05
    licence: str | None = None

    def __post_init__(self):
        for name, value in (
            ("short_side", self.short_side),
            ("shards", self.num_shards),
            ("workers", self.num_workers),
        ):
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality must be 1 to 100, got {self.quality}")
        if self.channels not in (1, 3):
            raise InputError(f"--channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if not 0 <= self.max_unreadable <= 1:
            raise InputError(f"--max_unreadable must be 0 to 1, got {self.max_unreadable}")
        if not re.fullmatch(r"\w[\w.+-]*", self.split):
            raise InputError(
                f"--split={self.split!r} cannot name files; allowed: letters, digits, . _ + -"
            )

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.short_side, self.quality, self.channels)

    @property
    def recorded(self) -> dict[str, Any]:
        """What the result depends on, and a restart must not change."""
        return {
            "short_side": self.short_side,
            "quality": self.quality,
            "channels": self.channels,
            "shards": self.num_shards or "auto",
            "keep_duplicates": self.keep_duplicates,
        }


def source_block(source: str, arguments: dict[str, Any], split: str) -> tuple[dict[str, Any], str]:
    """The block of what `--source` names, and what to take off the front of its ids.

    The split is handed to sources that take one; "all" takes a folder as it is.

    Raises:
      InputError: there is neither such a file nor is it an import path.
    """
    path = Path(source)
    if path.exists():
        place = str(path.resolve())
        block = {"target": "vitjax.data.sources.folders:open_folder", "path": place}
        given = {} if split == "all" else {"split": split}
        return block | given | arguments, f"{place}{os.sep}"
    if not re.fullmatch(r"[\w.]+:[\w.]+", source):
        raise InputError(
            f"--source={source}: no such file or folder, and no import path such as "
            "'vitjax.data.sources.arrays:Npz'"
        )
    takes_split = "split" in inspect.signature(config_lib.resolve(source)).parameters
    return {"target": source} | ({"split": split} if takes_split else {}) | arguments, ""


def open_named(
    source: str, arguments: dict[str, Any], split: str
) -> tuple[Any, dict[str, Any], str]:
    """The source that `--source` names, its block, and what to take off the front of its ids."""
    block, prefix = source_block(source, arguments, split)
    try:
        return shard_lib.open_source(block), block, prefix
    except InputError as error:
        is_folder = bool(prefix) and "split" not in arguments and split != "all"
        hint = "; --split=all takes the folder or zip as it is" if is_folder else ""
        raise InputError(f"{error}{hint}") from error


def open_source(options: Options) -> tuple[Any, dict[str, Any], str]:
    """The same, checked as far as it can be unread."""
    source, block, prefix = open_named(options.source, options.arguments, options.split)
    if not len(source):
        raise InputError(f"--source={options.source} holds no examples")
    labels = ask(source, "all_labels")
    problems = [] if labels is None else label_problems(labels, source.num_classes)
    if problems:
        raise InputError(f"--source={options.source}: {'; '.join(problems[:LISTED])}")
    return source, block, prefix
