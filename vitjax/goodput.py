"""Where the wall time of a run went: the steps that it kept, and what held them up.

Source: goodput as the time of the steps done for the first time, over the wall time.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

KINDS: tuple[str, ...] = ("start", "compile", "restore", "data", "evaluate", "checkpoint")
# What is written when its step has just been done; "saved" comes an unknown time later.
AT_STEPS = ("first_step", "progress", "checkpoint", "fault", "preempt", "stop")


@dataclasses.dataclass(frozen=True)
class Account:
    """The wall time of a run in seconds, every one of them in one category.

    Attributes:
      productive: steps whose result the run kept, the first time that they were done.
      start: until the first step, as far as no other category has it.
      compile, restore, data, evaluate, checkpoint: what the loop waited for.
      lost: steps that were done again or thrown away.
      down: between a launch's last sign of life and the start of the next launch.
      launches: how many launches the run has had.
    """

    productive: float = 0.0
    start: float = 0.0
    compile: float = 0.0
    restore: float = 0.0
    data: float = 0.0
    evaluate: float = 0.0
    checkpoint: float = 0.0
    lost: float = 0.0
    down: float = 0.0
    launches: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by category."""
        values = dataclasses.asdict(self)
        del values["launches"]
        return values

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The productive share of the wall time, 0 to 1."""
        return self.productive / self.wall if self.wall else 0.0

    @property
    def lost_to_faults(self) -> float:
        return self.lost + self.down


def read_events(workdir: str | Path) -> list[dict[str, Any]]:
    """The events of a run directory, without the lines that a kill left half written."""
    try:
        lines = (Path(workdir) / "events.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [event for event in map(_parse, lines) if event is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def split_launches(events: Sequence[dict]) -> list[list[dict]]:
    """The events of each launch; every "start" begins one."""
    launches: list[list[dict]] = []
    for event in events:
        if event["event"] == "start" or not launches:
            launches.append([])
        launches[-1].append(event)
    return launches


def step_of(event: dict) -> int | None:
    """The step that had just been done when an event was written; None if it does not say."""
    step = event.get("step") if event["event"] in AT_STEPS else None
    return step if isinstance(step, int) else None


def account(events: Sequence[dict]) -> Account:
    """Sorts a run's wall time into categories.

    Seconds after the last step that a launch wrote about count as productive in the last launch,
    whose step is on its way, and as lost in every other one and after a hang.

    Args:
      events: as `read_events` gives them. "clock" and "spent" may be missing; what comes before
        the first step is then told from the steps by the order of the events alone.
    """
    ledger, launches = _Ledger(), split_launches(events)
    spent, pending, down, end = dict.fromkeys(KINDS, 0.0), 0.0, 0.0, None
    for events_of_launch in launches:
        ledger.lost += pending
        launch = _read_launch(events_of_launch, end or 0.0)
        down += 0.0 if end is None else max(0.0, launch.begin - end)
        end = launch.end
        before_steps, pending = _enter(launch, ledger)
        for kind in KINDS:
            spent[kind] += launch.spent[kind]
        spent["start"] += before_steps
    if events and events[-1]["event"] == "hang":
        ledger.lost += pending
        pending = 0.0
    return Account(
        productive=ledger.kept + pending,
        lost=ledger.lost,
        down=down,
        launches=len(launches),
        **spent,
    )


def describe(account: Account) -> str:
    """One line: the goodput, and the time of every category that has some."""
    parts = [f"{k} {_duration(v)}" for k, v in account.seconds.items() if round(v)]
    count = f"{account.launches} launch" + ("" if account.launches == 1 else "es")
    return f"goodput {account.goodput:.1%}: {', '.join(parts) or 'no time yet'} ({count})"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Launch(NamedTuple):
    """One launch, with times that never run backwards.

    begin, end: seconds since the epoch.
    spent: seconds by kind.
    unclaimed: for each event, the seconds of the launch until then that no kind claims.
    """

    events: list[dict]
    begin: float
    end: float
    spent: dict[str, float]
    unclaimed: list[float]


def _read_launch(events: list[dict], time: float) -> _Launch:
    """Reads a launch's clocks; `time` stands in where its first event has none."""
    clock, begin, spent, unclaimed = 0.0, None, dict.fromkeys(KINDS, 0.0), []
    for event in events:
        last, time = time, _number(event.get("time"), time)
        passed = 0.0 if begin is None else max(0.0, time - last)
        clock = max(clock, _number(event.get("clock"), clock + passed))
        begin = time - clock if begin is None else begin
        now = event.get("spent")
        if isinstance(now, dict):
            spent = {k: max(v, _number(now.get(k), v)) for k, v in spent.items()}
        unclaimed.append(clock - sum(spent.values()))
    if unclaimed[-1] < 0:  # kinds that overlap, or rounding
        spent = {k: v * clock / sum(spent.values()) for k, v in spent.items()}
    # A kind claims its seconds only when they are over: later events correct earlier ones.
    least = unclaimed[-1]
    for i in reversed(range(len(unclaimed))):
        least = min(least, unclaimed[i])
        unclaimed[i] = max(0.0, least)
    return _Launch(events, time if begin is None else begin, time, spent, unclaimed)


def _number(value: Any, otherwise: float) -> float:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else otherwise


def _origin(events: list[dict], position: int) -> int | None:
    """The step after which a launch goes on; None if it ended before it came so far.

    Args:
      position: the last step of the launches before.
    """
    origin = None
    for event in events:
        if event["event"] == "resume" and isinstance(event.get("step"), int):
            origin = event["step"]
        elif (step := step_of(event)) is not None:
            if origin is None:
                is_complete = event["event"] == "stop" and step == position  # nothing was left
                origin = position if is_complete else 0
            break
    return origin


def _last_before_steps(events: list[dict], origin: int) -> int:
    """The index of the last event before a launch's first step began."""
    last = 0
    for i, event in enumerate(events):
        step = step_of(event)
        if step is not None and step > origin:
            break
        if event["event"] != "hang":  # written in the middle of what hangs
            last = i
    return last


def _enter(launch: _Launch, ledger: "_Ledger") -> tuple[float, float]:
    """Enters a launch's steps.

    Returns:
      Unclaimed seconds before the first step, and after the last step that an event names.
    """
    origin = _origin(launch.events, ledger.position)
    if origin is not None:
        ledger.go_back(origin)
    mark = before_steps = launch.unclaimed[_last_before_steps(launch.events, origin or 0)]
    for event, unclaimed in zip(launch.events, launch.unclaimed, strict=True):
        step = step_of(event)
        if step is None or unclaimed < mark:
            continue
        ledger.advance(step, unclaimed - mark)
        mark = unclaimed
        if event["event"] == "fault":
            ledger.fault(step, event.get("action"), event.get("to"))
    return before_steps, launch.unclaimed[-1] - mark


class _Ledger:
    """The seconds of the steps that a run has kept so far, and of those that it lost.

    Segments are (first, last, seconds): the steps first + 1 to last, in order.
    """

    def __init__(self):
        self.position = 0
        self.lost = 0.0
        self._segments: list[tuple[int, int, float]] = []

    @property
    def kept(self) -> float:
        return sum(seconds for _, _, seconds in self._segments)

    def advance(self, step: int, seconds: float) -> None:
        """The run has come to a step; it may be where it was already."""
        step = max(step, self.position)
        self._segments.append((self.position, step, seconds))
        self.position = step

    def go_back(self, step: int) -> None:
        """Loses everything after a step, from where the run goes on."""
        while self._segments and self._segments[-1][1] > step:
            first, last, seconds = self._segments.pop()
            kept = 0.0
            if first < step:
                kept = seconds * (step - first) / (last - first)
                self._segments.append((first, step, kept))
            self.lost += seconds - kept
        self.position = step

    def fault(self, step: int, action: Any, back_to: Any) -> None:
        """Loses what the answer to a bad step throws away."""
        if action == "skip":
            self._drop(step)
        elif action == "rollback" and isinstance(back_to, int):
            self.go_back(back_to)
            self.position = step  # the numbers of the steps between are not used again

    def _drop(self, step: int) -> None:
        """Loses one step, at the mean of the segment that it lies in."""
        for i in reversed(range(len(self._segments))):
            first, last, seconds = self._segments[i]
            if first < step <= last:
                mean = seconds / (last - first)
                self._segments[i : i + 1] = [
                    (first, step - 1, mean * (step - 1 - first)),
                    (step, last, mean * (last - step)),
                ]
                self.lost += mean
                return
