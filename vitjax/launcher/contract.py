"""What a launcher does when a process has ended: the contract of docs/launch.md.

Of several processes the first that ends badly says why; the others end with whatever its end, or
the launcher, did to them.
"""

PREEMPTED = 75  # saved because a signal came; a config may choose another status
HUNG = 134  # the watchdog's, or a peer was lost
KILLED = 137  # SIGKILL: the out-of-memory killer, or a hand
TERMINATED = 143  # SIGTERM before there was anything to save
CRASHES = (HUNG, KILLED)  # go on where the last checkpoint stands, but not for ever

MEANINGS = {
    PREEMPTED: "preempted and saved",
    HUNG: "hung, or a peer was lost",
    KILLED: "killed",
    TERMINATED: "ended before training began",
    1: "failed; the message says how",
    2: "the input is wrong",
}


def endings(preempted: int = PREEMPTED) -> tuple[int, ...]:
    """The statuses after which the same command goes on by itself.

    Args:
      preempted: what the config ends with when it is preempted.
    """
    return tuple(sorted({preempted, TERMINATED})) + CRASHES


def as_shell(returncode: int) -> int:
    """A status as shells and schedulers report it: 128 and the signal's number."""
    return 128 - returncode if returncode < 0 else returncode


def meaning(status: int, preempted: int = PREEMPTED) -> str:
    if status == preempted:
        return MEANINGS[PREEMPTED]
    return MEANINGS.get(status, f"signal {status - 128}" if status > 128 else "unknown")
