"""Tables of runs: CSV or JSON Lines, rows chosen, columns checked, units stated."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.scaling.points import check_positive

# What one unit of a compute column is in FLOPs; a multiply-accumulate (MAC) is two.
UNITS = {
    "FLOP": 1.0, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18,
    "MAC": 2.0, "MMAC": 2e6, "GMAC": 2e9, "TMAC": 2e12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a file, as text or numbers, in their order.

    Attributes:
      numbers: of the rows in the file, counted from 0, which errors name.
    """

    path: Path
    rows: tuple[dict[str, Any], ...]
    numbers: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def _check(self, name: str) -> None:
        if name not in self.rows[0]:
            raise InputError(f"{self.path} has no column {name!r}; {suggest(name, self.names)}")

    def texts(self, name: str) -> list[str]:
        """A column as text, for groups and conditions."""
        self._check(name)
        return [str(row[name]) for row in self.rows]

    def column(self, name: str, unit: str | None = None) -> np.ndarray:
        """A column of positive numbers, [N]; a compute column in FLOPs, if its unit is given.

        Raises:
          InputError: no such column; rows that are no positive numbers; a unit that contradicts
            the column's name.
        """
        self._check(name)
        values, bad = [], []
        for number, row in zip(self.numbers, self.rows, strict=True):
            try:
                values.append(float(row[name]))
                is_good = np.isfinite(values[-1]) and values[-1] > 0
            except (TypeError, ValueError):
                is_good = False
            if not is_good:
                bad.append(f"row {number} ({row[name]!r})")
        if bad:
            shown = ", ".join(bad[:20])
            raise InputError(
                f"{self.path}: column {name!r} must hold positive numbers; {len(bad)} of "
                f"{len(self.rows)} rows do not (counted from 0): {shown}. "
                "Leave them out with --where, so that the report says so"
            )
        array = check_positive(column=np.asarray(values))["column"]
        return array if unit is None else array * unit_factor(name, unit)

    def where(self, conditions: list[str]) -> "Table":
        """The rows that meet every condition: "column=value", "column!=value", "column<=1e9".

        Raises:
          InputError: no such column, no such operator, or no row is left.
        """
        kept = list(zip(self.numbers, self.rows, strict=True))
        for condition in conditions:
            found = re.fullmatch(r"(.+?)(!=|<=|>=|<|>|=)(.*)", condition)
            if found is None:
                raise InputError(
                    f"condition {condition!r} is not of the form COLUMN=VALUE (or !=, <, <=, >, >=)"
                )
            name, operator, wanted = found.groups()
            self._check(name)
            kept = [(n, row) for n, row in kept if _holds(row[name], operator, wanted)]
            if not kept:
                raise InputError(f"{self.path}: no row meets {condition!r}")
        return Table(self.path, tuple(r for _, r in kept), tuple(n for n, _ in kept))


def _holds(value: Any, operator: str, wanted: str) -> bool:
    try:
        left: Any = float(value)
        right: Any = float(wanted)
    except (TypeError, ValueError):
        left, right = str(value), wanted
        if operator not in ("=", "!="):
            return False
    return {
        "=": left == right,
        "!=": left != right,
        "<": left < right,
        "<=": left <= right,
        ">": left > right,
        ">=": left >= right,
    }[operator]


def unit_factor(column: str, unit: str) -> float:
    """FLOPs in one unit of a compute column.

    Raises:
      InputError: an unknown unit, or one that the column's name contradicts.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r} of column {column!r}; {suggest(unit, UNITS)}")
    lowered = column.lower()
    says_mac, says_flop = bool(re.search(r"macs?\b|macs?_", lowered)), "flop" in lowered
    if says_mac and not says_flop and "MAC" not in unit:
        raise InputError(f"column {column!r} says MAC, but its unit is given as {unit}")
    if says_flop and not says_mac and "FLOP" not in unit:
        raise InputError(f"column {column!r} says FLOP, but its unit is given as {unit}")
    prefix = re.search(r"([mgtpe])(?:flop|mac)", lowered)
    if prefix and not unit.startswith(prefix[1].upper()):
        raise InputError(
            f"column {column!r} says {prefix[0].upper()}, but its unit is given as {unit}"
        )
    return UNITS[unit]


def read_table(path: str | Path) -> Table:
    """Reads a CSV with a header, or JSON Lines.

    Raises:
      InputError: no such file, no rows, or rows that are not of one form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such table: {path}")
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        else:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path} as a table: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no rows")
    for number, row in enumerate(rows):
        if None in row or set(row) != set(rows[0]):
            raise InputError(f"{path}: row {number} (counted from 0) has other columns than row 0")
    rows = [{k: "" if v is None else v for k, v in row.items()} for row in rows]
    return Table(path, tuple(rows), tuple(range(len(rows))))


def split_unit(text: str) -> tuple[str, str | None]:
    """ "COLUMN:GFLOP" into column and unit; None where there is none."""
    name, colon, unit = text.rpartition(":")
    return (name, unit) if colon and unit in UNITS else (text, None)
