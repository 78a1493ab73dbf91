"""`vitjax launch local`: several processes of one training on this machine."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vitjax import cli
from vitjax.errors import InputError
from vitjax.launcher import command as commands
from vitjax.launcher import contract, options, templates

EXAMPLE = "vitjax launch local -n 2 -- train --config=quickstart --workdir=runs/two"
POLL_SECONDS = 0.05
# Makes a process end when the launcher does, however that ends (PR_SET_PDEATHSIG of Linux).
FOLLOW = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def cause(ended: dict[int, int], preempted: int = contract.PREEMPTED) -> tuple[int, int]:
    """Of processes seen to have ended badly at once: the rank and status that explain the others.

    A kill explains what it did to its peers; so does an error; a lost peer explains nothing.
    """

    def order(rank: int) -> tuple[int, int]:
        status = ended[rank]
        if status == contract.KILLED:
            return 0, rank
        return (1 if status not in contract.endings(preempted) else 2), rank

    rank = min(ended, key=order)
    return rank, ended[rank]


class Local:
    """A launch of one command in some processes, which are started again where that may help.

    Args:
      argv: the whole command.
      logs: where rank-N.log lie; they are appended to.
      count: of processes.
      gpus: how many each process sees; None: all.
      max_restarts: all kinds of endings together.
      grace: seconds from SIGTERM to SIGKILL.
      preempted: the status of a process that has saved and left.
      say: takes the launcher's own lines; `show` a rank and a line of its log.
    """

    def __init__(
        self,
        argv: list[str],
        logs: Path,
        count: int,
        *,
        gpus: int | None = None,
        max_restarts: int = 10,
        grace: float = 60.0,
        preempted: int = contract.PREEMPTED,
        say: Callable[[str], None] = lambda line: None,
        show: Callable[[int, str], None] | None = None,
    ):
        self.argv, self.logs, self.count, self.gpus = argv, logs, count, gpus
        self.max_restarts, self.grace, self.preempted = max_restarts, grace, preempted
        self.say, self.show = say, show
        self.processes: list[subprocess.Popen[bytes]] = []
        self.files: list[BinaryIO] = []
        self.signalled: int | None = None

    def run(self) -> int:
        """Runs to the end; returns the exit status: the first bad one, as shells report it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        old = {n: signal.signal(n, self._pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            restarts = 0
            while True:
                rank, status = self._once()
                if status == 0 or self.signalled is not None:
                    return status
                why = (
                    f"rank {rank} ended with {status} ({contract.meaning(status, self.preempted)})"
                )
                if status not in contract.endings(self.preempted):
                    self.say(f"{why}; see {self.logs / f'rank-{rank}.log'}")
                    return status
                if restarts == self.max_restarts:
                    self.say(f"{why}; not again after {restarts} restarts")
                    return status
                restarts += 1
                self.say(f"{why}; restart {restarts} of {self.max_restarts}")
        finally:
            self._kill()
            for number, handler in old.items():
                signal.signal(number, handler)

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What a process finds in its environment beside the launcher's own."""
        found = {
            "VITJAX_COORDINATOR": f"127.0.0.1:{port}",
            "VITJAX_NUM_PROCESSES": str(self.count),
            "VITJAX_PROCESS_ID": str(rank),
        }
        if self.gpus is not None:
            own = range(rank * self.gpus, (rank + 1) * self.gpus)
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        return found

    def _once(self) -> tuple[int, int]:
        """One attempt: the rank and status that explain its end; 0 where all went well."""
        self._start()
        first: tuple[int, int] | None = None
        kill_at = None
        known: set[int] = set()
        while len(known) < self.count:
            time.sleep(POLL_SECONDS)
            self._forward()
            found = {r: p.poll() for r, p in enumerate(self.processes) if r not in known}
            ended = {r: contract.as_shell(code) for r, code in found.items() if code is not None}
            known |= set(ended)
            bad = {rank: status for rank, status in ended.items() if status}
            if bad and first is None:
                first = cause(bad, self.preempted)
                self._signal(signal.SIGTERM)
            if kill_at is None and (first is not None or self.signalled is not None):
                kill_at = time.monotonic() + self.grace
            if kill_at is not None and time.monotonic() > kill_at:
                self._signal(signal.SIGKILL)
        self._forward()
        return first or (0, 0)

    def _start(self) -> None:
        self._close()
        port = free_port()
        self.processes = []
        follow = [sys.executable, "-c", FOLLOW] if sys.platform == "linux" else []
        for rank in range(self.count):
            path = self.logs / f"rank-{rank}.log"
            with path.open("ab") as log:
                reader = path.open("rb")
                reader.seek(0, os.SEEK_END)
                self.files.append(reader)
                self.processes.append(
                    subprocess.Popen(
                        [*follow, *self.argv],
                        env=os.environ | self.environment(rank, port),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a Ctrl-C comes once, from here
                    )
                )
            if self.signalled is not None:  # it came while the others started
                self._signal(self.signalled)

    def _pass_on(self, number: int, _: Any) -> None:
        self.signalled = number
        self._signal(number)

    def _signal(self, number: int) -> None:
        """To all that still run, with what they started."""
        for process in self.processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue

    def _forward(self) -> None:
        """Shows the whole lines that the logs have gained."""
        if self.show is None:
            return
        for rank, file in enumerate(self.files):
            start = file.tell()
            text = file.read()
            whole = text.rfind(b"\n") + 1
            file.seek(start + whole)
            for line in text[:whole].decode(errors="replace").splitlines():
                self.show(rank, line)

    def _close(self) -> None:
        for file in self.files:
            file.close()
        self.files = []

    def _kill(self) -> None:
        """Leaves nothing behind, also where the launcher itself failed."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self._close()


def parser() -> options.Parser:
    text = "Runs a training in several processes on this machine."
    made = options.parser("local", text, EXAMPLE, 60, 10)
    add = made.add_argument
    add("-n", "--processes", type=options.at_least(1), default=1)
    add("--gpus-per-process", type=options.at_least(1), help="a share of the GPUs for each")
    add("--show", choices=("first", "all", "none"), default="first", help="whose lines to print")
    return made


def launch(argv: list[str]) -> int:
    own, words = commands.split(argv, "local")
    o = parser().read(own)
    command = commands.parse(words)
    if command.is_sweep and o.processes > 1:
        raise InputError(
            f"-n {o.processes}: the cells of a sweep are runs of their own: "
            "vitjax sweep run --workers=N trains them side by side on this machine"
        )
    run = [sys.executable, "-m", "vitjax", *command.words]
    if o.gpus_per_process or os.environ.get("JAX_PLATFORMS") == "cpu":
        source = f"-n {o.processes} x --gpus-per-process={o.gpus_per_process or 0}"
        _check(command, o, source)
    if o.dry_run:
        print(_shown(o, templates.shell(run)))
        return cli.DONE
    shown = {"first": {0}, "all": set(range(o.processes)), "none": set()}[o.show]

    def show(rank: int, line: str) -> None:
        if rank in shown:
            print(line if len(shown) == 1 else f"[{rank}] {line}", flush=True)

    return Local(
        run,
        Path(command.workdir) / "logs",
        o.processes,
        gpus=o.gpus_per_process,
        max_restarts=o.max_restarts,
        grace=o.grace,
        preempted=command.preempted,
        say=lambda line: print(f"launch: {line}", file=sys.stderr, flush=True),
        show=show,
    ).run()


def _check(command: commands.Command, o: argparse.Namespace, source: str) -> None:
    platform = "gpu" if o.gpus_per_process else "cpu"
    devices = o.processes * (o.gpus_per_process or 1)
    commands.check(command, devices, source, platform, None, o.no_check)


def _shown(o: argparse.Namespace, run: str) -> str:
    """What would be started, as lines of shell."""
    lines = ["# One free port for all."]
    for rank in range(o.processes):
        found = Local([], Path(), o.processes, gpus=o.gpus_per_process).environment(rank, 0)
        found["VITJAX_COORDINATOR"] = "127.0.0.1:PORT"
        words = [f"{name}={templates.shell([value])}" for name, value in found.items()]
        lines.append(f"{' '.join(words)} {run} &")
    return "\n".join([*lines, "wait"])
