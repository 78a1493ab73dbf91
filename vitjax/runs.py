"""`vitjax runs`: a table of all runs below some folders, and how each of them is doing."""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitjax import cli, goodput
from vitjax.errors import InputError

EXAMPLE = "vitjax runs runs --sort=goodput --metric=eval/test/accuracy"
RUN_FILES = ("config.json", "events.jsonl")
TAIL_BYTES = 2**16  # of metrics.jsonl: some hundred rows, however long the run
ENDINGS = {"preempt": "preempted", "hang": "hung"}
IN_BACKGROUND = ("saved", "save_failed")  # may come after the event that says how a launch ended


@dataclasses.dataclass(frozen=True)
class Run:
    """What the table shows of a run directory; None for what its files do not say.

    Attributes:
      run: its name in the table.
      state: running, done, preempted, stopped (by a fault), hung or killed.
      step: the last one that is known to be done.
      metric, value: the name in metrics.jsonl and its last value; nan if it was not finite.
      last_sign: when the run last wrote, in seconds since the epoch.
      age_seconds: since then.
    """

    run: str
    path: Path
    state: str
    step: int | None
    total_steps: int | None
    metric: str
    value: float | None
    images_per_second: float | None
    last_sign: float | None
    age_seconds: float | None
    account: goodput.Account


def _by(value: Callable[[Run], float | None]) -> Callable[[Run], tuple]:
    """A key that puts the largest first, and what is not known last."""

    def key(run: Run) -> tuple:
        number = value(run)
        is_unknown = number is None or math.isnan(number)
        return is_unknown, 0.0 if number is None or is_unknown else -number, run.run

    return key


SORTS: dict[str, Callable[[Run], tuple]] = {
    "run": lambda run: (run.run,),
    "state": lambda run: (run.state, run.run),
    "step": _by(lambda run: run.step),
    "metric": _by(lambda run: run.value),
    "speed": _by(lambda run: run.images_per_second),
    "goodput": _by(lambda run: run.account.goodput),
    "age": _by(lambda run: run.last_sign),  # the latest first
}


def find(folder: Path) -> Iterator[Path]:
    """The run directories at or below a folder; links are not followed."""
    for place, folders, files in os.walk(folder):
        if all(name in files for name in RUN_FILES):
            folders.clear()
            yield Path(place)


def read_run(workdir: Path, name: str, metric: str | None = None) -> Run:
    """Reads how a run is doing, from small files and the end of metrics.jsonl.

    Args:
      name: what to call it.
      metric: of metrics.jsonl; None for the config's checkpoint.metric, or else an accuracy of
        an evaluation, or else the loss.

    Raises:
      InputError: a file of the run cannot be read.
    """
    try:
        config, rows = _config(workdir), _last_rows(workdir)
        events = goodput.read_events(workdir)
    except OSError as error:
        raise InputError(f"cannot read the run {workdir}: {error}") from error
    metric = metric or _default_metric(config, rows)
    signs = [_last([e], "time") for e in (events[-1:] + rows[-1:])]
    last_sign = max((sign for sign in signs if sign is not None), default=None)
    return Run(
        run=name,
        path=workdir,
        state=_state(workdir, events),
        step=_step(events, rows),
        total_steps=config.get("total_steps"),
        metric=metric,
        value=_last(rows, metric),
        images_per_second=_last(rows, "perf/images_per_second"),
        last_sign=last_sign,
        age_seconds=None if last_sign is None else max(0.0, time.time() - last_sign),
        account=goodput.account(events),
    )


def _config(workdir: Path) -> dict[str, Any]:
    recorded = _parse((workdir / "config.json").read_bytes())
    config = recorded.get("config")
    return config if isinstance(config, dict) else {}


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for what a kill left half written."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _last_rows(workdir: Path) -> list[dict[str, Any]]:
    """The whole rows in the last bytes of metrics.jsonl."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for row in map(_parse, lines) if row]


def _last(rows: Sequence[dict], name: str) -> float | None:
    """The last value of a metric: nan if it was not finite, None if there is none."""
    for row in reversed(rows):
        if name in row:
            return float(row[name]) if isinstance(row[name], int | float) else math.nan
    return None


def _default_metric(config: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The metric that the config keeps checkpoints by, or an accuracy, or the loss."""
    checkpoint = config.get("checkpoint") or {}
    if checkpoint.get("metric"):
        return checkpoint["metric"]
    for row in reversed(rows):
        for name in row:
            if name.startswith("eval/") and name.endswith("/accuracy"):
                return name
    return "train/loss"


def _reached(event: dict[str, Any]) -> int | None:
    """The step at which a run stood when an event was written, if it says so."""
    return event.get("step") if event["event"] == "resume" else goodput.step_of(event)


def _step(events: list[dict[str, Any]], rows: list[dict[str, Any]]) -> int | None:
    """The last step of whichever file is ahead in time: each may lag the other by a few steps."""
    stands = [e for e in events[::-1] if _reached(e) is not None][:1]
    event_time, row_time = _last(stands, "time"), _last(rows[-1:], "time")
    is_ahead = row_time is not None and (event_time is None or row_time > event_time)
    if stands and not is_ahead:
        return _reached(stands[0])
    return rows[-1].get("step") if rows else None


def _state(workdir: Path, events: list[dict[str, Any]]) -> str:
    from vitjax import lock

    if lock.is_held(workdir):
        return "running"
    trained = [event for event in events if _reached(event) is not None]
    if trained and trained[-1]["event"] == "stop":  # a launch that found nothing to do is later
        return "done"
    endings = [event for event in events if event["event"] not in IN_BACKGROUND]
    if not endings:
        return "killed"
    name, action = endings[-1]["event"], endings[-1].get("action")
    return "stopped" if (name, action) == ("fault", "stop") else ENDINGS.get(name, "killed")


def read_all(folders: Sequence[str], metric: str | None = None) -> list[Run]:
    """Every run at or below the folders, once.

    Runs are named by their path below the folder, or with several folders by their whole path.

    Raises:
      InputError: a folder is missing or cannot be read, or none holds a run.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; give folders that hold runs, such as runs")
        for workdir in find(folder):
            is_whole = len(folders) > 1 or workdir == folder
            name = str(workdir if is_whole else workdir.relative_to(folder))
            found.setdefault(workdir.resolve(), (workdir, name))
    if not found:
        raise InputError(
            f"no run at or below {', '.join(folders)}; a run is a directory that holds "
            f"{' and '.join(RUN_FILES)}, such as vitjax train --workdir makes"
        )
    return [read_run(workdir, name, metric) for workdir, name in found.values()]


def as_values(run: Run) -> dict[str, Any]:
    """A run as values for JSON: full precision, seconds, None for what is not known or finite."""
    values = dataclasses.asdict(run) | {"path": str(run.path)}
    del values["account"]
    account = run.account
    values |= {"goodput": account.goodput, "launches": account.launches}
    values |= {"wall_seconds": account.wall, "seconds": account.seconds}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
    return values


def table(runs: Sequence[Run]) -> Table:
    """A row for each run."""
    found = Table(pad_edge=False, box=None)
    found.add_column("run", overflow="fold")
    found.add_column("state")
    for name in ("step/total", "metric", "images/s", "goodput", "launches", "last sign of life"):
        found.add_column(name, justify="right", overflow="fold")
    for run in runs:
        rate = run.images_per_second
        found.add_row(
            run.run,
            run.state,
            f"{_shown(run.step, '{:,}')}/{_shown(run.total_steps, '{:,}')}",
            f"{_short(run.metric)} {_shown(run.value, '{:.4g}')}",
            _shown(rate, "{:.2g}" if rate is not None and rate < 10 else "{:,.0f}"),
            f"{run.account.goodput:.1%}",
            str(run.account.launches),
            _age(run.age_seconds),
        )
    return found


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _short(metric: str) -> str:
    """A metric's name without its group: eval/test/accuracy is test/accuracy."""
    return metric.split("/", 1)[-1]


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} s ago"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax runs",
        description="Shows every run at or below the folders: its state, how far it is, its "
        "goodput, and when it last wrote.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="run directories, or above")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="of metrics.jsonl (default: the config's checkpoint.metric, or else an accuracy, or "
        "else train/loss)",
    )
    parser.add_argument(
        "--sort", choices=tuple(SORTS), default="run", help="numbers from the largest, age the last"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead")
    arguments = parser.parse_args(argv)
    runs = sorted(read_all(arguments.folders, arguments.metric), key=SORTS[arguments.sort])
    if arguments.json:
        print(json.dumps([as_values(run) for run in runs], indent=2))
        return cli.DONE
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 1000  # of a pipe nothing is known; no line is broken
    console.print(table(runs))
    return cli.DONE
