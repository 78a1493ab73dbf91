"""When a step is saved, and which of the saved steps are kept."""

import dataclasses
import math
import time
from collections.abc import Mapping

from vitjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which steps are kept; a step that any rule names stays.

    Attributes:
      last: how many of the newest.
      best: how many of the best by `metric`.
      metric: the name of an evaluation's number, or None: no best.
      mode: "max" or "min".
      at_steps: these, always.
      at_powers_of: 1 and all powers of this, always; None for none.
      every: all multiples of this, always; None for none.
    """

    last: int = 2
    best: int = 1
    metric: str | None = None
    mode: str = "max"
    at_steps: tuple[int, ...] = ()
    at_powers_of: int | None = None
    every: int | None = None

    def __post_init__(self):
        if self.last < 1 or self.best < 0:
            raise InputError(
                f"checkpoint.keep_last must be 1 or more and keep_best 0 or more, "
                f"got {self.last} and {self.best}"
            )
        if self.mode not in ("max", "min"):
            raise InputError(f"checkpoint.mode must be 'max' or 'min', got {self.mode!r}")
        if self.at_powers_of is not None and self.at_powers_of < 2:
            raise InputError(
                f"checkpoint.at_powers_of must be 2 or more, or None, got {self.at_powers_of}"
            )
        if self.every is not None and self.every < 1:
            raise InputError(f"keep_every must be 1 or more, or None, got {self.every}")

    def is_pinned(self, step: int) -> bool:
        """Whether a step is kept whatever comes after it."""
        is_multiple = self.every is not None and step % self.every == 0
        return step in self.at_steps or is_multiple or is_power(step, self.at_powers_of)

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, of those saved.

        Args:
          scores: `metric` of each saved step; None where it was not evaluated.
        """
        steps = sorted(scores)
        found = set(steps[-self.last :]) | {step for step in steps if self.is_pinned(step)}
        if self.metric is not None and self.best:
            scored = [(s, v) for s, v in scores.items() if v is not None and math.isfinite(v)]
            sign = 1 if self.mode == "max" else -1
            scored.sort(key=lambda pair: (sign * pair[1], pair[0]), reverse=True)
            found |= {step for step, _ in scored[: self.best]}
        return found


def is_power(step: int, base: int | None) -> bool:
    """Whether a step is 1 or a power of the base."""
    if base is None or step < 1:
        return False
    while step % base == 0:
        step //= base
    return step == 1


class Interval:
    """Whether some minutes have passed since the last save, by a clock that never jumps."""

    def __init__(self, minutes: float | None):
        if minutes is not None and not minutes > 0:
            raise InputError(f"checkpoint.every_minutes must be positive or None, got {minutes}")
        self._seconds = None if minutes is None else 60 * minutes
        self._last = time.monotonic()

    @property
    def is_set(self) -> bool:
        return self._seconds is not None

    def is_over(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def restart(self) -> None:
        self._last = time.monotonic()
