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
EARLY_SECONDS = 60  # by so much, says sbatch's manual, the signal may come before its time
UNKNOWN = "Invalid job id"  # squeue and scontrol, of a job that they do not know any more
FIELDS = ("JobState", "Reason", "ExitCode", "Restarts", "RunTime", "StdOut")  # of a job, shown


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
    if 0 < _seconds(o.time) <= o.grace + EARLY_SECONDS:
        raise InputError(
            f"--time={o.time} leaves no time to train: SLURM tells the job to save --grace="
            f"{o.grace} seconds before its limit, or up to {EARLY_SECONDS} seconds earlier, and it "
            "would save and queue again for ever; give a longer --time or a shorter --grace"
        )
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


def _seconds(time: str) -> int:
    """Of a limit as SLURM reads it: minutes, m:s, h:m:s, days-h, days-h:m, days-h:m:s."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


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
    """What SLURM says of a job: of a live one squeue, of an old one its accounting, if there is."""
    clients.require("squeue")
    found = clients.ask(["squeue", f"--jobs={job}", "--noheader"]) if _is_live(job) else ""
    if found.strip():
        shape = "%.18i %.20j %.10T %.12M %.12l %.6D %R"
        return clients.show(["squeue", f"--jobs={job}", f"--format={shape}"])
    columns = "JobID,JobName%20,State%16,ExitCode,Elapsed,Restarts"
    try:
        said = clients.ask(["sacct", "-X", f"--jobs={job}", f"--format={columns}"])
    except InputError as error:
        if "accounting storage is disabled" not in str(error):
            raise
        said = _remembered(job)
    print(said, end="")
    return cli.DONE


def _is_live(job: str) -> bool:
    try:
        clients.ask(["squeue", f"--jobs={job}", "--noheader"])
    except InputError as error:
        if UNKNOWN in str(error):  # it has left the queue
            return False
        raise
    return True


def _records(job: str) -> list[dict[str, str]]:
    """What SLURM's controller remembers of a job, or of each task of an array, for some minutes.

    Raises:
      InputError: it has forgotten the job, or never knew it.
    """
    try:
        said = clients.ask(["scontrol", "--oneliner", "show", "job", job])
    except InputError as error:
        if UNKNOWN in str(error):
            raise InputError(
                f"SLURM does not know job {job}, or not any more (it forgets jobs that are over); "
                "a run's logs lie in WORKDIR/logs"
            ) from error
        raise
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.splitlines() if line.strip()]


def _remembered(job: str) -> str:
    """A job that has left the queue, where the cluster keeps no accounting (slurmdbd)."""
    lines = []
    for found in _records(job):
        task = f"_{found['ArrayTaskId']}" if "ArrayTaskId" in found else ""
        number = f"{found.get('ArrayJobId', found.get('JobId', job))}{task}"
        shown = [f"{name}={found[name]}" for name in FIELDS if name in found]
        lines.append(" ".join([number, found.get("JobName", ""), *shown]) + "\n")
    return "".join(lines)


def logs(job: str) -> int:
    """The end of a job's log, wherever its script put it."""
    files = [found["StdOut"] for found in _records(job) if found.get("StdOut")]
    if not files:
        raise InputError(f"scontrol knows no log of job {job}; they lie in WORKDIR/logs")
    started = [file for file in files if Path(file).is_file()]
    if not started:
        raise InputError(f"job {job} has written nothing yet; its log will be {files[0]}")
    return clients.show(["tail", "-n", "100", *started])
