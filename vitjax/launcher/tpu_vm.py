"""`vitjax launch tpu-vm`: a script of gcloud lines, from the queue to the deletion."""

import argparse
import re
import subprocess
from pathlib import Path

from vitjax.errors import InputError
from vitjax.launcher import clients, contract, options, sweeps, templates, tpus
from vitjax.launcher import command as commands
from vitjax.launcher.command import Command
from vitjax.launcher.sweeps import Tasks
from vitjax.launcher.tpus import Slices

EXAMPLE = (
    "vitjax launch tpu-vm --tpu=v5e:4x4 --zone=us-west4-a --bucket=my-runs:/mnt/runs --dry-run "
    "-- train --config=vit_s16_i1k --workdir=/mnt/runs/s16"
)
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]*:/[A-Za-z0-9._/+=@-]*")
# On every worker: again after what goes on by itself, until `stop` leaves its mark.
RUN = """for attempt in $(seq 0 {restarts}); do
  vitjax/.venv/bin/vitjax {command}
  status=$?
  echo "launch: attempt $attempt ended with $status"
  [[ -e vitjax.stop ]] && break
  case $status in {endings}) sleep 10 ;; *) break ;; esac
done 2>&1 | tee -ia vitjax.log"""


def parser() -> options.Parser:
    text = "Creates TPU VMs through the queue, installs the code, and starts a training on them."
    made = options.parser("tpu-vm", text, EXAMPLE, 120, 20)
    options.add_remote(made)
    options.add_tpu(made, required=True)
    add = made.add_argument
    add("--zone", type=options.word, required=True, help="such as us-west4-a")
    add("--project", type=options.word, help="default: gcloud's own")
    add("--runtime", type=options.word, help="the system image (default: by the kind of TPU)")
    add("--spot", action="store_true", help="cheaper, and can be taken away at any time")
    add("--reserved", action="store_true", help="from your reservation")
    add("--bucket", type=options.matching(BUCKET, "of the form NAME:/PATH"), metavar="NAME:/PATH",
        help="a bucket that every worker mounts")  # fmt: skip
    add("--source", default=".", help="the repository to copy (default: this folder)")
    add("--script", help="where to write the script (default: NAME.sh)")
    return made


def render(o: argparse.Namespace, command: Command, tasks: Tasks | None, tpu: Slices) -> str:
    """The script."""
    name = o.name or command.name
    quote = templates.shell
    run = quote(command.words) + (' --group="${job##*-}"' if tasks else "")
    endings = "|".join(map(str, contract.endings(command.preempted)))
    bucket, _, path = (o.bucket or "").partition(":")
    options_ = [flag for flag, given in (("--spot", o.spot), ("--reserved", o.reserved)) if given]
    place = [f"--zone={o.zone}", *([f"--project={o.project}"] if o.project else [])]
    jobs = [f"{name}-{group}" for group in tasks.groups] if tasks else [name]
    values = {
        "WHAT": f"{len(jobs)} x {tpu.slices} x {tpu.vm_type} ({tpu.topology})",
        "PLACE": quote(place),
        "SOURCE": quote([str(Path(o.source).absolute())]),
        "JOBS": quote(jobs),
        "SLICES": str(tpu.slices),
        "RUN": quote([RUN.format(restarts=o.max_restarts, command=run, endings=endings)]),
        "TYPE": tpu.vm_type,
        "RUNTIME": o.runtime or tpus.VM[tpu.kind][2],
        "OPTIONS": quote(options_),
        "BUCKET": quote([bucket, path]) if bucket else "",
    }
    return templates.fill("tpu_vm.sh", values, o.template)


def launch(argv: list[str]) -> int:
    own, words = commands.split(argv, "tpu-vm")
    o, _ = options.read(parser(), own)
    tpu = tpus.parse(o.tpu)
    command = commands.parse(words, absolute=False)
    tasks = sweeps.of(command, o.array, o.plan)
    if tasks and tpu.hosts * tpu.slices > 1:
        raise InputError(f"--tpu={o.tpu} --array: a task of a sweep runs on one host")
    path = o.bucket.partition(":")[2] if o.bucket else None
    if not o.shared_workdir and (path is None or not Path(command.workdir).is_relative_to(path)):
        raise InputError(
            f"--workdir={command.workdir}: a worker's disk is its own, and is lost with it. Add "
            "--bucket=NAME:/PATH and choose a workdir below /PATH, or mount a file server and add "
            "--shared-workdir"
        )
    name = command.config_name
    if Path(name).is_absolute():
        raise InputError(f"--config={name}: give it relative to --source, which is what is copied")
    script = render(o, command, tasks, tpu)
    commands.check_nodes(command, o, tpu)

    def send() -> int:
        clients.require("gcloud")
        if not (Path(o.source) / "pyproject.toml").is_file():
            raise InputError(f"--source={o.source}: no repository of vitjax there")
        if tasks and command.retry:
            tasks.retry()
        file = Path(o.script or f"{o.name or command.name}.sh")
        file.write_text(script)
        print(f"{file}: up; then follow, stop, delete (it costs until it is deleted)", flush=True)
        return subprocess.run(["bash", str(file), "up"]).returncode

    retry = command.retry
    return clients.deliver(script, send, dry_run=o.dry_run, tasks=tasks, retry=retry)


def _place(zone: str | None, project: str | None) -> list[str]:
    if zone is None:
        raise InputError("--on=tpu-vm needs --zone")
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


def status(job: str, zone: str | None, project: str | None) -> int:
    """The queue's word on it."""
    words = ["gcloud", "compute", "tpus", "queued-resources", "describe", job]
    return clients.show([*words, *_place(zone, project)])


def logs(job: str, zone: str | None, project: str | None) -> int:
    """The end of the first worker's log."""
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", job, *_place(zone, project)]
    return clients.show([*words, "--worker=0", "--command=tail -n 100 vitjax.log"])
