"""A small training in several real processes, and a launcher that ends it as schedulers do."""

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import environment

# Each of several processes on few cores computes in one thread.
FLAGS = f"--xla_cpu_multi_thread_eigen=false {environment.QUICK_COMPILATION}"
ARGV = [
    "--config=quickstart", "--config.batch_size=32", "--config.log_every=1",
    "--config.model.width=32", "--config.model.depth=1", "--config.model.mlp_dim=64",
    "--config.model.num_heads=2", "--config.optimizer.schedule.warmup_steps=2",
    "--config.faults.heartbeat_seconds=10",
]  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Launch:
    """One launch of a run in `count` processes; of those it started, it leaves none behind."""

    def __init__(self, count, workdir, *words, logs=None):
        port, self.workdir, self.processes = free_port(), Path(workdir), []
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.logs = logs or self.workdir.parent
        for index in range(count):
            ranks = {}
            if count > 1:
                ranks = {
                    "VITJAX_COORDINATOR": f"127.0.0.1:{port}",
                    "VITJAX_NUM_PROCESSES": str(count),
                    "VITJAX_PROCESS_ID": str(index),
                }
            command = [sys.executable, "-m", "vitjax", "train", *ARGV, f"--workdir={workdir}"]
            log = (self.logs / f"{self.workdir.name}.{index}.log").open("a")
            self.processes.append(
                subprocess.Popen(
                    [*command, *words],
                    env=environment.of_a_process(FLAGS, **ranks),
                    stdout=log,
                    stderr=log,
                )
            )
            log.close()

    def log(self, index=0):
        return (self.logs / f"{self.workdir.name}.{index}.log").read_text()

    def wait_for(self, is_so, seconds=120):
        """Returns when something is so; fails if a process ends before."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.log()
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.log(index)[-3000:]
            time.sleep(0.005)

    def wait_for_step(self, step):
        self.wait_for(lambda: self.last_step() >= step)

    def last_step(self):
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines()[:-1] if path.exists() else []
        return int(lines[-1].split(b",")[0].split(b":")[1]) if lines else 0

    def codes(self, seconds=180):
        """The exit statuses, when all have ended by themselves."""
        return [process.wait(seconds) for process in self.processes]

    def end(self):
        """What a launcher does once one has failed."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def saving(workdir):
    """Whether a save is under way."""
    folder = Path(workdir) / "checkpoints"
    return any(folder.glob("*.saving"))


def kill_at_a_random_moment(launch, chance, last_step):
    """Ends one process, and then the others, at a step, during a save, or early; says which."""
    victim = chance.choice(launch.processes)
    kind = chance.choice(["early", "step", "step", "save", "save"])
    if kind == "early":
        time.sleep(chance.uniform(0.0, 8.0))
    else:
        goal = launch.last_step() + chance.randint(1, 12)
        while launch.last_step() < min(goal, last_step) and _are_alive(launch):
            time.sleep(0.002)
        while kind == "save" and not saving(launch.workdir) and _are_alive(launch):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.05))
    victim.send_signal(signal.SIGKILL)
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0.0, 0.3))  # the others notice, or do not
    launch.end()
    return kind


def _are_alive(launch):
    return all(process.poll() is None for process in launch.processes)


def make_chance(seed):
    return random.Random(seed)
