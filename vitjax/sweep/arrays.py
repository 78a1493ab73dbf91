"""A sweep as a job array: SLURM's, or an Indexed Job of Kubernetes.

A task is one trunk with its branches, so that no task waits for another. It runs `vitjax sweep run
--group=N` on one host; what is finished is skipped, and what was preempted goes on. Each task is a
run of its own: nothing here joins processes, also where a scheduler's variables would suggest it.
"""

import json
import shlex
from pathlib import Path

from vitjax import config as config_lib
from vitjax.errors import InputError
from vitjax.sweep.plan import Plan
from vitjax.sweep.run import ranges
from vitjax.telemetry import write_whole

FILES = {"slurm": "array.sbatch", "k8s": "array.yaml"}
TEMPLATES = {"slurm": "sweep_array.sbatch", "k8s": "sweep_array.yaml"}
SUBMIT = {"slurm": "sbatch", "k8s": "kubectl apply -f"}


def _fill(text: str, values: dict[str, str]) -> str:
    """Replaces each marker, which must be there.

    Raises:
      InputError: the template has lost it.
    """
    for marker, value in values.items():
        if marker not in text:
            raise InputError(f"the launch template has no {marker!r} any more; restore the line")
        text = text.replace(marker, value)
    return text


def groups_of(plan: Plan, stage: str) -> list[int]:
    """The trunks of a stage. In a plan they are numbered without a gap.

    Raises:
      InputError: it has none.
    """
    groups = sorted({c.group for c in plan.cells if stage in ("all", c.stage)})
    if not groups:
        raise InputError(f"the plan has no cell of stage {stage!r}")
    return groups


def render(plan: Plan, kind: str, arguments: list[str], stage: str) -> str:
    """The text of the job array.

    Args:
      kind: "slurm" or "k8s".
      arguments: of `vitjax sweep run`, but for the group; any text, quoted here.
    """
    folder = config_lib.config_folder().parent / "launch"
    template, groups = (folder / TEMPLATES[kind]).read_text(), groups_of(plan, stage)
    if kind == "slurm":
        quoted = " ".join(map(shlex.quote, arguments))
        marked = {"--array=0-0": f"--array={ranges(groups)}", '"$@"': quoted}
        return _fill(template, marked)

    def escaped(text: str) -> str:
        # JSON is YAML; Kubernetes reads $(NAME) as a variable's value, and $$ as a dollar.
        return json.dumps(text, ensure_ascii=False).replace("$", "$$")

    script = f'exec vitjax sweep run "$@" --group=$((JOB_COMPLETION_INDEX + {groups[0]}))'
    values = {
        "@COMPLETIONS@": str(len(groups)),
        "@SCRIPT@": escaped(script),
        "@ARGS@": "[" + ", ".join(map(escaped, ["sweep", *arguments])) + "]",
    }
    return _fill(template, values)


def write(workdir: Path, plan: Plan, kind: str, stage: str, workers: int) -> str:
    """Writes the array's file into the workdir; returns how to submit it."""
    folder = workdir.absolute()
    arguments = [f"--workdir={folder}", f"--stage={stage}", f"--workers={workers}"]
    path = folder / FILES[kind]
    write_whole(path, render(plan, kind, arguments, stage))
    count = len(groups_of(plan, stage))
    return (
        f"{count} tasks, each a trunk with its branches. Edit the lines marked EDIT, then:\n"
        f"  {SUBMIT[kind]} {shlex.quote(str(path))}\n"
        f"and when they are done:\n  vitjax sweep collect --workdir={shlex.quote(str(folder))}"
    )
