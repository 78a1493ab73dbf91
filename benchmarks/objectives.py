"""What objectives without labels cost: MAE and DINO beside the bare encoder, contrastive memory.

    python benchmarks/objectives.py [--shape S/16] [--batch 8] [--rounds 10] [--out FILE.json]

Time, in turn, each a whole training step at 224 pixels in float32 (forward, backward, AdamW): the
encoder on every patch; the same on the quarter that MAE at 75% leaves visible; MAE, with a decoder
of half the encoder's width and two layers and with the published one (512 wide, 8 layers); DINOv2
with two crops of 224 and eight of 96 pixels. Beside each what its FLOPs imply. Before that the
memory of the contrastive loss, compiled for 1 to 8 devices at several local batches.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import interleave
import record

SIZE = 224
CROPS = {"global_size": SIZE, "local_size": 96, "num_local": 8}
WHOLE, VISIBLE, LIGHT, PUBLISHED, DINO = (
    "encoder, every patch", "encoder, visible quarter", "MAE, light decoder",
    "MAE, 512 x 8 decoder", "DINO, 2 and 8 crops",
)  # fmt: skip
WORKERS = (WHOLE, VISIBLE, LIGHT, PUBLISHED, DINO)


def make_encoder(model: Any, kept: int | None = None):
    """An objective that only asks for the tokens: the encoder's own cost."""
    from vitjax.models.shapes import count_flops
    from vitjax.objectives.masking import draw_masking
    from vitjax.objectives.objective import Objective

    @dataclasses.dataclass(frozen=True)
    class Encoder(Objective):
        kept: int | None

        @property
        def flops_per_image(self) -> int:
            return 3 * count_flops(dict(self.model.arguments)["geometry"], kept=self.kept)

        def init(self, key, batch):
            return self.model.init(key), {}

        def loss(self, params, extra, batch, key):
            images = batch["images"]
            keep = {}
            if self.kept:
                patches = dict(self.model.arguments)["geometry"].num_patches
                keep["keep"] = draw_masking(key, len(images), patches, self.kept).keep
            seen = self.model.apply(params, images, key, **keep)
            return (seen["tokens"] ** 2).mean(), (extra, {})

    return Encoder(model, kept)


def make_config(name: str, shape: str, batch: int):
    from vitjax import config as config_lib
    from vitjax.models.shapes import parse_shape

    sizes, patch = parse_shape(shape)
    width, visible = sizes.width, (SIZE // patch) ** 2 // 4
    config = config_lib.base_config()
    config.batch_size = batch
    config.model.update(shape=shape, num_classes=0, positions="sincos2d", scan=False)
    config.optimizer.update(clip_norm=None, weight_decay=0.05)
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    mae = {"target": "vitjax.objectives.mae:MAE", "mask_ratio": 0.75}
    light = {"width": width // 2, "depth": 2, "num_heads": max(width // 128, 1)}
    with config.ignore_type():
        config.objective = {
            WHOLE: {"target": f"{Path(__file__).stem}:make_encoder"},
            VISIBLE: {"target": f"{Path(__file__).stem}:make_encoder", "kept": visible},
            LIGHT: mae | {"decoder": light},
            PUBLISHED: mae | {"decoder": {"width": 512, "depth": 8, "num_heads": 16}},
            DINO: {"target": "vitjax.objectives.dino:DINO",
                   "head": {"prototypes": 8192, "hidden": 1024, "bottleneck": 256}} | CROPS,
        }[name]  # fmt: skip
    if name == DINO:
        config.model.update(pool="cls", mask_token=True, positions="learned")
        crop = {"target": "vitjax.data.multicrop:MultiCrop"} | CROPS
        config.augment = (crop,)
    return config


def run_step(name: str, shape: str, batch: int) -> None:
    from vitjax import cpu

    cpu.keep_freed_memory()
    import jax
    import numpy as np

    from vitjax import experiment, parallel

    exp = experiment.build(make_config(name, shape, batch))
    step, state = exp.compile(), exp.fresh_state()
    images = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.zeros(batch, np.int32)
    data = parallel.to_global({"images": images, "labels": labels}, exp.mesh, batch)

    def work():
        nonlocal state
        state, metrics = step(state, data)
        jax.block_until_ready((state, metrics))

    interleave.serve(work)


def flops(name: str, shape: str, batch: int) -> dict[str, float]:
    """GFLOPs of a step an image: as the planner counts them, and as XLA counts the program."""
    import jax

    from vitjax import experiment, parallel

    exp = experiment.build(make_config(name, shape, batch))
    step = jax.jit(parallel.on_mesh(exp.train_step, exp.mesh))
    lowered = step.lower(exp.state_target, exp.abstract_batch)
    written = lowered.cost_analysis()["flops"]
    counted = exp.objective.flops_per_image
    return {"counted": counted / 1e9, "written": written / batch / 1e9}


def contrastive_memory(devices: int, batch: int, is_whole: bool) -> float:
    """MiB of temporary memory on a device: the sigmoid loss and all its gradients, width 768."""
    import jax
    import jax.numpy as jnp

    from vitjax import parallel
    from vitjax.objectives.pairwise import Pairs, pair_loss

    mesh = parallel.make_mesh({"replica": 1, "fsdp": devices, "tensor": 1})
    split, one = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    part = jax.ShapeDtypeStruct((devices * batch, 768), jnp.float32, sharding=split)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=one)
    chunked = Pairs("sigmoid", 256, mesh)

    def whole(images, texts, scale, bias):
        images = jax.lax.with_sharding_constraint(images, split)
        texts = jax.lax.with_sharding_constraint(texts, one)
        signs = 2 * jnp.eye(len(images)) - 1
        return -jax.nn.log_sigmoid(signs * (images @ texts.T * scale + bias)).sum() / len(images)

    def loss(*given):
        return whole(*given) if is_whole else pair_loss(chunked, *given)[0]

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    compiled = run.lower(part, part, number, number).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S/16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker in WORKERS:
        run_step(options.worker, options.shape, options.batch)
        return
    if options.worker == "flops":
        found = {name: flops(name, options.shape, 2) for name in WORKERS}
        print(json.dumps(found))
        return
    if options.worker:
        print(json.dumps(contrastive_memory(*json.loads(options.worker))))
        return

    base = [sys.executable, __file__, f"--shape={options.shape}", f"--batch={options.batch}"]

    def ask(worker: str, **environment: str):
        done = subprocess.run([*base, f"--worker={worker}"], check=True, text=True,
                              stdout=subprocess.PIPE, env=os.environ | environment)  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    memory = {}
    for devices in (1, 2, 8):
        count = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        for batch in (256, 512, 1024, 2048):
            for is_whole in (False, True):
                key = f"{'whole' if is_whole else 'chunked'}, {devices} devices, {batch} pairs each"
                memory[key] = ask(json.dumps([devices, batch, is_whole]), **count)
                print(f"{key}: {memory[key]:.1f} MiB a device", flush=True)

    counts = ask("flops")
    commands = {name: [*base, f"--worker={name}"] for name in WORKERS}
    reports = interleave.compare(commands, options.rounds)
    print(f"{options.shape}, batch {options.batch}, {SIZE} px, float32, one training step")
    print(interleave.table(reports, WHOLE))
    print(f"\n{'':24} {'GFLOP':>8} {'by XLA':>8} {'times faster':>13} {'implied':>8}")
    for name, found in counts.items():
        walls = zip(reports[WHOLE]["wall"], reports[name]["wall"], strict=True)
        faster = statistics.median(a / b for a, b in walls)
        implied = counts[WHOLE]["counted"] / found["counted"]
        print(f"{name:24} {found['counted']:8.1f} {found['written']:8.1f} {faster:13.2f} "
              f"{implied:8.2f}")  # fmt: skip
    rows = []
    for name in (LIGHT, PUBLISHED, DINO):
        faster = interleave.ratios(reports[WHOLE]["wall"], reports[name]["wall"])
        rows.append(record.row(f"{options.shape} {name}: times faster than the encoder", faster))
    record.write(options.out, options, rows=rows, reports=reports, gflops=counts,
                 contrastive_mib=memory)  # fmt: skip


if __name__ == "__main__":
    main()
