"""What a run does about a step that went wrong: stop, leave it out, or go back."""

import logging
from typing import Any

from vitjax import guard, state
from vitjax.checkpoints.run import Checkpoints
from vitjax.errors import NonFiniteError, SaveError
from vitjax.telemetry import Events

log = logging.getLogger("vitjax")


class Rescue:
    """Acts on the verdicts of a guard, for one launch; the same in every process.

    Attributes:
      num_faults: so far in this launch.
    """

    def __init__(self, settings: guard.Guard, checkpoints: Checkpoints, events: Events):
        self.num_faults = 0
        self._settings, self._checkpoints, self._events = settings, checkpoints, events
        self._back_at: int | None = None  # the checkpoint of the last return
        self._is_good_since = False
        self._kind = ""

    def good(self) -> None:
        """A step went well."""
        self._is_good_since = True

    def action(self, step: int, fault: int, values: dict[str, float]) -> str:
        """What to do about a fault: "skip" (the device has done it) or "rollback".

        Raises:
          NonFiniteError: the run is to stop.
        """
        self.num_faults += 1
        self._kind, policy = guard.KINDS[fault], self._settings.policy
        what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        if self._kind == "spike":
            what += f" (above {self._settings.spike_factor} times the running mean of the loss)"
        if policy == "stop" or self.num_faults > self._settings.max_faults:
            self._stop(step, what)
        log.warning("%s: %s", what, "left out" if policy == "skip" else "going back")
        if policy == "skip":
            self._events.add("fault", step=step, kind=self._kind, action=policy)
        return policy

    def _stop(self, step: int, what: str) -> None:
        self._events.add("fault", step=step, kind=self._kind, action="stop")
        try:
            self._checkpoints.wait()
        except SaveError as error:
            log.warning("%s", error)
        kept = self._checkpoints.newest()
        if self._settings.policy != "stop":
            what += f"; fault {self.num_faults} of this launch, more than faults.max_faults"
        raise NonFiniteError(
            f"{what}; the last good checkpoint is {'none' if kept is None else f'step {kept}'}. "
            "Try a lower optimizer.peak_lr or a smaller optimizer.clip_norm, or go on with "
            "--config.faults.policy=rollback"
        )

    def roll_back(self, step: int, target: state.TrainState) -> state.TrainState:
        """The last good checkpoint's state, with the batches up to `step` passed over.

        A checkpoint that led straight to another fault is not used again, but the one before it.

        Args:
          target: shapes and shardings of the state.

        Raises:
          NonFiniteError: there is none.
        """
        self._checkpoints.wait()
        before = None if self._is_good_since else self._back_at
        found: Any = self._checkpoints.resume(target, before=before)
        if found is None:
            raise NonFiniteError(
                f"step {step} went wrong, and there is no checkpoint to go back to; save more "
                "often (checkpoint_every) or keep more (checkpoint.keep_last)"
            )
        self._back_at, train_state, _ = found
        self._is_good_since = False
        self._events.add("fault", step=step, kind=self._kind, action="rollback", to=self._back_at)
        log.warning("back to step %d; going on at step %d", self._back_at, step + 1)
        return state.pass_over(train_state, step)
