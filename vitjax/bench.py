"""`vitjax bench`: runs the benchmarks that fit this machine; their numbers beside the goals.

Each is a script of its own in benchmarks/ that can be run alone; see there what it measures.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitjax import cli, cpu
from vitjax.errors import InputError, suggest

PEERS = ("torch", "timm", "transformers", "onnx", "grain")
PROBE = (
    "import importlib, json, sys; [importlib.import_module(n) for n in sys.argv[1:]]; import jax; "
    "d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
)


class MissingPackageError(RuntimeError):
    """A package is not installed without which nothing can be measured."""


def device(
    environment: Mapping[str, str] | None = None, imports: Iterable[str] = ()
) -> dict[str, Any]:
    """The `platform`, `kind` and `count` of JAX's devices.

    A process of its own asks, so that this one takes no accelerator; where JAX is loaded here
    already, this one does.

    Args:
      environment: variables of its beside ours.
      imports: modules that must load, too.

    Raises:
      MissingPackageError: one cannot be loaded for want of a package; names it.
    """
    if "jax" in sys.modules and not environment:
        import jax

        first = jax.devices()[0]
        found = [first.platform, first.device_kind, jax.device_count()]
    else:
        quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *imports], capture_output=True, text=True,
            env=os.environ | quiet | dict(environment or {}),
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            if last.startswith("ModuleNotFoundError"):
                name = last.split("'")[1].partition(".")[0]
                raise MissingPackageError(
                    f"the package {name!r} is not installed: pip install {name.replace('_', '-')}"
                )
            raise RuntimeError(f"JAX does not start: {last}")
        found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(("platform", "kind", "count"), found, strict=True))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What decides which benchmarks fit.

    Attributes:
      platform: of JAX's devices: "cpu", "gpu" or "tpu".
      kind, count: of these devices.
      memory_gib: of the host.
      packages: those of PEERS that are installed.
    """

    platform: str
    kind: str
    count: int
    memory_gib: float
    cores: int
    packages: frozenset[str]

    def __str__(self) -> str:
        absent = [name for name in PEERS if name not in self.packages]
        missing = f"; not installed: {', '.join(absent)}" if absent else ""
        return f"{self.count} x {self.kind}, {self.cores} cores, {self.memory_gib:.0f} GiB{missing}"


def this_machine() -> Machine:
    found = device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = frozenset(name for name in PEERS if importlib.util.find_spec(name))
    platform = "gpu" if found["platform"] in ("cuda", "rocm") else found["platform"]
    return Machine(platform, found["kind"], found["count"], memory, cpu.usable_cores(), packages)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A script of benchmarks/.

    Attributes:
      what: one line for people.
      arguments: of the script on a CPU and on an "accelerator", and of its quick form ("cpu quick"
        and so on); where one is missing the script does not run there.
      memory_gib: of the host, that it needs at most.
      packages: that it cannot do without.
      is_of_photos: it needs --photos.
    """

    what: str
    arguments: Mapping[str, str]
    memory_gib: float = 4
    packages: tuple[str, ...] = ()
    is_of_photos: bool = False

    def needs(self) -> str:
        """For people."""
        places = [place for place in ("cpu", "accelerator") if place in self.arguments]
        words = ["any device" if len(places) == 2 else f"{places[0]}s"]
        words += [f"{self.memory_gib:g} GiB", *self.packages]
        return ", ".join(words + ["--photos"] * self.is_of_photos)


QUICK_GIB = 4  # that a quick form needs at most
COMPARISONS = {
    "train_step": Comparison(
        "the training step beside torch, torch.compile, timm and plain nnx; MAE",
        {
            "cpu": "--shapes Ti/16 S/16 --rounds 10",
            "cpu quick": "--shapes Ti/16 --batch 4 --rounds 3 --objectives supervised "
            "--peers vitjax 'plain nnx' 'torch eager'",
            "accelerator": "--shapes S/16 B/16 L/16 H/14 --minutes 9",
            "accelerator quick": "--shapes S/16 --rounds 1 --minutes 2.5 --peers vitjax "
            "'torch eager' --objectives supervised",
        },
        memory_gib=14,
    ),
    "attention": Comparison(
        "attention alone, forward and backward: our kernels and torch's",
        {
            "cpu": "--rounds 10",
            "cpu quick": "--shapes S/16 --batch 2 --rounds 3",
            "accelerator": "--shapes S/16 B/16 So400m/14 H/14 --rounds 10",
            "accelerator quick": "--shapes S/16 --rounds 3",
        },
    ),
    "evaluation": Comparison(
        "vitjax eval and predict beside the forward pass alone",
        {
            "cpu": "--rounds 7",
            "cpu quick": "--shape Ti/16 --batch 8 --images 16 --rounds 3",
            "accelerator": "--rounds 7",
            "accelerator quick": "--rounds 3",
        },
    ),
    "startup": Comparison(
        "the command line, compiling S/16, the quickstart's first step with and without a cache",
        {
            "cpu": "--rounds 3",
            "cpu quick": "--rounds 1 --parts help start",
            "accelerator": "--rounds 3",
            "accelerator quick": "--rounds 1 --parts help start",
        },
    ),
    "loop": Comparison(
        "what the training loop adds to the bare step",
        {
            "cpu": "--rounds 7",
            "cpu quick": "--rounds 1",
            "accelerator": "--rounds 7",
            "accelerator quick": "--rounds 1",
        },
    ),
    "checkpointing": Comparison(
        "saving, fingerprints and restoring",
        {"cpu": "--rounds 7", "accelerator": "--rounds 7 --batch 64"},
        memory_gib=8,
    ),
    "objectives": Comparison(
        "MAE and DINO beside the bare encoder; memory of the contrastive loss",
        {"cpu": "--batch 4 --rounds 7"},
        memory_gib=14,
    ),
    "compile_time": Comparison(
        "compiling against depth and devices", {"cpu": "--rounds 3"}, memory_gib=8
    ),
    "interop": Comparison(
        "importing and exporting ViT-L/16 beside a plain copy",
        {"cpu": "--rounds 5", "accelerator": "--rounds 5"},
        memory_gib=8,
        packages=("onnx",),
    ),
    "input_pipeline": Comparison(
        "decoding and cropping JPEG files beside Grain and a torch DataLoader",
        {
            "cpu": "--rounds 5",
            "cpu quick": "--rounds 1 --files 300 --batches 3 --peers ours,torch",
            "accelerator": "--rounds 5",
        },
        packages=("torch",),
        is_of_photos=True,
    ),
    "augment": Comparison(
        "augmentation on the device beside Pillow",
        {"cpu": "--rounds 7", "accelerator": "--rounds 7"},
        is_of_photos=True,
    ),
}


def place_of(machine: Machine, quick: bool) -> str:
    """Which arguments of a comparison hold."""
    return ("cpu" if machine.platform == "cpu" else "accelerator") + " quick" * quick


def why_not(comparison: Comparison, machine: Machine, *, quick: bool, photos: str) -> str:
    """Why a comparison cannot run here; nothing where it can."""
    place = place_of(machine, quick)
    if place not in comparison.arguments:
        if quick and place_of(machine, False) in comparison.arguments:
            return "it has no quick form"
        return f"it is not for {machine.platform.upper()}s"
    needed = min(comparison.memory_gib, QUICK_GIB if quick else math.inf)
    if machine.memory_gib < needed:
        return f"it needs {needed:g} GiB of memory, here are {machine.memory_gib:.1f}"
    for name in comparison.packages:
        if name not in machine.packages:
            return f"{name} is not installed"
    if comparison.is_of_photos and not photos:
        return "it needs photographs: --photos=FOLDER_OR_ZIP"
    return ""


def check_names(names: Iterable[str]) -> None:
    """Raises InputError at the first name that is no comparison's."""
    for name in names:
        if name not in COMPARISONS:
            raise InputError(f"unknown benchmark {name!r}; {suggest(name, COMPARISONS)}")


def select(
    names: Sequence[str], machine: Machine, *, quick: bool = False, photos: str = ""
) -> tuple[list[str], dict[str, str]]:
    """The comparisons to run, and why the others are not.

    Args:
      names: those that the user asks for; none for all.

    Raises:
      InputError: a name is unknown, or was asked for and cannot run here.
    """
    check_names(names)
    chosen, left_out = [], {}
    for name in names or COMPARISONS:
        reason = why_not(COMPARISONS[name], machine, quick=quick, photos=photos)
        if reason and names:
            raise InputError(f"benchmark {name!r} cannot run here: {reason}")
        if reason:
            left_out[name] = reason
        elif name not in chosen:
            chosen.append(name)
    return chosen, left_out


def folder() -> Path:
    """Where the scripts lie: in the package once installed, else beside it."""
    installed = Path(__file__).parent / "benchmarks"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "benchmarks"


def command(name: str, place: str, out: str | Path, photos: str = "") -> list[str]:
    """Starts a comparison."""
    comparison = COMPARISONS[name]
    words = [
        sys.executable,
        str(folder() / f"{name}.py"),
        *shlex.split(comparison.arguments[place]),
    ]
    words += [f"--photos={photos}"] if comparison.is_of_photos else []
    return [*words, f"--out={Path(out) / f'{name}.json'}"]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of benchmarks for people: medians, quartiles, and goals where there are any."""
    lines = [f"{'':58} {'median':>9} {'quartiles':>19}  {'':9} goal"]
    for row in rows:
        goal = f"{row['goal']:8} {'met' if row['met'] else 'MISSED'}" if "goal" in row else ""
        quartiles = f"{row['low']:.4g} to {row['high']:.4g}"
        lines.append(
            f"{row['what'][:58]:58} {row['median']:9.4g} {quartiles:>19}  {row['unit']:9} "
            f"{goal}".rstrip()
        )
    return "\n".join(lines)


def show_list(machine: Machine, photos: str) -> None:
    """Every comparison with its command, what it needs, and whether it can run here."""
    for name, comparison in COMPARISONS.items():
        place = place_of(machine, False)
        place = place if place in comparison.arguments else next(iter(comparison.arguments))
        words = ["python", f"benchmarks/{name}.py", comparison.arguments[place]]
        words += ["--photos=FOLDER_OR_ZIP"] * comparison.is_of_photos
        reason = why_not(comparison, machine, quick=False, photos=photos)
        print(f"{name:15} {comparison.what}\n{'':15}   {' '.join(words)}")
        print(f"{'':15}   needs {comparison.needs()}{f'; not here: {reason}' if reason else ''}")


def run(
    names: Sequence[str], machine: Machine, out: Path, *, quick: bool, photos: str = ""
) -> dict[str, Any]:
    """Runs comparisons, one after the other, with what they print shown.

    Returns:
      "rows", by name, and "failed", the exit statuses of those that did not end well.
    """
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    environment["VITJAX_BENCH_LOAD"] = str(os.getloadavg()[0])  # before the first adds its own
    rows: dict[str, list] = {}
    failed: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        print(f"\n[{number}/{len(names)}] {name}: {COMPARISONS[name].what}", flush=True)
        start, result = time.monotonic(), out / f"{name}.json"
        result.unlink(missing_ok=True)  # of an earlier run
        words = command(name, place_of(machine, quick), out, photos)
        status = subprocess.run(words, env=environment).returncode
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if status or not result.is_file():
            failed[name] = status
            print(f"{name} failed with exit status {status}", file=sys.stderr, flush=True)
        if result.is_file():
            rows[name] = json.loads(result.read_text())["rows"]
    return {"rows": rows, "failed": failed}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax bench",
        description=__doc__,
        epilog="example: vitjax bench --quick --out=runs/bench",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of --list; all that fit by default"
    )
    parser.add_argument("--list", action="store_true", help="show what there is, and run nothing")
    parser.add_argument("--quick", action="store_true", help="few rounds, small shapes: minutes")
    parser.add_argument(
        "--out", default="runs/bench", help="the folder of the JSON files (runs/bench)"
    )
    parser.add_argument("--photos", default="", help="a folder or zip of JPEG files, for input")
    arguments, assignments = cli.parse(parser, argv)
    if assignments:
        raise InputError("vitjax bench takes no --config options")
    if arguments.photos and not Path(arguments.photos).exists():
        raise InputError(f"--photos={arguments.photos}: no such file or folder")
    check_names(arguments.names)  # before JAX is started to look at the machine
    machine = this_machine()
    if arguments.list:
        show_list(machine, arguments.photos)
        return cli.DONE
    photos = str(Path(arguments.photos).absolute()) if arguments.photos else ""
    names, left_out = select(arguments.names, machine, quick=arguments.quick, photos=photos)
    out = Path(arguments.out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out={arguments.out}: {error.strerror}") from error
    print(machine)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    found = run(names, machine, out, quick=arguments.quick, photos=photos)
    about = {"machine": {**dataclasses.asdict(machine), "packages": sorted(machine.packages)}}
    about |= {"quick": arguments.quick, "left_out": left_out}
    (out / "summary.json").write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"\n{machine}{', quick' if arguments.quick else ''}")
    print(table(row for rows in found["rows"].values() for row in rows))
    for name, status in found["failed"].items():
        print(f"failed: {name} (exit status {status})")
    print(f"written to {out}")
    return cli.FAILED if found["failed"] else cli.DONE
