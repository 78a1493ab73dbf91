"""`vitjax checkpoints`: lists, verifies, compares and removes the steps of a run."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from vitjax import lock
from vitjax.checkpoints import steps, store
from vitjax.checkpoints.policy import Keep
from vitjax.errors import DamagedCheckpointError, InputError

EXAMPLES = """example: vitjax checkpoints list --workdir=runs/quickstart

  vitjax checkpoints list   --workdir=runs/quickstart
  vitjax checkpoints verify --workdir=runs/quickstart [--step=N]
  vitjax checkpoints diff   --workdir=runs/quickstart --step=100 --with=200
  vitjax checkpoints diff   --workdir=runs/a --with=runs/b
  vitjax checkpoints prune  --workdir=runs/quickstart --keep-last=1 --dry-run
"""


def _folder(workdir: str) -> Path:
    path = Path(workdir)
    if not path.is_dir():
        raise InputError(f"no such run directory: {path}")
    folder = steps.steps_folder(path)
    if not steps.whole_steps(folder) and not steps.aside(folder):
        raise InputError(f"{path} holds no checkpoints")
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(folder: Path) -> list[dict[str, Any]]:
    """Every step in a folder and everything set aside, with what it says of itself."""
    found: list[dict[str, Any]] = []
    for step in steps.whole_steps(folder):
        path = folder / str(step)
        row: dict[str, Any] = {"name": path.name, "state": "whole", "bytes": _size(path)}
        try:
            contract = store.read_contract(path)
            row |= {"time": contract["time"], "metrics": contract["metrics"]}
        except DamagedCheckpointError:
            row["state"] = "damaged"
        found.append(row)
    for path in steps.aside(folder):
        found.append({"name": path.name, "state": "set aside", "bytes": _size(path)})
    return found


def list_steps(folder: Path, as_json: bool) -> int:
    rows = describe(folder)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("step", "state", "MiB", "saved", "score"):
        table.add_column(name, justify="right" if name in ("step", "MiB") else "left")
    for row in rows:
        time = np.datetime64(int(row["time"]), "s") if "time" in row else ""
        scores = ", ".join(f"{k} {v:.4g}" for k, v in row.get("metrics", {}).items())
        size = f"{row['bytes'] / 2**20:,.1f}"
        table.add_row(row["name"], row["state"], size, f"{time}".replace("T", " "), scores)
    Console().print(table)
    return 0


def verify(folder: Path, step: int | None) -> int:
    """Reads every array of one step, or of all, and compares it with its fingerprint."""
    chosen = [int(steps.find_step(folder, step).name)] if step is not None else None
    is_all_right = True
    for number in chosen or steps.whole_steps(folder):
        path = folder / str(number)
        try:
            contract = store.read_contract(path)
        except DamagedCheckpointError as error:
            print(f"step {number}: {error}")
            is_all_right = False
            continue
        arrays = {part: contract["arrays"][part] for part in contract["arrays"]}
        total = sum(_bytes(*leaf[:2]) for part in arrays.values() for leaf in part.values())
        bad: dict[str, str] = {}
        with _progress(f"step {number}", total) as seen:
            for part in arrays:
                found = store.check_leaf_by_leaf(path, contract, part, seen)
                bad |= {f"{part}/{name}": reason for name, reason in found.items()}
        count = sum(len(part) for part in arrays.values())
        if bad:
            is_all_right = False
            print(f"step {number}: DAMAGED, {len(bad)} of {count} arrays")
            for name, reason in list(bad.items())[:5]:
                print(f"  {name}: {reason}")
        else:
            print(f"step {number}: whole, {count} arrays, {total / 2**20:,.1f} MiB")
    return 0 if is_all_right else 1


def _bytes(shape: list[int], dtype: str) -> int:
    return math.prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)


class _progress:
    """A bar over bytes, in a terminal only; gives a function that takes the bytes done."""

    def __init__(self, title: str, total: int):
        console = Console(stderr=True)
        columns = (TextColumn(title), BarColumn(bar_width=20), DownloadColumn())
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self):
        self._bar.start()
        return lambda size: self._bar.advance(self._task, size)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def compare(first: Path, second: Path) -> list[dict[str, Any]]:
    """The arrays in which two steps differ, the largest change first.

    Returns:
      "array", and either "only in" (a step folder) or "shapes" (two), or "change": the L2 norm of
      the difference over that of the first. Arrays of equal fingerprints are not read.
    """
    contracts = [store.read_contract(path) for path in (first, second)]
    found: list[dict[str, Any]] = []
    for part in sorted(contracts[0]["arrays"].keys() | contracts[1]["arrays"].keys()):
        a, b = (contract["arrays"].get(part, {}) for contract in contracts)
        changed = []
        for name in sorted(a.keys() | b.keys()):
            if name not in a or name not in b:
                where = first if name in a else second
                found.append({"array": f"{part}/{name}", "only in": str(where)})
            elif a[name][:2] != b[name][:2]:
                found.append({"array": f"{part}/{name}", "shapes": [a[name][:2], b[name][:2]]})
            elif a[name][2] != b[name][2]:
                changed.append(name)
        if not changed:
            continue
        trees = [
            store.named(store.read_verified(path, part, None, contract))
            for path, contract in zip((first, second), contracts, strict=True)
        ]
        for name in changed:
            x, y = (np.asarray(tree[name]).astype(np.float64) for tree in trees)
            norm = float(np.linalg.norm(x))
            change = float(np.linalg.norm(y - x)) / norm if norm else math.inf
            found.append({"array": f"{part}/{name}", "change": change})
    return sorted(found, key=lambda row: -row.get("change", math.inf))


def show_difference(first: Path, second: Path, as_json: bool) -> int:
    rows = compare(first, second)
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    if not rows:
        print(f"{first} and {second} hold the same bits")
        return 0
    print(f"{len(rows)} arrays of {first} and {second} differ; change: |b - a| / |a|")
    for row in rows:
        if "change" in row:
            print(f"  {row['change']:10.3g}  {row['array']}")
        elif "shapes" in row:
            (a, at), (b, bt) = row["shapes"]
            print(f"  {row['array']}: {at} {tuple(a)} and {bt} {tuple(b)}")
        else:
            print(f"  {row['array']}: only in {row['only in']}")
    return 0


def prune(workdir: Path, folder: Path, keep: Keep, *, set_aside: bool, is_dry: bool) -> int:
    """Removes what the rules do not keep.

    Raises:
      InputError: a process trains in the run directory.
    """
    with lock.on_run(workdir, wait_seconds=0.0) as problem:
        if problem:
            raise InputError(problem)
        scores: dict[int, float | None] = {}
        for step in steps.whole_steps(folder):
            scores[step] = None
            try:
                metrics = store.read_contract(folder / str(step))["metrics"]
                scores[step] = metrics.get(keep.metric)
            except DamagedCheckpointError as error:
                raise InputError(f"{error}; nothing was removed") from error
        gone = [folder / str(step) for step in sorted(scores.keys() - keep.kept(scores))]
        gone += steps.aside(folder) if set_aside else []
        freed = sum(_size(path) for path in gone)
        for path in gone:
            print(f"{'would remove' if is_dry else 'removing'} {path}")
            if not is_dry:
                steps.remove(path)
        print(f"{len(gone)} removed, {freed / 2**20:,.1f} MiB" + (" (dry run)" if is_dry else ""))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitjax checkpoints",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    about = {
        "list": "the steps, their size, time and score, and what was set aside",
        "verify": "compare every array with its fingerprint; exit status 1 if any is bad",
        "diff": "the arrays in which two steps differ",
        "prune": "remove the steps that no rule keeps",
    }
    made = {}
    for name, text in about.items():
        made[name] = actions.add_parser(name, help=text, description=text)
        made[name].add_argument("--workdir", required=True, help="the run directory")
    for name in ("list", "diff"):
        made[name].add_argument("--json", action="store_true", help="full precision, for programs")
    for name in ("verify", "diff"):
        made[name].add_argument("--step", type=int, help="one step only (diff: the newest)")
    made["diff"].add_argument(
        "--with", dest="other", required=True, help="another step's number, or another run"
    )
    rules = made["prune"]
    rules.add_argument("--keep-last", type=int, default=2, help="so many of the newest (2)")
    rules.add_argument("--keep-every", type=int, help="all multiples of this step")
    rules.add_argument("--keep-best", type=int, default=1, help="so many of the best by --metric")
    rules.add_argument("--metric", help="the score that the run was told to save by")
    rules.add_argument("--mode", default="max", help="max or min")
    rules.add_argument("--set-aside", action="store_true", help="remove what was set aside, too")
    rules.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    folder = _folder(arguments.workdir)
    if arguments.action == "list":
        return list_steps(folder, arguments.json)
    if arguments.action == "verify":
        return verify(folder, arguments.step)
    if arguments.action == "diff":
        first = steps.find_step(folder, arguments.step)
        is_step = arguments.other.isdecimal()
        second = (
            steps.find_step(folder, int(arguments.other))
            if is_step
            else steps.find_step(Path(arguments.other))
        )
        return show_difference(first, second, arguments.json)
    keep = Keep(
        last=arguments.keep_last,
        best=arguments.keep_best,
        metric=arguments.metric,
        mode=arguments.mode,
        every=arguments.keep_every,
    )
    workdir = Path(arguments.workdir)
    return prune(workdir, folder, keep, set_aside=arguments.set_aside, is_dry=arguments.dry_run)
