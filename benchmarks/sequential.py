"""One competitor at a time, within a number of minutes: for devices that cannot hold two.

Rounds go over the jobs in the order of their importance, again and again while time is left. What
is compared with what was measured in the same round.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import interleave


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
      name: shown, and unique.
      kind: jobs of one kind take about as long as each other to start.
    """

    name: str
    kind: str


@dataclasses.dataclass
class Found:
    """What was measured so far.

    Attributes:
      reports: by job, what each of its rounds gave; jobs that were never measured are not there.
      rounds: by job, the numbers of these rounds.
      reasons: by job, why it was not measured, or not in every round.
    """

    reports: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    rounds: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def missing(self) -> dict[str, str]:
        """The jobs that were never measured, and why."""
        return {name: why for name, why in self.reasons.items() if name not in self.reports}


def visit_all(
    jobs: Sequence[Job],
    visit: Callable[[Job, float], Any],
    *,
    seconds: float,
    rounds: int,
    expected: float = 20.0,
    save: Callable[[Found], None] = lambda found: None,
    tell: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Measures every job once a round, as far as the time goes.

    A job is begun only if what is left is as long as it took before, or as another of its kind took
    last; so a short job still runs where a long one no longer can. One that fails is not tried
    again.

    Args:
      visit: measures a job within so many seconds. It may raise `interleave.OutOfTimeError` or
        `interleave.WorkerError`.
      expected: seconds of a kind of which nothing is known.
      save: called after every job, with all that there is.
    """
    start, found = clock(), Found()
    by_job: dict[str, float] = {}
    by_kind: dict[str, float] = {}
    failed: set[str] = set()
    for index in range(rounds):
        for number, job in enumerate(jobs, 1):
            if job.name in failed:
                continue
            left = seconds - (clock() - start)
            needs = by_job.get(job.name, by_kind.get(job.kind, expected))
            if left < needs:
                found.reasons.setdefault(
                    job.name, f"no time: {max(left, 0):.0f} s were left, it needs about {needs:.0f}"
                )
                continue
            tell(f"round {index + 1}, {number}/{len(jobs)}: {job.name} ({left:.0f} s left)")
            began = clock()
            try:
                report = visit(job, left)
            except interleave.OutOfTimeError:
                found.reasons.setdefault(job.name, f"it did not end within {left:.0f} s")
            except interleave.WorkerError as error:
                failed.add(job.name)
                found.reasons[job.name] = str(error)
                tell(f"  failed: {error}")
            else:
                found.reports.setdefault(job.name, []).append(report)
                found.rounds.setdefault(job.name, []).append(index)
                by_job[job.name] = by_kind[job.kind] = clock() - began
            save(found)
        if all(j.name in failed or index not in found.rounds.get(j.name, []) for j in jobs):
            break  # nothing fits any more
    return found


def paired(found: Found, name: str, other: str) -> list[tuple[Any, Any]]:
    """What two jobs gave in the rounds that both were measured in."""
    others = dict(zip(found.rounds.get(other, []), found.reports.get(other, []), strict=True))
    mine = zip(found.rounds.get(name, []), found.reports.get(name, []), strict=True)
    return [(report, others[index]) for index, report in mine if index in others]
