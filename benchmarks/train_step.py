"""The training step beside PyTorch and a plain nnx ViT: forward, backward, AdamW.

    python benchmarks/train_step.py [--shapes S/16 B/16] [--objectives supervised mae] [--batch 8]
        [--rounds 10] [--minutes 9] [--out FILE.json]

Float32 on CPUs; bfloat16 compute on float32 weights on accelerators (torch by autocast, SDPA and
fused AdamW). `vitjax` is the step that `vitjax train` runs with its defaults; `torch.compile` has
mode="max-autotune". Rows of torch and timm need their package, and CUDA beside a GPU.
On CPUs all competitors live side by side and take turns. An accelerator holds one at a time: there
each has a process of its own, one after the other, in rounds, as far as --minutes go; the first
shapes, vitjax and torch.compile come first, and --out is written after each. A batch that does not
fit is halved.
"""

import argparse
import functools
import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import competitors
import interleave
import record
import sequential

from vitjax import bench

# The number of images a step on a device of 80 GB.
BATCHES = {"S/16": 1024, "B/16": 1024, "L/16": 384, "So400m/14": 192, "H/14": 128, "g/14": 64}
CPU_BATCH, ACCELERATOR_BATCH = 8, 128
WINDOWS, WINDOW_SECONDS, ROUNDS = 5, 2.0, 3  # on accelerators; CPUs have ten rounds of one step
ON_ACCELERATORS = ("vitjax", "torch.compile", "vitjax MAE", "torch eager", "timm compiled",
                   "plain nnx")  # fmt: skip
# Compiling with max-autotune takes torch minutes on a CPU: --peers names it where it is wanted.
ON_CPUS = ("vitjax", "vitjax MAE", "vitjax scanned", "vitjax unrolled", "plain nnx", "torch eager")
NEEDS = {"torch eager": ("torch",), "torch.compile": ("torch",), "timm compiled": ("torch", "timm")}
MAIN = ("vitjax", "torch.compile", "vitjax MAE")
USED = ("torch", "timm", "triton")


@functools.cache
def torch_has_cuda() -> bool:
    """Asked in a process of its own, which leaves the memory alone."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return not subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode


def lacking(peer: str, is_cpu: bool) -> str:
    """Why a competitor cannot run here, or nothing."""
    packages = [name for name in NEEDS.get(peer, ()) if importlib.util.find_spec(name) is None]
    if packages:
        return f"{packages[0]} is not installed"
    if peer in NEEDS and not is_cpu and not torch_has_cuda():
        return "this torch has no CUDA, and on the CPU it is no competitor"
    if is_cpu and "compile" in peer and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    return ""


def choose(options: argparse.Namespace, is_cpu: bool) -> list[str]:
    """The competitors to run, in their order; says which are left out."""
    from vitjax.config import base_config  # which needs packages that may be missing

    names = list(options.peers or (ON_CPUS if is_cpu else ON_ACCELERATORS))
    same = {True: "vitjax scanned", False: "vitjax unrolled"}.get(base_config().model.scan)
    if not options.peers and same in names:
        names.remove(same)  # it is vitjax's default
    if "supervised" not in options.objectives:
        names = [name for name in names if name == "vitjax MAE"]
    if "mae" not in options.objectives:
        names = [name for name in names if name != "vitjax MAE"]
    for name in list(names):
        if why := lacking(name, is_cpu):
            print(f"{name} is left out: {why}", file=sys.stderr)
            names.remove(name)
    return names


def make_jobs(shapes: list[str], peers: list[str]) -> list[sequential.Job]:
    """Every shape of every competitor, in the order of importance: what is compared above all of
    the first two shapes, of the other shapes, and then the rest."""
    pairs = [(shape, peer) for shape in shapes for peer in peers]
    pairs.sort(key=lambda p: (p[1] not in MAIN, shapes.index(p[0]) // 2, p[1] == "vitjax MAE"))
    return [sequential.Job(f"{shape} {peer}", peer) for shape, peer in pairs]


# At most so many times a peer's CPU seconds; at least so many times its images a second.
CPU_GOALS = {"torch eager": {"S/16": 1.0, "Ti/16": 1.15}, "plain nnx": 0.85}
GOALS = {"torch.compile": 1.1, "plain nnx": 1.25}


def against(peers: Mapping[str, Any]) -> str:
    """Whom the others are compared with."""
    return next((p for p in ("torch.compile", "torch eager", "vitjax") if p in peers), min(peers))


def line(shape: str, peer: str, rounds: list[dict], base: list[tuple], peak: float | None) -> dict:
    """What the rounds of a competitor come to.

    Args:
      rounds: of it: `batch`, `flops_per_image`, and lists such as `wall`, one value a window.
      base: its rounds beside those of the one that it is compared with.
    """
    walls = [w for r in rounds for w in r["wall"]]
    low, middle, high = interleave.spread([rounds[-1]["batch"] / w for w in walls])
    made = {"shape": shape, "peer": peer, "batch": rounds[-1]["batch"], "windows": len(walls)}
    made |= {"images_per_second": middle, "low": low, "high": high}
    made["cpu_seconds"] = statistics.median(c for r in rounds for c in r["cpu"])
    memory = [m for r in rounds for m in r.get("peak_mib", r["rss_mib"])]
    made["peak_mib"] = max(memory)
    made["mfu"] = rounds[-1]["flops_per_image"] * middle / peak if peak else None

    def of(report: dict, key: str) -> list[float]:
        return [value / report["batch"] for value in report[key]]

    for key, name in (("wall", "speed_ratio"), ("cpu", "cpu_ratio")):
        found: list[float] = []
        for mine, other in base:
            if len(mine[key]) == len(other[key]) > 1 and mine.get("interleaved"):
                found += interleave.ratios(of(mine, key), of(other, key))
            else:
                found.append(statistics.median(of(mine, key)) / statistics.median(of(other, key)))
        if found:
            made[name] = [1 / x for x in found] if key == "wall" else found
    return made


def lines(found: sequential.Found, peers: list[str], shapes: list[str]) -> list[dict]:
    """A line for each competitor of each shape that was measured."""
    reports = [r for rounds in found.reports.values() for r in rounds]
    peak = max((r["peak_flops"] for r in reports if "peak_flops" in r), default=None)
    made = []
    for shape in shapes:
        here = [peer for peer in peers if f"{shape} {peer}" in found.reports]
        for peer in here:
            name, base = f"{shape} {peer}", f"{shape} {against(here)}"
            pairs = sequential.paired(found, name, base)
            made.append(line(shape, peer, found.reports[name], pairs, peak))
            made[-1]["ratio_to"] = against(here)
    return made


def table(made: list[dict]) -> str:
    """Lines for people: speed is images a second, more is better; CPU seconds are of a step."""
    text = [f"{'':28} {'batch':>5} {'images/s':>9} {'quartiles':>17} {'speed':>6} {'CPU-s':>8} "
            f"{'ratio':>6} {'MFU':>6} {'MiB':>7}"]  # fmt: skip
    for x in made:
        speed, cpu = (
            f"{statistics.median(x[k]):.2f}" if k in x else "" for k in ("speed_ratio", "cpu_ratio")
        )
        mfu = "" if x["mfu"] is None else f"{x['mfu']:.1%}"
        text.append(
            f"{x['shape']:9} {x['peer']:18} {x['batch']:5} {x['images_per_second']:9.2f} "
            f"{x['low']:8.2f}-{x['high']:8.2f} {speed:>6} {x['cpu_seconds']:8.3f} {cpu:>6} "
            f"{mfu:>6} {x['peak_mib']:7.0f}"
        )
    return "\n".join(text)


def summary(made: list[dict], is_cpu: bool) -> list[dict]:
    """Rows for `vitjax bench`: vitjax against each peer, and MAE against labels."""
    key, what, bound = (
        ("cpu_ratio", "CPU-s", "at_most") if is_cpu else ("speed_ratio", "images/s", "at_least")
    )
    found, rows = {(x["shape"], x["peer"]): x for x in made}, []
    for (shape, peer), x in found.items():
        ours = found.get((shape, "vitjax"))
        if ours is None or key not in x:
            continue
        if peer == "vitjax MAE":
            goal: Any = {} if is_cpu else {"at_least": 2.5}
            faster = [x["images_per_second"] / ours["images_per_second"]]
            rows.append(
                record.row(
                    f"{shape} vitjax MAE, 75% masked: images/s over supervised", faster, **goal
                )
            )
        elif not peer.startswith("vitjax"):
            # Both are ratios to the same peer, round by round.
            ratios = [a / b for a, b in zip(ours[key], x[key], strict=False)]
            wanted = (CPU_GOALS if is_cpu else GOALS).get(peer)
            wanted = wanted.get(shape) if isinstance(wanted, dict) else wanted
            goal = {bound: wanted} if wanted else {}
            rows.append(record.row(f"{shape} vitjax: {what} over {peer}", ratios, **goal))
    return rows


def side_by_side(options: argparse.Namespace, peers: list[str], found: sequential.Found) -> None:
    """All competitors of a shape at once, one step each in turn."""
    for shape in options.shapes:
        batch, about = options.batch or CPU_BATCH, {}
        commands = {peer: command(shape, peer, batch) for peer in peers}
        reports = interleave.compare(
            commands, options.rounds or 10, environment=surroundings(options), about=about
        )
        for peer, report in reports.items():
            found.reports[f"{shape} {peer}"] = [about[peer] | report | {"interleaved": True}]
            found.rounds[f"{shape} {peer}"] = [0]


def command(shape: str, peer: str, batch: int, seconds: float | None = None) -> list[str]:
    worker = [f"--worker={peer}", f"--shapes={shape}", f"--batch={batch}"]
    return [sys.executable, __file__, *worker, *([f"--window={seconds}"] if seconds else [])]


def surroundings(options: argparse.Namespace) -> dict[str, str]:
    """Variables of the competitors: the CPU where it was asked for, all of a GPU's memory."""
    if options.device == "cpu":
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}


def one_at_a_time(options: argparse.Namespace, peers: list[str], is_cpu: bool, save) -> Any:
    """A process for each visit, which is asked for several windows of steps."""
    batches: dict[str, int] = {}
    cache = tempfile.TemporaryDirectory()  # so that only the first round compiles
    environment = surroundings(options) | {"JAX_COMPILATION_CACHE_DIR": cache.name}
    window = options.window or (None if is_cpu else WINDOW_SECONDS)

    def visit(job: sequential.Job, left: float) -> dict[str, Any]:
        shape, _, peer = job.name.partition(" ")
        usual = CPU_BATCH if is_cpu else BATCHES.get(shape, ACCELERATOR_BATCH)
        batch = batches.get(job.name, options.batch or usual)
        while True:
            worker = interleave.Worker(
                peer, command(shape, peer, batch, window), environment=environment, seconds=left
            )
            try:
                about, report = worker.start(), {}
                for _ in range(WINDOWS):
                    interleave.add(report, worker.ask())
            except interleave.WorkerError as error:
                full = any(words in error.output for words in competitors.OUT_OF_MEMORY)
                if not full or batch == 1:
                    raise
                batch //= 2
                batches[job.name] = batch
                print(f"  out of memory: batch {batch} instead", file=sys.stderr, flush=True)
            else:
                return about | report
            finally:
                worker.close()

    with cache:
        return sequential.visit_all(
            make_jobs(options.shapes, peers), visit, seconds=60 * options.minutes, save=save,
            rounds=options.rounds or ROUNDS, tell=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--objectives", nargs="+", choices=["supervised", "mae"],
                        default=["supervised", "mae"])  # fmt: skip
    parser.add_argument("--batch", type=int, help="8 on CPUs, by shape on accelerators")
    parser.add_argument("--rounds", type=int, help="10 on CPUs, at most 3 on accelerators")
    parser.add_argument("--peers", nargs="+", choices=list(competitors.COMPETITORS))
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--sequential", action="store_true", help="one at a time, on CPUs too")
    parser.add_argument("--minutes", type=float, default=9.0, help="for one at a time")
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    parser.add_argument("--window", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run = competitors.COMPETITORS[options.worker]
        run(options.shapes[0], options.batch, options.window)
        return
    try:
        device = bench.device(surroundings(options), imports=["vitjax.experiment"])
    except bench.MissingPackageError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        sys.exit(2)
    is_cpu = device["platform"] == "cpu"
    if is_cpu:
        record.warn_if_busy()
    peers = choose(options, is_cpu)
    if not peers:
        parser.error("no competitor is left")

    def save(found: sequential.Found) -> None:
        made = lines(found, peers, options.shapes)
        record.write(
            options.out, options, rows=summary(made, is_cpu), used=USED, on=device, lines=made,
            rounds=found.rounds, reports=found.reports, not_measured=found.missing(),
        )  # fmt: skip

    if is_cpu and not options.sequential:
        found = sequential.Found()
        side_by_side(options, peers, found)
    else:
        found = one_at_a_time(options, peers, is_cpu, save)
    save(found)
    precision = "float32" if is_cpu else "bfloat16 on float32 weights"
    print(f"{device['kind']}, {competitors.SIZE} px, {precision}, one training step; speed and "
          "CPU-s as ratios to torch's or vitjax's")  # fmt: skip
    print(table(lines(found, peers, options.shapes)))
    for name, why in found.missing().items():
        print(f"not measured: {name}: {why}")
    if not found.reports:
        sys.exit(1)


if __name__ == "__main__":
    main()
