"""`vitjax launch`: the targets, and what became of a job."""

import importlib

from vitjax import cli
from vitjax.errors import InputError, suggest
from vitjax.launcher import options

# Each is a module with launch(argv), and where a scheduler keeps jobs status(job) and logs(job).
TARGETS = {
    "local": ("vitjax.launcher.local", "several processes on this machine"),
    "slurm": ("vitjax.launcher.slurm", "an sbatch script: a training, or a sweep as a job array"),
    "k8s": ("vitjax.launcher.k8s", "a JobSet on GPUs or TPU slices, or a sweep as an Indexed Job"),
    "tpu-vm": ("vitjax.launcher.tpu_vm", "a script of gcloud lines, from queue to deletion"),
    "sky": ("vitjax.launcher.sky", "print a task for SkyPilot"),
}
READERS = {
    "status": "what the scheduler says of a job",
    "logs": "the end of a job's log",
}
EXAMPLE = "vitjax launch local -n 2 -- train --config=quickstart --workdir=runs/two"
USAGE = "\n".join(
    ["usage: vitjax launch TARGET [options] -- train --config=... --workdir=...",
     "       vitjax launch status|logs JOB", ""]
    + [f"  {name:8} {text}" for name, (_, text) in TARGETS.items()]
    + [f"  {name:8} {text}" for name, text in READERS.items()]
    + ["", "vitjax launch TARGET --help shows a target's options and an example.",
       f"example: {EXAMPLE}"]
)  # fmt: skip


def _read(action: str, argv: list[str]) -> int:
    made = options.Parser(
        prog=f"vitjax launch {action}",
        description=READERS[action],
        epilog=f"example: vitjax launch {action} 4217",
        allow_abbrev=False,
    )
    made.add_argument("job", type=options.word, help="a job's number or name")
    made.add_argument("--on", choices=("slurm", "k8s", "tpu-vm"),
                      help="default: slurm for a number, else k8s")  # fmt: skip
    made.add_argument("--namespace", type=options.label, help="of k8s")
    made.add_argument("--zone", type=options.word, help="of tpu-vm")
    made.add_argument("--project", type=options.word, help="of tpu-vm")
    found = made.read(argv)
    target = found.on or ("slurm" if found.job[:1].isdigit() else "k8s")
    places = {"k8s": ("namespace",), "tpu-vm": ("zone", "project")}.get(target, ())
    for name in ("namespace", "zone", "project"):
        if name not in places and getattr(found, name) is not None:
            raise InputError(f"--{name} does not belong to --on={target}")
    module = importlib.import_module(TARGETS[target][0])
    return getattr(module, action)(found.job, *(getattr(found, name) for name in places))


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return cli.DONE if argv else cli.WRONG_INPUT
    name, rest = argv[0], argv[1:]
    if name in READERS:
        return _read(name, rest)
    if name not in TARGETS:
        allowed = [*TARGETS, *READERS]
        raise InputError(f"unknown target {name!r} of vitjax launch; {suggest(name, allowed)}")
    module = importlib.import_module(TARGETS[name][0])
    if any(word in ("-h", "--help") for word in rest):
        module.parser().parse_args(["--help"])
    return module.launch(rest)
