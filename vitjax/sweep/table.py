"""plan.json, plan.csv and runs.csv: what a sweep asks for, and what came out."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from vitjax import config as config_lib
from vitjax.errors import InputError
from vitjax.sweep.cells import FIELDS, Cell
from vitjax.sweep.plan import Plan
from vitjax.telemetry import write_whole

# The columns of runs.csv; each metric follows with its number of examples.
FIRST_COLUMNS = (
    "cell", "attempt", "status", "reason", "stage", "kind", "arm", "trunk", "seed", "width",
    "depth", "mlp_dim", "num_heads", "patch_size", "image_size", "num_params", "num_body_params",
    "batch_size", "steps", "images", "unique_images", "epochs", "flops_per_image", "flops",
    "flops_paid", "learning_rate", "label_noise", "wall_seconds", "git_commit", "vitjax_version",
    "device_kind",
)  # fmt: skip
LAST_COLUMNS = ("train/loss", "train/loss:n", "budget")
TEXTS = {"cell", "status", "reason", "stage", "kind", "arm", "trunk", "git_commit",
         "vitjax_version", "device_kind"}  # fmt: skip
WHOLE = {"attempt", "seed", "width", "depth", "mlp_dim", "num_heads", "patch_size", "image_size",
         "num_params", "num_body_params", "batch_size", "steps", "images", "unique_images",
         "flops_per_image"}  # fmt: skip


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_plan(workdir: Path, plan: Plan) -> None:
    """Writes plan.json and plan.csv.

    Raises:
      InputError: the workdir holds another plan, of which runs were made.
    """
    known = read_plan(workdir) if (workdir / "plan.json").exists() else None
    has_runs = (workdir / "cells").exists() or (workdir / "runs.csv").exists()
    if known is not None and has_runs:
        changed = _differences(known, plan)
        if changed:
            shown = "\n  ".join(changed[:8])
            raise InputError(
                f"{workdir} holds another plan and its runs; choose another --workdir. "
                f"{len(changed)} things differ:\n  {shown}"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    write_whole(
        workdir / "plan.csv",
        _csv([list(FIELDS), *([getattr(c, name) for name in FIELDS] for c in plan.cells)]),
    )
    content = dataclasses.asdict(plan)
    write_whole(workdir / "plan.json", json.dumps(content, indent=1) + "\n")


def _differences(old: Plan, new: Plan) -> list[str]:
    """In what two plans are not the same: of the sweep, or else of what the cells train."""

    def settings(plan: Plan) -> dict[str, Any]:
        return {k: v for k, v in plan.sweep.items() if k != "budget"}

    def cells(plan: Plan) -> dict[str, Any]:
        facts = {c.id: dataclasses.asdict(c) for c in plan.cells}
        estimates = ("memory_gib", "hours", "fits")
        return {i: {k: v for k, v in c.items() if k not in estimates} for i, c in facts.items()}

    as_read = config_lib.plain(json.loads(json.dumps(settings(new))))
    return config_lib.differences(settings(old), as_read) or config_lib.differences(
        cells(old), cells(new), "cell "
    )


def read_plan(workdir: str | Path) -> Plan:
    """The plan of a sweep's workdir.

    Raises:
      InputError: there is none, or it is no plan.
    """
    path = Path(workdir) / "plan.json"
    if not path.is_file():
        raise InputError(
            f"{workdir} holds no plan.json: make one with vitjax sweep plan --config=... "
            f"--workdir={workdir}"
        )
    try:
        content = json.loads(path.read_text())
        return Plan(
            sweep=config_lib.plain(content["sweep"]),
            cells=tuple(Cell(**cell) for cell in content["cells"]),
            totals=content["totals"],
            notes=tuple(content["notes"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no plan that this version reads: {error}") from error


def columns_of(plan: Plan) -> list[str]:
    """The columns that runs.csv starts with: those of its evaluations, as far as they are known."""
    metrics = [
        f"eval/{name}/{metric}{suffix}"
        for name in plan.sweep["train"]["evals"]
        for metric in ("loss", "accuracy")
        for suffix in ("", ":n")
    ]
    return [*FIRST_COLUMNS, *metrics, *LAST_COLUMNS]


def append_runs(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Appends rows; a metric that is new widens the header, and no row is ever changed."""
    header, written = list(columns), ""
    if path.exists():
        first, _, written = path.read_text().partition("\n")
        header = next(csv.reader([first]))
    old = list(header)
    for row in rows:
        header += [name for name in row if name not in header]
    added = _csv([["" if row.get(n) is None else row[n] for n in header] for row in rows])
    if path.exists() and header == old:
        with path.open("a") as file:
            file.write(added)
    else:
        write_whole(path, _csv([header]) + written + added)


def _value(name: str, text: str | None) -> Any:
    if not text:
        return None
    if name in TEXTS:
        return text
    number = float(text)
    is_count = name in WHOLE or (name.endswith(":n") and number.is_integer())
    return int(number) if is_count else number


def read_attempts(path: str | Path) -> list[dict[str, Any]]:
    """Every row of runs.csv, typed; what is not known is None.

    Raises:
      InputError: no such file, no table of a sweep, or a value that is no number (names the row).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such table: {path}; make it with vitjax sweep collect --workdir=...")
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [n for n in ("cell", "attempt", "status") if n not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path} is no runs.csv of a sweep: it has no column {missing[0]!r}")
        for number, row in enumerate(reader, 2):
            try:
                rows.append({name: _value(name, text) for name, text in row.items() if name})
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    return rows


def read_runs(path: str | Path) -> list[dict[str, Any]]:
    """The last attempt of each cell, in the order of the first; see `read_attempts`."""
    last: dict[str, dict[str, Any]] = {}
    for row in read_attempts(path):
        last[row["cell"]] = row
    return list(last.values())
