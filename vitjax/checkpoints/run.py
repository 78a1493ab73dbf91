"""The checkpoints of a run: saved beside the training, restored with a fallback.

A save goes through these stations, so that a kill at any moment leaves the steps before it whole:

    every process writes its shards into N.saving           (the loop waits for the copies only)
    every process tells the others whether that went well   (from here on in a thread)
    the first writes the contract, renames to N, writes the marker, removes what is not kept
    the first tells the others how it ended
"""

import contextlib
import dataclasses
import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vitjax.checkpoints import steps, store
from vitjax.checkpoints.policy import Interval, Keep
from vitjax.config import Config
from vitjax.errors import DamagedCheckpointError, InputError, SaveError
from vitjax.processes import Messages
from vitjax.state import TrainState, tree_bytes

log = logging.getLogger("vitjax")

WHAT_TO_DO = {
    errno.ENOSPC: "free space there, or keep fewer steps (checkpoint.keep_last, keep_best)",
    errno.EDQUOT: "the quota is used up: free space there, or keep fewer steps",
    errno.EROFS: "the file system is read-only: mount it writable",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EFBIG: "the file system or a limit of the process (ulimit -f) allows no file so large",
}
WORDS = {
    "No space left": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "not permitted": errno.EPERM,
    "File too large": errno.EFBIG,
}


@dataclasses.dataclass
class _Save:
    """A save under way or ended."""

    step: int
    thread: threading.Thread
    reason: str | None = None  # why it failed


class Checkpoints:
    """Saves, restores and removes the steps of one run; every process calls the same methods.

    Args:
      directory: made if missing.
      keep: which steps stay.
      max_failed_saves: so many saves in a row may fail before `save` and `wait` raise.
      every_minutes: for `is_due`.
      on_event: told of "saved", "save_failed" and "set_aside", with facts; from any thread.
    """

    def __init__(
        self,
        directory: Path,
        keep: Keep | None = None,
        *,
        max_failed_saves: int = 3,
        every_minutes: float | None = None,
        on_event: Callable[..., None] = lambda event, **facts: None,
    ):
        if max_failed_saves < 0:
            raise InputError(
                f"checkpoint.max_failed_saves must be 0 or more, got {max_failed_saves}"
            )
        self.directory = Path(directory).absolute()
        self.keep = keep or Keep()
        self.last_begun: int | None = None
        self._is_first = jax.process_index() == 0
        self._max_failed, self._failed_in_row = max_failed_saves, 0
        self._interval = Interval(every_minutes)
        self.on_event = on_event
        self._current: _Save | None = None
        self._ahead, self._behind = Messages("loop"), Messages("save")

    @classmethod
    def of_run(cls, workdir: Path, config: Config) -> "Checkpoints":
        """Those of a run directory, as the config's `checkpoint` block has them."""
        settings = config.checkpoint
        for step in settings.at_steps:
            if not 1 <= step <= config.total_steps:
                raise InputError(
                    f"checkpoint.at_steps must lie in 1 to total_steps={config.total_steps}, "
                    f"got {step}"
                )
        names = {f.name: f"keep_{f.name}" for f in dataclasses.fields(Keep)}
        given = {k: settings.get(long, settings.get(k)) for k, long in names.items()}
        return cls(
            workdir / "checkpoints",
            Keep(**{k: v for k, v in given.items() if v is not None}),
            max_failed_saves=settings["max_failed_saves"],
            every_minutes=settings["every_minutes"],
        )

    def pending_row(self) -> dict[str, float]:
        """What the newest step says was measured, if its evaluation was interrupted and the run has
        not ended since."""
        row: dict[str, float] = {}
        has_ended = (self.directory.parent / "summary.json").exists()
        found = steps.whole_steps(self.directory) if self._is_first else []
        if found and not has_ended:
            with contextlib.suppress(DamagedCheckpointError):
                row = store.read_contract(self.directory / str(found[-1])).get("row", {})
        return self._ahead.from_first(row)

    def clean(self) -> None:
        """Removes what a killed launch left. Once, at the start, with the run locked."""
        if self._is_first:
            for line in steps.clean(self.directory):
                log.info("%s", line)

    def newest(self, before: int | None = None) -> int | None:
        """The newest whole step (before another one), as the first process sees it."""
        found = steps.whole_steps(self.directory) if self._is_first else []
        found = [step for step in found if before is None or step < before]
        return self._ahead.from_first(found[-1] if found else None)

    def is_due(self) -> bool:
        """Whether so many minutes have passed since the last save, as the first process sees it."""
        return self._interval.is_set and self._ahead.from_first(self._interval.is_over())

    def save(
        self,
        step: int,
        state: TrainState,
        contract: store.Contract,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts a save; returns once the arrays are copied and may be given up.

        A save that fails is reported and the run goes on; the steps before it stay whole.

        Raises:
          SaveError: too many have failed in a row.
        """
        self.wait()
        self._interval.restart()
        scores = {k: v for k, v in (metrics or {}).items() if k == self.keep.metric}
        contract = contract | {"step": step, "time": round(time.time(), 3)}
        contract |= {"metrics": scores}
        parts, self.last_begun = store.parts_of(state), step
        folder = steps.saving_folder(self.directory, step)
        writing: store.Writing | None = None
        reason: str | None = None
        try:
            writing = store.Writing(folder, parts)
        except Exception as error:  # storage fails in many ways, none of which ends the run
            reason = _reason(error)
        size = tree_bytes(parts)

        def commit() -> None:
            try:
                save.reason = self._commit(step, writing, reason, contract, size)
            except Exception as error:  # another process is gone, or we have made a mistake
                save.reason = _reason(error)

        thread = threading.Thread(target=commit, name=f"save-{step}")
        save = self._current = _Save(step, thread)
        thread.start()

    def _commit(
        self,
        step: int,
        writing: store.Writing | None,
        reason: str | None,
        contract: store.Contract,
        size: int,
    ) -> str | None:
        """Completes a save; returns why it failed, the same in all processes."""
        start = time.monotonic()
        try:
            if writing is not None:
                writing.wait()
        except Exception as error:
            reason = _reason(error)
        reason = next((r for r in self._behind.from_all(reason) if r), None)
        if self._is_first:
            if reason is None:
                try:
                    assert writing is not None
                    self._publish(step, writing, contract)
                except Exception as error:
                    reason = _reason(error)
            if reason is None:
                self.on_event("saved", step=step, seconds=round(time.monotonic() - start, 3))
                self._remove_old()
            else:
                shutil.rmtree(steps.saving_folder(self.directory, step), ignore_errors=True)
                # It failed between its new name and its marker.
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
                reason = f"{reason}{_space(self.directory, size)}"
                log.warning("step %d could not be saved: %s", step, reason)
                self.on_event("save_failed", step=step, reason=reason)
        return self._behind.from_first(reason)

    def _publish(self, step: int, writing: store.Writing, contract: store.Contract) -> None:
        writing.finish(contract)
        folder = self.directory / str(step)
        if folder.exists():  # an earlier launch left it unfinished, or it is saved again
            steps.remove(self.directory / str(step))
        steps.saving_folder(self.directory, step).rename(folder)
        store.mark_finished(folder)

    def _remove_old(self) -> None:
        scores: dict[int, float | None] = {}
        for step in steps.whole_steps(self.directory):
            scores[step] = None
            with contextlib.suppress(DamagedCheckpointError, InputError):
                contract = store.read_contract(self.directory / str(step))
                scores[step] = contract["metrics"].get(self.keep.metric)
        for step in sorted(scores.keys() - self.keep.kept(scores)):
            try:
                steps.remove(self.directory / str(step))
            except OSError as error:
                log.warning("step %d could not be removed: %s", step, error.strerror)

    def wait(self) -> None:
        """Returns when the save under way has ended.

        Raises:
          SaveError: too many have failed in a row.
        """
        save, self._current = self._current, None
        if save is None:
            return
        save.thread.join()
        if save.reason is None:
            self._failed_in_row = 0
            return
        self._failed_in_row += 1
        if self._failed_in_row > self._max_failed:
            raise SaveError(
                f"{self._failed_in_row} saves in a row failed (checkpoint.max_failed_saves is "
                f"{self._max_failed}), the last of step {save.step}: {save.reason}"
            )

    @property
    def has_failed(self) -> bool:
        """Whether the last save that has ended failed; after `wait`."""
        return self._failed_in_row > 0

    def resume(
        self, target: TrainState, before: int | None = None
    ) -> tuple[int, TrainState, store.Contract] | None:
        """The newest step (before another one) that verifies, or None if nothing was saved.

        A step that is damaged is set aside, with the reason, and the one before it is tried.

        Raises:
          InputError: the step is of another model, or may not be read.
          DamagedCheckpointError: steps are there, but none is whole.
        """
        while (step := self.newest(before)) is not None:
            try:
                found = step, *self.restore(step, target)
                self.last_begun = step
                return found
            except DamagedCheckpointError as error:
                self._set_aside(step, error)
        left = [path.name for path in steps.aside(self.directory)] if self._is_first else []
        left = self._ahead.from_first(left)
        if left and before is None:
            raise DamagedCheckpointError(
                f"no step in {self.directory} can be restored; set aside: {', '.join(left)}. Bring "
                "one back from a copy, or remove them to start from the beginning"
            )
        return None

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, store.Contract]:
        """Reads a step into the shapes and shardings of `target`, and checks every array.

        Raises:
          InputError: the step is of another model, or may not be read; names the first leaves.
          DamagedCheckpointError: an array is not what was saved.
        """
        folder, parts = self.directory / str(step), store.parts_of(target)
        read: dict[str, Any] = {}
        contract: store.Contract = {}
        problem: tuple[str, str] | None = None
        try:
            contract = store.read_contract(folder)
            for name, tree in parts.items():
                read[name] = store.read_part(folder, contract, name, tree)
        except (InputError, DamagedCheckpointError) as error:
            problem = type(error).__name__, str(error)
        for found in self._ahead.from_all(problem):  # before anything that all must do together
            if found is not None:
                raise (InputError if found[0] == "InputError" else DamagedCheckpointError)(found[1])
        for name, tree in read.items():
            store.verify(tree, contract, name, folder)
        state = TrainState(
            params=read["params"],
            ema=read.get("ema"),
            extra=read["extra"] if "extra" in parts else target.extra,
            **read["rest"],
        )
        return state, contract

    def _set_aside(self, step: int, error: DamagedCheckpointError) -> None:
        if self._is_first:
            kept = steps.set_aside(self.directory, step)
            log.warning("%s; set aside as %s", error, kept.name)
            self.on_event("set_aside", step=step, reason=str(error))

    def close(self) -> None:
        """Waits for the save under way, whatever becomes of it."""
        if self._current is not None:
            self._current.thread.join()


def _reason(error: BaseException) -> str:
    """An error of storage, and what to do about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    number = getattr(error, "errno", None)
    if number is None:
        number = next((n for words, n in WORDS.items() if words in text), None)
    advice = WHAT_TO_DO.get(number or 0)
    text = text if len(text) <= 300 else text[:300] + " ..."
    return f"{text}; {advice}" if advice else text


def _space(directory: Path, size: int) -> str:
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
        return f" (a step takes up to {size / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free)"
    return ""
