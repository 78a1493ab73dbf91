"""The card of a prepared data set: what it holds and how it was made, as JSON and to read."""

import datetime
import json
from pathlib import Path
from typing import Any

from vitjax.data.preparing.statistics import class_name
from vitjax.errors import InputError

NAME = "card.json"
README = "README.md"
FORMAT = "vitjax-data-1"
LISTED_CLASSES = 100


def read_card(root: Path) -> dict[str, Any] | None:
    """The card of a folder; None if it has none.

    Raises:
      InputError: it has another file of this name.
    """
    path = root / NAME
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read {path} as a data set card: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise InputError(f"{path} is no data set card: its format is not {FORMAT!r}")
    return card


def new_card(root: Path, num_classes: int, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": root.resolve().name,
        "date": "",
        "licence": None,
        "num_classes": num_classes,
        "class_names": list(class_names) if class_names else None,
        "splits": {},
    }


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def _sizes(size: dict[str, dict[str, int]]) -> str:
    parts = (f"{name} {v['min']} / {v['median']} / {v['max']}" for name, v in size.items())
    return ", ".join(parts)


def _split(name: str, split: dict[str, Any]) -> list[str]:
    options = split["options"]
    written = "the files as they were"
    if options["short_side"]:
        written = (
            f"shorter side at most {options['short_side']} px (Lanczos, JPEG quality "
            f"{options['quality']}, 4:2:0); smaller files as they were"
        )
    numbers = [", ".join(f"{v:.4f}" for v in split[key]) for key in ("mean", "std")]
    facts = {
        "examples": f"{split['num_examples']:,}",
        "shards": f"{split['num_shards']:,}, {split['bytes'] / 1e6:,.1f} MB",
        "source": f"`{split['source']}`",
        "images": written,
        "height, width (min / median / max)": _sizes(split["size"]),
        "the same in the source": _sizes(split["size_in_source"]),
        "kinds in the source": ", ".join(f"{k} {n:,}" for k, n in split["kinds_in_source"].items()),
        "mean of the values in [0, 1]": numbers[0],
        "standard deviation": numbers[1],
        "groups": f"{split['groups']:,}" if split["groups"] else "none",
        "unreadable, left out": f"{split['unreadable']['count']:,}",
        "exact duplicates, " + ("kept" if options["keep_duplicates"] else "left out"):
            f"{split['duplicates']['count']:,}",
        "of these with another label": f"{split['conflicts']['count']:,}",
        "content hash": f"`{split['content_hash']}`",
        "prepared": split["date"],
    }  # fmt: skip
    lines = [f"## {name}", "", *_table(["", ""], [list(item) for item in facts.items()]), ""]
    if split["unreadable"]["count"] or split["duplicates"]["count"]:
        lines += [f"What was left out is listed in `{name}.left_out.csv`.", ""]
    if split["problems"]:
        lines += ["The source's own complaints:", ""]
        lines += [f"- {problem}" for problem in split["problems"]] + [""]
    return lines


def readme(card: dict[str, Any]) -> str:
    """The card in Markdown."""
    splits, names = card["splits"], card["class_names"]
    count = card["num_classes"]
    lines = [f"# {card['name']}", ""]
    lines += [f"{count:,} classes, {', '.join(splits)}; prepared by vitjax, {card['date']}.", ""]
    lines += [f"Licence: {card['licence']}", ""] if card["licence"] else []
    lines += ["```python"]
    lines += [
        'config.data.source = {"target": "vitjax.data.sources.prepared:Prepared",',
        f'                      "root": "{card["name"]}", "split": "{next(iter(splits))}"}}',
        "```",
        "",
    ]
    for name, split in splits.items():
        lines += _split(name, split)
    shown = min(count, LISTED_CLASSES)
    rows = [
        [i, class_name(i, names), *(s["class_counts"][i] for s in splits.values())]
        for i in range(shown)
    ]
    lines += ["## Classes", "", *_table(["label", "class", *splits], rows), ""]
    if shown < count:
        lines += [f"... and {count - shown:,} more, in `{NAME}`.", ""]
    lines += [
        "The content hash is the sha256 over the sorted sha256 digests of one line an example: "
        "id, tab, sha256 of the image's bytes in hex, tab, label.",
        "Mean and deviation count every pixel of the written images; grey counts in all channels.",
        "",
    ]
    return "\n".join(lines)
