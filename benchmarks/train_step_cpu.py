"""The training step on CPUs beside PyTorch eager and a plain nnx ViT: forward, backward, AdamW.

    python benchmarks/train_step_cpu.py [--shape S/16] [--batch 8] [--rounds 10]

Every competitor trains the same shapes in float32 on all cores, in turn. Needs torch for its row.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import interleave

CLASSES, SIZE = 1000, 224


def run_vitjax(shape: str, batch: int, scan: bool) -> None:
    from vitjax import cpu

    cpu.keep_freed_memory()
    import jax
    import numpy as np

    from vitjax import config as config_lib
    from vitjax import experiment, parallel

    config = config_lib.base_config()
    config.batch_size = batch
    config.model.update(shape=shape, scan=scan)
    config.optimizer.update(clip_norm=None, weight_decay=1e-4)
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    exp = experiment.build(config)
    step, state = exp.compile(), exp.fresh_state()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, batch).astype(np.int32)
    data = parallel.to_global({"images": images, "labels": labels}, exp.mesh, len(images))

    def work():
        nonlocal state
        state, metrics = step(state, data)
        jax.block_until_ready((state, metrics))

    interleave.serve(work)


def run_torch(shape: str, batch: int) -> None:
    import torch
    from torch import nn

    from vitjax.models.shapes import parse_shape

    s, patch = parse_shape(shape)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(s.width, 1e-6), nn.LayerNorm(s.width, 1e-6)
            self.qkv, self.out = nn.Linear(s.width, 3 * s.width), nn.Linear(s.width, s.width)
            self.up, self.down = nn.Linear(s.width, s.mlp_dim), nn.Linear(s.mlp_dim, s.width)

        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, s.num_heads, d // s.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
            hidden = nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, s.width, patch, patch)
            self.positions = nn.Parameter(torch.zeros(1, (SIZE // patch) ** 2, s.width))
            self.blocks = nn.Sequential(*[Block() for _ in range(s.depth)])
            self.norm, self.head = nn.LayerNorm(s.width, 1e-6), nn.Linear(s.width, CLASSES)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.blocks(x)).mean(1))

    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch,))

    def work():
        optimizer.zero_grad()
        x = (images.float() / 255 - 0.5) / 0.5
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    interleave.serve(work)


def run_nnx(shape: str, batch: int) -> None:
    """A ViT as the Flax documentation writes one: nnx layers, a list of blocks, nnx.jit."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from vitjax.models.shapes import parse_shape

    s, patch = parse_shape(shape)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1 = nnx.LayerNorm(s.width, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(s.num_heads, s.width, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(s.width, rngs=rngs)
            self.up = nnx.Linear(s.width, s.mlp_dim, rngs=rngs)
            self.down = nnx.Linear(s.mlp_dim, s.width, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class ViT(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Conv(
                3, s.width, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs
            )
            self.positions = nnx.Param(jnp.zeros((1, (SIZE // patch) ** 2, s.width)))
            self.blocks = nnx.List([Block(rngs) for _ in range(s.depth)])
            self.norm = nnx.LayerNorm(s.width, rngs=rngs)
            self.head = nnx.Linear(s.width, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x)
            x = x.reshape(x.shape[0], -1, s.width) + self.positions[...]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    model = ViT(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, CLASSES, batch))

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            logits = model((images / 255.0 - 0.5) / 0.5)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    def work():
        jax.block_until_ready((step(model, optimizer, images, labels), nnx.state(model)))

    interleave.serve(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S/16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="", help="a JSON file for the numbers")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    workers = {
        "vitjax scanned": lambda: run_vitjax(options.shape, options.batch, True),
        "vitjax unrolled": lambda: run_vitjax(options.shape, options.batch, False),
        "plain nnx": lambda: run_nnx(options.shape, options.batch),
        "torch eager": lambda: run_torch(options.shape, options.batch),
    }
    if options.worker:
        workers[options.worker]()
        return
    if importlib.util.find_spec("torch") is None:
        del workers["torch eager"]
        print("torch is not installed: its row is left out", file=sys.stderr)
    base = [sys.executable, __file__, f"--shape={options.shape}", f"--batch={options.batch}"]
    reports = interleave.compare({k: [*base, f"--worker={k}"] for k in workers}, options.rounds)
    print(f"{options.shape}, batch {options.batch}, {SIZE} px, float32, one training step")
    print(interleave.table(reports, list(workers)[-1]))
    if options.out:
        Path(options.out).write_text(json.dumps(vars(options) | {"reports": reports}, indent=1))


if __name__ == "__main__":
    main()
