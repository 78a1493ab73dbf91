"""Ending a run when a metric has stopped to improve."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.processes import Messages


@dataclasses.dataclass
class EarlyStop:
    """Whether so many evaluations have passed since the best one.

    What was seen comes back from the run's own metrics after a resume, so that an interrupted run
    ends at the same step.

    Attributes:
      metric: an evaluation's number, such as "eval/val/auroc"; None: never over.
      mode: "max" or "min".
      patience: evaluations without a gain until the run is over.
      min_delta: the least gain that counts.
    """

    metric: str | None = None
    mode: str = "max"
    patience: int = 5
    min_delta: float = 0.0

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise InputError(f"early_stop.mode must be 'max' or 'min', got {self.mode!r}")
        if self.patience < 1 or self.min_delta < 0:
            raise InputError(
                "early_stop.patience must be at least 1 and min_delta 0 or more, got "
                f"{self.patience} and {self.min_delta}"
            )
        self._seen: dict[int, float] = {}

    def read(self, rows: Iterable[Mapping[str, Any]], until: int) -> None:
        """Takes up what the first process finds in a run's metrics, to a step; in all processes."""
        if self.metric is None:
            return
        found = {r["step"]: r[self.metric] for r in rows if self.metric in r and r["step"] <= until}
        found = Messages("early stop").from_first([[k, v] for k, v in found.items()])
        self._seen = {int(step): float(value) for step, value in found}

    def is_over(self, step: int, results: Mapping[str, Any]) -> bool:
        """Whether the run ends with the evaluation of a step.

        Raises:
          InputError: the evaluations do not give the metric.
        """
        if self.metric is None:
            return False
        if self.metric not in results:
            raise InputError(
                f"early_stop.metric={self.metric!r} is no number of the evaluations; they give "
                f"{', '.join(results) or 'none'}"
            )
        self._seen = {s: v for s, v in self._seen.items() if s < step}  # after a roll-back
        self._seen[step] = float(results[self.metric])
        return self.was_over

    @property
    def was_over(self) -> bool:
        """Whether what has been seen ends the run."""
        best, waited = -math.inf, 0
        for step in sorted(self._seen):
            value = self._seen[step] * (1 if self.mode == "max" else -1)
            if value > best + self.min_delta or best == -math.inf:
                best, waited = value, 0
            else:
                waited += 1
        return waited >= self.patience
