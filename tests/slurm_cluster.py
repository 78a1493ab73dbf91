"""A real SLURM on this machine: munged, slurmctld and four slurmd, without systemd or cgroups.

Everything lies in a folder of its own, with ports of its own, so that it is in nobody's way. No
root is needed but for a line in /etc/hosts.
"""

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
HOSTS = Path("/etc/hosts")
LINE = f"127.0.0.1 {' '.join(NODES)}"
SECONDS_TO_START, SECONDS_TO_END = 60, 30
DAEMONS_PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))

# CPUs=1 and no sharing: a job of higher priority must take a node, and cannot run beside the other.
# low is given a grace time, as sites do; without one SLURM grants KillWait.
CONF = """
ClusterName=vitjax
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
ReturnToService=2
FirstJobId={first_job}
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=n[1-4] Default=YES PriorityTier=10
PartitionName=low  Nodes=n[1-4] PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-4] PriorityTier=100 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=4000"


def lacks():
    """Why no cluster can be started here; empty where one can."""
    found = [name for name in PROGRAMS if shutil.which(name, path=DAEMONS_PATH) is None]
    if found:
        return (
            f"{', '.join(found)} missing: apt-get install --no-install-recommends slurmctld slurmd "
            "slurm-client munge"
        )
    if not os.access(HOSTS, os.W_OK) and not all(map(_resolves, NODES)):
        return f"{HOSTS} has no line '{LINE}', and cannot be written"
    return ""


def _resolves(name):
    try:
        return socket.gethostbyname(name) == "127.0.0.1"
    except OSError:
        return False


def _processes(folder):
    """Everything that belongs to a cluster: it carries its settings in its environment."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to read
            if mark in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def _clean(folder):
    """Ends a cluster with all its jobs, and leaves nothing of it.

    A process that has been killed, but not waited for, has no environment any more.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := [*_processes(folder)]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    if os.access(HOSTS, os.W_OK):  # a container's can be written, but not renamed
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if not line.endswith(f" {folder.name}\n")))
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in free]


class Cluster:
    """Four nodes of one CPU each; partitions low, main (the default) and high.

    Raises:
      RuntimeError: it does not come up, with the ends of its logs.
    """

    def __init__(self):
        # A socket's path is short, and munged wants folders that all may pass.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.daemons = {}
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        # Cleans up when its input ends: when told to, or when this process has ended, however.
        self._cleaner = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        try:
            self._configure()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def _configure(self):
        host = socket.gethostname().partition(".")[0]
        port, *ports = _free_ports(1 + len(NODES))
        nodes = [NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports, strict=True)]
        text = CONF.format(
            folder=self.folder,
            user=self.user,
            host=host,
            port=port,
            nodes="\n".join(nodes),
            # The coordinator's port follows from it: two clusters on one machine differ.
            first_job=random.randint(1, 60000),
        )
        (self.folder / "slurm.conf").write_text(text)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        if os.access(HOSTS, os.W_OK):  # JAX's coordinator is a node's name and a port
            with HOSTS.open("a") as file:
                file.write(f"{LINE}  # of a test: {self.folder.name}\n")

    def _start(self):
        munge = [f"--{name.replace('_', '-')}={self.folder}/munge.{ending}" for name, ending in (
            ("socket", "socket"), ("key_file", "key"), ("pid_file", "pid"), ("log_file", "log"),
            ("seed_file", "seed"))]  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *munge)
        self._wait("munge", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        self._wait("slurmctld", lambda: "UP" in self.ask("scontrol", "ping"))
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait("the nodes", lambda: self.idle_nodes() == len(NODES))

    def _daemon(self, program, *words):
        command = [shutil.which(program, path=DAEMONS_PATH), *words]
        name = "-".join([program, *words[2:3]] if program == "slurmd" else [program])
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip

    def _wait(self, what, is_so):
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_so():
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} of the SLURM did not come up:\n{self.logs()}")
            time.sleep(0.1)

    def check(self):
        """Raises RuntimeError where a daemon has ended."""
        for name, process in self.daemons.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with status {process.returncode}:\n{self.logs()}")

    def logs(self):
        """The ends of what the daemons wrote."""
        paths = sorted(self.folder.glob("*.out"))
        tails = [(p.name, p.read_text(errors="replace").splitlines()[-15:]) for p in paths]
        return "\n".join(f"--- {name}\n" + "\n".join(lines) for name, lines in tails if lines)

    def ask(self, *words):
        """What one of SLURM's clients says, whether it refuses or not."""
        done = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    def idle_nodes(self):
        said = self.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip()
        return int(said) if said.isdigit() else 0

    def job(self, number):
        """What `scontrol show job` says of a job, by name; empty once it is forgotten."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "-o", "show", "job", number)))

    def _stop(self):
        self._cleaner.communicate()
        for process in self.daemons.values():
            process.kill()
            process.wait()
        if self._cleaner.returncode:
            raise RuntimeError(f"the cluster in {self.folder} was not cleaned up")


if __name__ == "__main__":
    sys.stdin.read()
    _clean(Path(sys.argv[1]))
