"""CSV tables as columns, and what is wrong with them, named all at once."""

import csv
import gzip
import os
from collections.abc import Iterable, Sequence

import numpy as np

from vitjax.errors import InputError, suggest

LISTED = 20
CHECKED_FILES = 1000
Table = dict[str, list[str]]


def read_table(path: str, needed: Sequence[str] = (), header: Sequence[str] | None = None) -> Table:
    """The columns of a CSV, TSV or gzipped CSV file, as text without blanks around it.

    Args:
      needed: columns that must be there.
      header: the columns' names, of a file whose first line is not to be used for them.

    Raises:
      InputError: the file is missing or no such table; all rows of a wrong length are counted.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path or '(the path is empty)'}")
    opener = gzip.open if path.endswith(".gz") else open
    delimiter = "\t" if path.removesuffix(".gz").lower().endswith(".tsv") else ","
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error, OSError, EOFError) as error:
        raise InputError(f"cannot read {path} as a table in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{path} is empty; expected a header")
    first = [name.strip() for name in rows.pop(0)]
    names = first if header is None else list(header)
    missing = [name for name in needed if name not in names]
    if missing:
        found = ", ".join(names)
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; found: {found}")
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}")
    width = len(names)
    refuse(
        path,
        (
            f"row {number}: {len(row)} columns, the header has {width}"
            for number, row in enumerate(rows, 1)
            if len(row) != width
        ),
    )
    if not rows:
        raise InputError(f"{path} has a header, but no row")
    return {
        name: list(map(str.strip, column))
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def refuse(name: str, problems: Iterable[str]) -> None:
    """Raises an InputError that lists the first twenty problems and counts the others, if any."""
    problems = list(problems)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        more = len(problems) - LISTED
        others = f"\n  ... and {more} more" if more > 0 else ""
        plural = "s" if len(problems) > 1 else ""
        raise InputError(f"{name} has {len(problems)} problem{plural}:{listed}{others}")


def refuse_repeated(path: str, column: str, values: Sequence[str]) -> None:
    """No value of a column that names the rows may be blank or stand there twice."""
    if len(set(values)) == len(values) and "" not in values:
        return
    seen: dict[str, int] = {}
    problems = []
    for number, value in enumerate(values, 1):
        if not value:
            problems.append(f"row {number}: {column} is blank")
        elif value in seen:
            problems.append(f"row {number}: {column} {value!r} stands in row {seen[value]} too")
        seen.setdefault(value, number)
    refuse(path, problems)


def numbers(
    path: str, column: str, values: Sequence[str], allowed: Sequence[float] | None = None
) -> np.ndarray:
    """A column as float32, NaN where blank.

    Raises:
      InputError: a cell is no number, or none of the allowed ones.
    """
    codes = {}
    for text in set(values):
        try:
            codes[text] = float(text) if text else np.nan
        except ValueError:
            codes[text] = None
        if text and allowed is not None and codes[text] not in allowed:
            codes[text] = None
    if None in codes.values():
        what = "blank or " + ", ".join(map(_short, allowed)) if allowed else "blank or a number"
        refuse(
            path,
            (
                f"row {number}: {column} is {text!r}; allowed: {what}"
                for number, text in enumerate(values, 1)
                if codes[text] is None
            ),
        )
    return np.fromiter(map(codes.__getitem__, values), np.float32, len(values))


def _short(number: float) -> str:
    return f"{number:g}"


def words(path: str, column: str, values: Sequence[str], meanings: dict[str, str]) -> np.ndarray:
    """A column of few words, each by what it means; other words are listed and refused."""
    unknown = set(values) - set(meanings)
    if unknown:
        refuse(
            path,
            (
                f"row {number}: {column} is {text!r}; {suggest(text, meanings)}"
                for number, text in enumerate(values, 1)
                if text in unknown
            ),
        )
    return np.array([meanings[text] for text in values])


def check_files(name: str, paths: list[str]) -> None:
    """Looks whether files are there: a thousand, evenly spread, where there are more."""
    places = np.unique(
        np.linspace(0, len(paths) - 1, min(len(paths), CHECKED_FILES)).astype(int)
    ).tolist()
    refuse(
        f"{name}: of {len(places)} files looked for, the table",
        (f"no such file: {paths[i]}" for i in places if not os.path.isfile(paths[i])),
    )
