"""`vitjax launch sky`: prints a task for SkyPilot, which finds the machines."""

import argparse
import re
from pathlib import Path

from vitjax import cli
from vitjax.errors import InputError
from vitjax.launcher import clients, options, sweeps, templates, tpus
from vitjax.launcher import command as commands
from vitjax.launcher.command import Command
from vitjax.launcher.sweeps import Tasks
from vitjax.launcher.tpus import Slices

EXAMPLE = (
    "vitjax launch sky --nodes=2 --gpus-per-node=8 --gpu-type=h100 --bucket=gs://my-runs:/runs "
    "-- train --config=vit_s16_i1k --workdir=/runs/s16"
)
BUCKET = re.compile(r"(gs|s3|r2)://[a-z0-9][a-z0-9._/-]*:/[A-Za-z0-9._/+=@-]*")
# SkyPilot numbers the nodes; a process of ours is one of them.
RANKS = """export VITJAX_COORDINATOR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476
export VITJAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES VITJAX_PROCESS_ID=$SKYPILOT_NODE_RANK
export JAX_LOCAL_DEVICE_IDS={local}
"""
# A Python of its own, since the system's may be older than what vitjax needs.
SETUP = """pip install -q uv
uv venv -q --allow-existing --python 3.12 .venv
uv pip install -q --python .venv/bin/python -e '.{extra}'
"""


def parser() -> options.Parser:
    made = options.parser("sky", "Prints a task for SkyPilot; it starts nothing.", EXAMPLE, 120, 20)
    options.add_remote(made)
    options.add_tpu(made)
    add = made.add_argument
    add("--nodes", type=options.at_least(1), help="machines (without --tpu; default 1)")
    add("--gpus-per-node", type=options.at_least(0), help="default 0: CPUs")
    add("--gpu-type", type=options.word, help="such as h100; needed with GPUs")
    add("--spot", action="store_true", help="cheaper, and can be taken away at any time")
    add("--infra", type=options.image, help="such as gcp/us-west4 (default: the cheapest)")
    add("--bucket", type=options.matching(BUCKET, "of the form gs://NAME:/PATH"),
        metavar="gs://NAME:/PATH", help="a bucket that every machine mounts")  # fmt: skip
    return made


def render(o: argparse.Namespace, command: Command, tasks: Tasks | None, tpu: Slices | None) -> str:
    """The task."""
    gpus, nodes = o.gpus_per_node or 0, o.nodes or 1
    accelerators, extra, arguments = "", "", ""
    if tpu:
        kind = tpu.vm_type
        accelerators, extra = templates.yaml(f"tpu-{kind}:1"), "[tpu]"
        arguments = templates.yaml({"tpu_vm": True, "runtime_version": tpus.VM[tpu.kind][2]})
    elif gpus:
        accelerators, extra = templates.yaml(f"{o.gpu_type.upper()}:{gpus}"), "[cuda]"
    run = f"exec .venv/bin/vitjax {templates.shell(command.words)}"
    run += ' --group="$GROUP"' if tasks else ""
    if not tpu and not tasks:
        run = RANKS.format(local=",".join(map(str, range(max(gpus, 1))))) + run
    files = {}
    if o.bucket:
        source, _, path = o.bucket.rpartition(":")
        files[path] = {"source": source, "mode": "MOUNT"}
    values = {
        "NAME": templates.yaml(o.name or command.name),
        "NODES": str(nodes),
        "ACCELERATORS": accelerators,
        "ARGUMENTS": arguments,
        "INFRA": templates.yaml(o.infra) if o.infra else "",
        "SPOT": "true" if o.spot else "false",
        "MAX_RESTARTS": str(o.max_restarts),
        "GROUPS": " ".join(map(str, tasks.groups)) if tasks else "",
        "ENVS": templates.yaml({"GROUP": str(tasks.groups[0])}) if tasks and tasks.groups else "",
        "FILES": templates.yaml(files) if files else "",
        "SETUP": templates.yaml(SETUP.format(extra=extra)),
        "RUN": templates.yaml(run),
    }
    return templates.fill("sky.yaml", values, o.template)


def launch(argv: list[str]) -> int:
    own, words = commands.split(argv, "sky")
    o, _ = options.read(parser(), own)
    if o.tpu is not None and (o.nodes is not None or o.gpus_per_node is not None):
        raise InputError(
            "--tpu says how many nodes there are; leave --nodes and --gpus-per-node out"
        )
    if o.gpus_per_node and o.gpu_type is None:
        raise InputError("--gpus-per-node needs --gpu-type, such as h100")
    tpu = None if o.tpu is None else tpus.parse(o.tpu)
    if tpu and tpu.slices > 1:
        raise InputError(
            f"--tpu={o.tpu}: SkyPilot starts one slice; vitjax launch k8s takes several"
        )
    command = commands.parse(words, absolute=False)
    tasks = sweeps.of(command, o.array, o.plan)
    if tasks and (tpu.hosts if tpu else o.nodes or 1) > 1:
        raise InputError("--array: a task of a sweep runs on one machine")
    path = o.bucket.rpartition(":")[2] if o.bucket else None
    if not o.shared_workdir and (path is None or not Path(command.workdir).is_relative_to(path)):
        raise InputError(
            f"--workdir={command.workdir}: a machine's disk is its own, and is lost with it. Add "
            "--bucket=gs://NAME:/PATH and choose a workdir below /PATH, or --shared-workdir"
        )
    commands.check_nodes(command, o, tpu)
    if tasks and command.retry and not o.dry_run:
        tasks.retry()
    task = render(o, command, tasks, tpu)
    return clients.deliver(task, lambda: cli.DONE, dry_run=True, tasks=tasks, retry=command.retry)
