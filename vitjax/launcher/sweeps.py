"""A sweep as an array of tasks, one for each trunk with the branches that cool down from it.

So no task waits for another. What is finished is left out; what was preempted goes on; what failed
is listed, and tried again when asked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitjax.errors import InputError
from vitjax.launcher import templates
from vitjax.launcher.command import Command

if TYPE_CHECKING:  # they import JAX, which a training's launch does without
    from vitjax.sweep.cells import Cell
    from vitjax.sweep.plan import Plan


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What of a sweep is still to be done.

    Attributes:
      groups: the trunks' numbers, one task each.
      cells: how many cells they are to train.
      done: how many cells need nothing more.
      failed: the cells whose last attempt failed or diverged, with why.
    """

    folder: Path
    plan: Plan
    groups: tuple[int, ...]
    cells: int
    done: int
    failed: tuple[tuple[Cell, dict[str, Any]], ...]

    def report(self, retry: bool) -> str:
        """What is submitted and what is not."""
        lines = [f"{len(self.groups)} tasks for {self.cells} cells; {self.done} are done"]
        how = "tried again" if retry else "left out; --retry after sweep run tries them again"
        if self.failed:
            lines.append(f"{len(self.failed)} failed or diverged, {how}:")
        lines += [f"  {cell.id} {a['status']}: {a['reason']}" for cell, a in self.failed]
        return "\n".join(lines)

    def retry(self) -> None:
        """Sets the failed cells free; their rows and their runs are kept."""
        from vitjax.sweep import attempts
        from vitjax.sweep.collect import collect

        collect(self.folder, self.plan)
        for cell, _ in self.failed:
            attempts.retry(self.folder, cell.id)


def find(command: Command, plan_folder: str | None) -> Tasks:
    """The tasks of a sweep.

    Args:
      plan_folder: where its workdir, or a copy of it, can be read from here.

    Raises:
      InputError: no plan, no such cells, hold-out cells with no frozen prediction.
    """
    if command.retry and plan_folder is not None:
        raise InputError(
            "--retry marks the failed cells in the sweep's workdir, which --plan says is not here: "
            "run it where the workdir is, or vitjax sweep run --retry there"
        )
    from vitjax.sweep import attempts, run
    from vitjax.sweep.table import read_plan

    folder = Path(plan_folder or command.workdir)
    plan = read_plan(folder)
    cells = run.select(folder, plan, stage=command.stage, cells=None, group=None)
    ended = {cell.id: attempts.last(folder, cell.id) for cell in cells}
    failed = [(c, a) for c in cells if (a := ended[c.id]) is not None and a["status"] != "done"]
    open_cells = [cell for cell in cells if ended[cell.id] is None]
    todo = open_cells + ([cell for cell, _ in failed] if command.retry else [])
    return Tasks(
        folder=folder,
        plan=plan,
        groups=tuple(sorted({cell.group for cell in todo})),
        cells=len(todo),
        done=len(cells) - len(failed) - len(open_cells),
        failed=tuple(failed),
    )


def write(workdir: Path, kind: str, stage: str, workers: int) -> str:
    """Writes a sweep's array into its workdir, with plain settings; returns how to submit it."""
    from vitjax.launcher import command as commands
    from vitjax.launcher import k8s, slurm

    words = [f"--workdir={workdir}", f"--stage={stage}", f"--workers={workers}"]
    command = commands.parse(["sweep", "run", *words])
    tasks, folder = find(command, None), Path(command.workdir)
    if not tasks.groups:
        return f"{tasks.report(retry=False)}\nnothing is left to be done"
    if kind == "slurm":
        path = folder / "array.sbatch"
        text = slurm.render(slurm.parser().read(["--gpus-per-node=8"]), {}, command, tasks)
    else:
        path = folder / "array.yaml"
        plain = ["--gpus-per-node=8", "--image=registry.example.com/vitjax:1", "--pvc=runs:/runs"]
        text = k8s.render(k8s.parser().read(plain), command, tasks, None)
    path.write_text(text)
    submit = "sbatch" if kind == "slurm" else "kubectl apply -f"
    quoted = templates.shell([str(path)])
    return (
        f"{tasks.report(retry=False)}\n{path} asks for 8 GPUs a task; edit it, then\n  "
        f"{submit} {quoted}\n"
        f"or with settings of your own: vitjax launch {kind} --array ... -- sweep run "
        f"--workdir={templates.shell([str(folder)])}"
    )


def of(command: Command, array: bool, plan_folder: str | None) -> Tasks | None:
    """The tasks, where an array is asked for.

    Raises:
      InputError: an array of something that is no sweep, or a sweep that would need one.
    """
    if array != command.is_sweep:
        raise InputError(
            "a sweep is launched as an array: add --array before --"
            if command.is_sweep
            else "--array is for sweeps: vitjax launch ... --array -- sweep run --workdir=..."
        )
    return find(command, plan_folder) if array else None
