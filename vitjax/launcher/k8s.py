"""`vitjax launch k8s`: a JobSet for a training, an Indexed Job for a sweep."""

import argparse
import re
from pathlib import Path
from typing import Any

from vitjax import cli
from vitjax.errors import InputError
from vitjax.launcher import clients, contract, options, sweeps, templates, tpus
from vitjax.launcher import command as commands
from vitjax.launcher.command import Command
from vitjax.launcher.sweeps import Tasks
from vitjax.launcher.tpus import Slices

EXAMPLE = (
    "vitjax launch k8s --nodes=4 --gpus-per-node=8 --image=registry.example.com/vitjax:1 "
    "--pvc=runs:/runs --dry-run -- train --config=vit_s16_i1k --workdir=/runs/s16"
)
PORT = 8476
INSTANCE = "app.kubernetes.io/instance"
GIVEN = ("VITJAX_COORDINATOR", "VITJAX_NUM_PROCESSES", "VITJAX_PROCESS_ID")
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
VOLUME = re.compile(r"[a-z0-9][a-z0-9._-]*:/[A-Za-z0-9._/+=@-]*")
NODE_LABEL = re.compile(r"[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*")
SECRET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[a-z0-9][a-z0-9.-]*/[A-Za-z0-9._-]+")
BUCKET = (
    "implicit-dirs,rename-dir-limit=200000"  # a checkpoint's folder is renamed when it is whole
)


def parser() -> options.Parser:
    made = options.parser(
        "k8s", "Submits a training as a JobSet, or a sweep as an Indexed Job.", EXAMPLE, 120, 20
    )
    options.add_remote(made)
    options.add_tpu(made)
    add = made.add_argument
    add("--nodes", type=options.at_least(1), help="pods, one a node (without --tpu; default 1)")
    add("--gpus-per-node", type=options.at_least(0), help="of a pod (default 0: CPUs)")
    add("--gpu-type", type=options.word, help="such as h100: checked if known")
    add("--image", type=options.image, required=True, help="made from launch/Dockerfile")
    add("--pvc", type=_volume, action="append", default=[], metavar="CLAIM:/PATH",
        help="mount a volume claim that many pods can write (ReadWriteMany)")  # fmt: skip
    add("--bucket", type=_volume, action="append", default=[], metavar="NAME:/PATH",
        help="mount a bucket of Google Cloud Storage (GKE)")  # fmt: skip
    add("--namespace", type=options.label)
    add("--queue", type=options.label, help="Kueue's local queue")
    add(
        "--service-account",
        type=options.label,
        help="one that exists (default: a new one, no rights)",
    )
    add("--secret-env", type=_secret, action="append", default=[], metavar="NAME=SECRET/KEY",
        help="a variable whose value Kubernetes takes from a secret")  # fmt: skip
    add("--node-label", type=options.matching(NODE_LABEL, "of the form KEY=VALUE"),
        action="append", default=[], help="only nodes with this label")  # fmt: skip
    add("--cpus", type=options.at_least(1), help="that each pod asks for")
    add("--memory", type=options.matching(re.compile(r"\d+[MGT]i"), "a size such as 200Gi"))
    add("--parallel", type=options.at_least(1), help="tasks of an array at once (default: all)")
    return made


_volume = options.matching(VOLUME, "of the form NAME:/PATH")
_secret = options.matching(SECRET, "of the form NAME=SECRET/KEY")


def _mounted(o: argparse.Namespace) -> tuple[list[dict], list[dict], dict[str, str]]:
    """Volumes, where they are mounted, and the pod's annotations that they need."""
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, text in enumerate([*o.pvc, *o.bucket]):
        source, _, path = text.partition(":")
        volume: dict[str, Any] = {"name": f"volume-{number}"}
        if number < len(o.pvc):
            volume["persistentVolumeClaim"] = {"claimName": source}
        else:
            attributes = {"bucketName": source, "mountOptions": BUCKET}
            volume["csi"] = {
                "driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes
            }  # fmt: skip
        volumes.append(volume)
        mounts.append({"name": volume["name"], "mountPath": path})
    return volumes, mounts, {"gke-gcsfuse/volumes": "true"} if o.bucket else {}


def _check_paths(o: argparse.Namespace, command: Command) -> None:
    """Raises InputError where the pods would not find the workdir or the config."""
    paths = [text.partition(":")[2] for text in [*o.pvc, *o.bucket]]

    def is_mounted(path: str) -> bool:
        return any(Path(path).is_relative_to(folder) for folder in paths)

    if not is_mounted(command.workdir) and not o.shared_workdir:
        raise InputError(
            f"--workdir={command.workdir} lies in no volume ({', '.join(paths) or 'none given'}): "
            "a pod's own disk ends with it. Add --pvc=CLAIM:/PATH or --bucket=NAME:/PATH, and "
            "choose a workdir below /PATH"
        )
    name = command.config_name
    if Path(name).is_file() and not name.startswith("configs/") and not is_mounted(name):
        raise InputError(
            f"--config={name}: the pods do not see this file. Put it into configs/ before the "
            "image is built, and give its name; or into a volume, at the same path here"
        )


def _environment(o: argparse.Namespace, name: str, hosts: int, tpu: Slices | None) -> list[dict]:
    """What the processes read: their ranks, the platform, names of secrets; no value of ours."""
    if tpu:  # GKE writes down who is who, and JAX reads that; one host alone needs nobody
        found: list[dict[str, Any]] = [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
        if tpu.hosts * tpu.slices == 1:
            alone = zip(GIVEN, (f"localhost:{PORT}", "1", "0"), strict=True)
            found += [{"name": variable, "value": value} for variable, value in alone]
    else:
        gpus = o.gpus_per_node or 0
        local = ",".join(map(str, range(max(gpus, 1))))
        found = [
            {"name": "VITJAX_COORDINATOR", "value": f"{name}-train-0-0.{name}:{PORT}"},
            {"name": "VITJAX_NUM_PROCESSES", "value": str(hosts)},
            {"name": "VITJAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
            {"name": "JAX_LOCAL_DEVICE_IDS", "value": local},
            {"name": "JAX_PLATFORMS", "value": "cuda,cpu" if gpus else "cpu"},
        ]
    for text in o.secret_env:
        variable, _, source = text.partition("=")
        secret, _, key = source.partition("/")
        reference = {"secretKeyRef": {"name": secret, "key": key}}
        found.append({"name": variable, "valueFrom": reference})
    return found


def render(o: argparse.Namespace, command: Command, tasks: Tasks | None, tpu: Slices | None) -> str:
    """The manifest, all documents of it."""
    name = o.name or command.name
    volumes, mounts, annotations = _mounted(o)
    hosts, gpus = (tpu.hosts if tpu else o.nodes or 1), o.gpus_per_node or 0
    limits: dict[str, Any] = {}
    nodes = dict(text.split("=", 1) for text in o.node_label)
    if tpu:
        limits["google.com/tpu"] = tpu.chips
        nodes["cloud.google.com/gke-tpu-accelerator"] = tpus.GKE[tpu.kind]
        nodes["cloud.google.com/gke-tpu-topology"] = tpu.topology
    elif gpus:
        limits["nvidia.com/gpu"] = gpus
    requests = {"cpu": o.cpus, "memory": o.memory}
    requests = {key: str(value) for key, value in requests.items() if value is not None}
    labels = {INSTANCE: name}
    queue = {"kueue.x-k8s.io/queue-name": o.queue} if o.queue else {}
    resources = {"limits": limits, "requests": requests}
    yaml = templates.yaml
    values = {
        "NAME": yaml(name),
        "NAMESPACE": yaml(o.namespace) if o.namespace else "",
        "LABELS": yaml(labels | queue),
        "POD_LABELS": yaml(labels),
        "MAX_RESTARTS": str(o.max_restarts),
        "POD_ANNOTATIONS": yaml(annotations) if annotations else "",
        "ACCOUNT": yaml(o.service_account or name),
        "GRACE": str(o.grace),
        "NODES": yaml(nodes) if nodes else "",
        "IMAGE": yaml(o.image),
        "RESOURCES": yaml({key: value for key, value in resources.items() if value}),
        "MOUNTS": yaml(mounts),
        "VOLUMES": yaml(volumes),
    }
    if tasks:
        numbers = " ".join(map(str, tasks.groups))
        script = (
            f"group=$(echo {numbers} | cut -d' ' -f$((JOB_COMPLETION_INDEX + 1))) && "
            'exec vitjax "$@" --group="$group"'
        )
        values |= {
            "TASKS": str(len(tasks.groups)),
            "PARALLEL": str(min(o.parallel or len(tasks.groups), len(tasks.groups))),
            "SAVED": yaml(sorted({command.preempted, contract.TERMINATED})),
            "COMMAND": templates.container(["/bin/sh", "-c", script]),
            "ARGS": templates.container(["vitjax", *command.words]),
            "ENV": yaml([e for e in _environment(o, name, 1, tpu) if "VITJAX" not in e["name"]]),
        }
    else:
        topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        slices = tpu.slices if tpu else 1
        what = (
            f"{slices} slices {tpu.kind} {tpu.topology}"
            if tpu
            else f"{hosts} pods, {gpus} GPUs each"
        )
        values |= {
            "WHAT": what,
            "ANNOTATIONS": yaml(topology) if tpu else "",
            "SLICES": str(slices),
            "HOSTS": str(hosts),
            "ENDINGS": yaml(sorted(contract.endings(command.preempted))),
            "ARGS": templates.container(command.words),
            "ENV": yaml(_environment(o, name, hosts, tpu)),
        }
    account = ""
    if o.service_account is None:
        own = {"NAME": values["NAME"], "NAMESPACE": values["NAMESPACE"]}
        account = templates.fill("k8s_account.yaml", own)
    template = "k8s_sweep.yaml" if tasks else "k8s_jobset.yaml"
    return account + templates.fill(template, values, o.template)


def launch(argv: list[str]) -> int:
    own, words = commands.split(argv, "k8s")
    o, _ = options.read(parser(), own)
    if o.tpu is not None and (o.nodes is not None or o.gpus_per_node is not None):
        raise InputError(
            "--tpu says how many nodes there are; leave --nodes and --gpus-per-node out"
        )
    tpu = None if o.tpu is None else tpus.parse(o.tpu)
    command = commands.parse(words, absolute=False)
    tasks = sweeps.of(command, o.array, o.plan)
    hosts = tpu.hosts * tpu.slices if tpu else o.nodes or 1
    if tasks and hosts > 1:
        raise InputError(f"--array: a task of a sweep runs in one pod, but {hosts} are asked for")
    _check_paths(o, command)
    commands.check_nodes(command, o, tpu)
    manifest = render(o, command, tasks, tpu)

    def send() -> int:
        clients.require("kubectl")
        if tasks and command.retry:
            tasks.retry()
        place = _place(o.namespace)
        print(clients.ask(["kubectl", "apply", *place, "-f", "-"], manifest), end="")
        name, kind = o.name or command.name, "job" if tasks else "jobset"
        where = "".join(f" {word}" for word in place)
        for action in ("status", "logs"):
            print(f"  vitjax launch {action} {name} --on=k8s{where}")
        print(f"  kubectl delete {kind} {name}{where}")
        return cli.DONE

    retry = command.retry
    return clients.deliver(manifest, send, dry_run=o.dry_run, tasks=tasks, retry=retry)


def _place(namespace: str | None) -> list[str]:
    return [f"--namespace={namespace}"] if namespace else []


def status(job: str, namespace: str | None) -> int:
    """The job's parts and its pods."""
    return clients.show(["kubectl", "get", "jobs,pods", *_place(namespace), f"-l{INSTANCE}={job}"])


def logs(job: str, namespace: str | None) -> int:
    """The end of each pod's log."""
    words = ["kubectl", "logs", *_place(namespace), f"-l{INSTANCE}={job}", "--container=vitjax"]
    return clients.show([*words, "--prefix", "--tail=100", "--max-log-requests=256"])
