"""`vitjax launch slurm`: one sbatch script, for a training or a sweep."""

import argparse
import re
import sys
from pathlib import Path

from vitjax import cli
from vitjax.errors import InputError
from vitjax.launcher import clients, contract, options, sweeps, templates
from vitjax.launcher import command as commands
from vitjax.launcher.command import Command
from vitjax.launcher.sweeps import Tasks

EXAMPLE = (
    "vitjax launch slurm --nodes=8 --gpus-per-node=8 --dry-run -- train --config=vit_s16_i1k "
    "--workdir=/shared/runs/s16"
)
CPUS_A_GPU = 8  # to decode images with
PLAIN = re.compile(r"/[A-Za-z0-9._/+=@-]*")  # what log file names of SLURM can hold


def parser() -> options.Parser:
    made = options.parser(
        "slurm", "Submits a training, or a sweep as a job array, to SLURM.", EXAMPLE, 120, 20
    )
    options.add_remote(made)
    add = made.add_argument
    add("--nodes", type=options.at_least(1), default=1)
    add("--gpus-per-node", type=options.at_least(0), default=0, help="0: it trains on CPUs")
    add("--gpu-type", type=options.word, help="such as h100; asked for, and checked if known")
    add("--gres", action="store_true", help="ask for GPUs by --gres, where --gpus-per-node fails")
    add("--tasks", choices=("gpu", "node"), help="a process for each (default: gpu)")
    add("--cpus-per-task", type=options.at_least(1), help=f"default: {CPUS_A_GPU} a GPU")
    add("--time", type=options.time, default="24:00:00", help="limit; the job goes on after it")
    for name in ("--partition", "--account", "--qos"):
        add(name, type=options.word)
    add("--venv", type=options.path, help="a virtual environment on the nodes (default: this one)")
    add("--container", type=options.image, help="instead: an image, or a .sif file for apptainer")
    add("--mount", type=options.path, action="append", default=[],
        help="a folder that the container sees, beside the workdir's")  # fmt: skip
    return made


def render(o: argparse.Namespace, lines: dict, command: Command, tasks: Tasks | None) -> str:
    """The script.

    Args:
      o: the options; `lines` what the site adds.

    Raises:
      InputError: a workdir that SLURM's file names cannot hold, or options that contradict.
    """
    if not PLAIN.fullmatch(command.workdir):
        raise InputError(
            f"--workdir={command.workdir!r}: SLURM writes the logs below it, and its file names "
            "hold only letters, digits and ._/+=@-"
        )
    if tasks and o.nodes > 1:
        raise InputError(f"--nodes={o.nodes} --array: a task of a sweep runs on one node")
    is_node = bool(tasks) or o.tasks == "node" or not o.gpus_per_node
    if o.tasks == "gpu" and not o.gpus_per_node:
        raise InputError("--tasks=gpu needs --gpus-per-node")
    per_node = 1 if is_node else o.gpus_per_node
    cpus = o.cpus_per_task or max(1, CPUS_A_GPU * o.gpus_per_node // per_node)
    gpus = ""
    if o.gpus_per_node:
        kind = f"{o.gpu_type}:" if o.gpu_type else ""
        gpus = f"--gres=gpu:{kind}" if o.gres else f"--gpus-per-node={kind}"
        gpus += str(o.gpus_per_node)
    local = ",".join(map(str, range(o.gpus_per_node))) if is_node else "$SLURM_LOCALID"
    srun, prefix, setup = _where(o, command)
    run = templates.shell([*prefix, "vitjax", *command.words])
    logs = f"{command.workdir}/logs"
    values = {
        "WHAT": "a sweep, one task a trunk"
        if tasks
        else f"a training, processes: {o.nodes * per_node}",
        "NAME": o.name or command.name,
        "NODES": str(o.nodes),
        "TASKS": str(o.nodes * per_node),
        "TASKS_PER_NODE": str(per_node),
        "CPUS": str(cpus),
        "GPUS": gpus,
        "TIME": o.time,
        "GRACE": str(o.grace),
        "LOG": f"{logs}/%x-{'%A_%a' if tasks else '%j'}.log",
        "PARTITION": o.partition or "",
        "ACCOUNT": o.account or "",
        "QOS": o.qos or "",
        "ARRAY": _ranges(tasks) if tasks else "",
        "SBATCH": "\n".join(lines.get("sbatch", [])),
        "SETUP": "\n".join([*lines.get("setup", []), *setup]),
        "LOGS": templates.shell([logs]),
        "DEVICES": f"export JAX_LOCAL_DEVICE_IDS={local}" if o.gpus_per_node else "",
        "SRUN": templates.shell(["--mpi=none", *srun, *["--label"] * (o.nodes * per_node > 1)]),
        "COMMAND": run + (' --group="$SLURM_ARRAY_TASK_ID"' if tasks else ""),
        "SAVED": "|".join(map(str, sorted({command.preempted, contract.TERMINATED}))),
        "CRASHED": "|".join(map(str, contract.CRASHES)),
        "MAX_RESTARTS": str(o.max_restarts),
    }
    return templates.fill("slurm.sbatch", values, o.template)


def _ranges(tasks: Tasks) -> str:
    from vitjax.sweep.run import ranges

    return ranges(tasks.groups)


def _where(o: argparse.Namespace, command: Command) -> tuple[list[str], list[str], list[str]]:
    """Of a container or an environment: options of srun, words before the command, shell lines."""
    if o.container is None:
        if o.mount:
            raise InputError("--mount needs --container")
        own = sys.prefix if sys.prefix != sys.base_prefix else ""
        venv = o.venv or own
        return [], [], [f"source {templates.shell([f'{venv}/bin/activate'])}"] if venv else []
    if o.venv is not None:
        raise InputError("give --container or --venv, not both")
    folders = [str(Path(command.workdir).parent), *o.mount]
    if o.container.endswith(".sif"):
        binds = [f"--bind={folder}" for folder in folders]
        nvidia = ["--nv"] if o.gpus_per_node else []
        return [], ["apptainer", "exec", *nvidia, *binds, o.container], []
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f"--container-image={o.container}", f"--container-mounts={mounts}"], [], []


def launch(argv: list[str]) -> int:
    own, words = commands.split(argv, "slurm")
    o, lines = options.read(parser(), own, takes_lines=True)
    command = commands.parse(words)
    commands.check_shared(command.workdir, o.shared_workdir)
    tasks = sweeps.of(command, o.array, o.plan)
    script = render(o, lines, command, tasks)
    commands.check_nodes(command, o)

    def send() -> int:
        clients.require("sbatch")
        venv = Path(o.venv or sys.prefix)
        if o.container is None and not (venv / "bin").is_dir():
            raise InputError(f"--venv={venv}: no virtual environment there")
        folder = Path(command.workdir)
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            (folder / "launch.sbatch").write_text(script)
        except OSError as error:
            raise InputError(f"cannot write to --workdir={folder}: {error.strerror}") from error
        if tasks and command.retry:
            tasks.retry()
        said = clients.ask(["sbatch", "--parsable", str(folder / "launch.sbatch")])
        job = said.strip().partition(";")[0]
        print(f"submitted job {job}; its script is {folder / 'launch.sbatch'}")
        for line in (f"vitjax launch status {job}", f"vitjax launch logs {job}", f"scancel {job}"):
            print(f"  {line}")
        return cli.DONE

    retry = command.retry
    return clients.deliver(script, send, dry_run=o.dry_run, tasks=tasks, retry=retry)


def status(job: str) -> int:
    """What SLURM says of a job: of a live one squeue, of an old one its accounting."""
    clients.require("squeue")
    found = clients.ask(["squeue", f"--jobs={job}", "--noheader"]) if _is_live(job) else ""
    if found.strip():
        shape = "%.18i %.20j %.10T %.12M %.12l %.6D %R"
        return clients.show(["squeue", f"--jobs={job}", f"--format={shape}"])
    columns = "JobID,JobName%20,State%16,ExitCode,Elapsed,Restarts"
    return clients.show(["sacct", "-X", f"--jobs={job}", f"--format={columns}"])


def _is_live(job: str) -> bool:
    try:
        clients.ask(["squeue", f"--jobs={job}", "--noheader"])
    except InputError as error:
        if "Invalid job id" in str(error):  # it has left the queue
            return False
        raise
    return True


def logs(job: str) -> int:
    """The end of a job's log, wherever its script put it."""
    said = clients.ask(["scontrol", "show", "job", job])
    files = re.findall(r"^\s*StdOut=(.*)$", said, re.M)
    if not files:
        raise InputError(f"scontrol knows no log of job {job}; they lie in WORKDIR/logs")
    return clients.show(["tail", "-n", "100", *files])
