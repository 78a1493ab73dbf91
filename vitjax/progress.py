"""The progress line: live in a terminal, plain lines in a pipe, and always a log file."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

log = logging.getLogger("vitjax")


@contextlib.contextmanager
def logging_to(workdir: Path | None, process: int = 0) -> Iterator[Console]:
    """Sends the package's log to the terminal and, with a workdir, to its train.log.

    Of several processes only the first speaks on the terminal; the others have a log each. A run
    inside other work, which has the terminal already, shows there no more than its progress line.
    """
    console = Console(stderr=True, highlight=False, quiet=process > 0)
    outer = [h for h in log.handlers if isinstance(h, _ConsoleHandler)]
    handlers: list[logging.Handler] = [] if outer else [_ConsoleHandler(console)]
    console.quiet = console.quiet or (bool(outer) and not console.is_terminal)
    for handler in outer:
        log.removeHandler(handler)
    if workdir is not None:
        name = "train.log" if process == 0 else f"train.{process}.log"
        handlers.append(_FileHandler(workdir / name))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield console
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        for handler in outer:
            log.addHandler(handler)


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written is no reason to say so at every line."""


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not self._console.is_terminal and getattr(record, "live_only", False):
            return
        with contextlib.suppress(OSError):  # standard error may lie on a disk that is full
            self._console.print(self.format(record), markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(values: dict[str, float]) -> str:
    """One row of metrics as a short line, as far as it has the numbers."""
    forms = {
        "train/loss": "loss {:.4f}",
        "train/learning_rate": "lr {:.2e}",
        "perf/images_per_second": "{:,.0f} img/s",
        "perf/mfu": "MFU {:.1%}",
    }
    return "  ".join(form.format(values[k]) for k, form in forms.items() if k in values)


class ProgressLine:
    """Shows where a run stands.

    Args:
      console: a terminal gets one live line, anything else a plain line at every log step.
    """

    def __init__(self, console: Console, total_steps: int, steps_per_epoch: float):
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._is_live = console.is_terminal
        self._bar: Any = None
        if self._is_live:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=total_steps, line="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, values: dict[str, float], eta_seconds: float) -> None:
        epoch = step / self._steps_per_epoch
        line = f"epoch {epoch:.1f}  {describe(values)}  ETA {_duration(eta_seconds)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
            _file_only(f"step {step}/{self._total}  {line}")
        else:
            log.info("step %d/%d  %s", step, self._total, line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _file_only(message: str) -> None:
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, message, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)


def error(message: str) -> None:
    """One clear message on standard error."""
    print(f"vitjax: {message}", file=sys.stderr)
