"""Evaluation and prediction beside the forward pass alone.

    python benchmarks/evaluation.py [--shape S/16] [--batch 16] [--images 64] [--rounds 7]
        [--out FILE.json]

Over the same images, in turn, in one process: the jitted forward pass on batches that lie on the
device already; the classification evaluator as `vitjax eval` runs it, over a source in memory; and
`vitjax.load(...).logits` batch by batch as `vitjax predict` asks for it, the logits copied to the
host. Images are uint8 and of the model's size, so none is decoded or resized. The ratios are of
images a second, round by round.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interleave
import numpy as np
import record

from vitjax import bench

SIZE, CLASSES = 224, 1000


def made_up(count: int) -> Any:
    """A source of so many images, drawn once and kept."""
    from vitjax.data.sources.arrays import Arrays

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, count)
    names = tuple(map(str, range(CLASSES)))
    return Arrays(images, labels, name="made up", class_names=names)


def make_experiment(shape: str, batch: int, images: int) -> Any:
    import jax

    from vitjax import config as config_lib
    from vitjax import experiment

    config = config_lib.base_config()
    config.model.shape = shape
    config.evals.set = {
        "target": "vitjax.evals.classification:Classification", "batch_size": batch,
        "source": {"target": f"{Path(__file__).stem}:made_up", "count": images},
    }  # fmt: skip
    return experiment.build(config, devices=jax.devices()[:1])


def make_works(exp: Any, folder: str, batch: int, images: int) -> dict[str, Callable[[], Any]]:
    """What takes turns; each goes over all images and waits until it is done."""
    import jax

    import vitjax
    from vitjax import experiment, inference
    from vitjax.evals import evaluation
    from vitjax.state import prepare

    state = exp.fresh_state()
    state = dataclasses.replace(state, opt_state=None)
    evaluators = experiment.make_evaluators(exp)
    params = jax.tree.map(np.asarray, state.params)
    contract = exp.contract(tuple(map(str, range(CLASSES))))
    inference.VisionModel(exp.model, params, contract).save(folder)
    model = vitjax.load(folder)
    pixels = made_up(images).images
    batches = [pixels[i : i + batch] for i in range(0, images, batch)]
    placed = [jax.device_put(b, exp.mesh.devices.flat[0]) for b in batches]
    run = jax.jit(lambda p, x: exp.model.apply(p, prepare(x, exp.preprocess))["logits"])
    return {
        "forward": lambda: jax.block_until_ready([run(state.params, b) for b in placed]),
        "evaluation": lambda: evaluation.run(evaluators, state),
        "prediction": lambda: [np.asarray(model.logits(b)) for b in batches],
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", default="S/16")
    parser.add_argument("--batch", type=int, help="16 on CPUs, 256 on accelerators")
    parser.add_argument("--images", type=int, help="four batches on CPUs, else 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    options = parser.parse_args()
    record.warn_if_busy()
    from vitjax import cpu

    cpu.keep_freed_memory()
    import jax

    is_cpu = jax.default_backend() == "cpu"
    batch = options.batch or (16 if is_cpu else 256)
    images = options.images or batch * (4 if is_cpu else 32)
    if images % batch:
        parser.error(f"--images={images} must be a multiple of --batch={batch}")
    exp = make_experiment(options.shape, batch, images)
    reports: dict[str, interleave.Report] = {}
    with tempfile.TemporaryDirectory() as folder:
        works = make_works(exp, f"{folder}/model", batch, images)
        for work in works.values():
            work()  # compiles
        for index in range(options.rounds):
            for name, work in works.items():
                wall, cpu_seconds = time.perf_counter(), time.process_time()
                work()
                report = {"wall": (time.perf_counter() - wall) / images}
                report["cpu"] = (time.process_time() - cpu_seconds) / images
                interleave.add(reports.setdefault(name, {}), report)
            print(f"round {index + 1}/{options.rounds}", end="\r", flush=True)
    rows = [record.row(f"{options.shape} {name}", [1 / w for w in report["wall"]], "images/s")
            for name, report in reports.items()]  # fmt: skip
    for name in ("evaluation", "prediction"):
        over = interleave.ratios(reports["forward"]["wall"], reports[name]["wall"])
        what = f"{options.shape} {name}: images/s over the forward pass"
        rows.append(record.row(what, over, at_least=0.95))
    print(bench.table(rows))
    record.write(options.out, options, rows=rows, batch=batch, images=images, seconds=reports)


if __name__ == "__main__":
    main()
