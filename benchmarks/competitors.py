"""The training steps that train_step.py compares: the same shapes, each in a process of its own.

All take uint8 images of 224 pixels that lie on the device, normalise them, and run forward,
backward and AdamW on float32 weights; without clipping, mean over patch tokens, 1,000 classes.
Compute is float32 on CPUs and bfloat16 on accelerators (torch: autocast).
"""

import functools
from collections.abc import Callable
from typing import Any

import interleave

CLASSES, SIZE = 1000, 224
MAE = {"target": "vitjax.objectives.mae:MAE", "mask_ratio": 0.75}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory", "CUBLAS_STATUS_ALLOC_FAILED")


def jax_serve(
    work: Callable[[], Any], batch: int, flops: float, seconds: float | None = None
) -> None:
    """Serves a step of JAX's: alone on CPUs, several sent off at once on accelerators."""
    import jax

    from vitjax.devices import peak_flops

    device = jax.devices()[0]
    peak, source = peak_flops(device)
    last: Any = None

    def run():
        nonlocal last
        last = work()
        if device.platform == "cpu":
            jax.block_until_ready(last)

    def memory() -> dict[str, float]:
        stats = device.memory_stats()  # None on CPUs
        return {"peak_mib": stats["peak_bytes_in_use"] / 2**20} if stats else {}

    about = {"batch": batch, "flops_per_image": flops, "device": device.device_kind}
    about |= {"peak_flops": peak, "peak_source": source}
    interleave.serve(
        run, wait=lambda: jax.block_until_ready(last), seconds=seconds, about=about, more=memory
    )


def flops_per_image(shape: str) -> int:
    """Of a training step with labels, as vitjax counts them."""
    from vitjax.models.shapes import Geometry, count_flops, parse_shape

    sizes, patch = parse_shape(shape)
    return 3 * count_flops(Geometry(sizes, patch, SIZE, 3, CLASSES))


def run_vitjax(
    shape: str, batch: int, seconds: float | None, *, mae: bool = False, scan: bool | None = None
) -> None:
    """The step of `vitjax train` with its defaults, on the first device."""
    from vitjax import cpu

    cpu.keep_freed_memory()
    import jax
    import numpy as np

    from vitjax import config as config_lib
    from vitjax import experiment, parallel

    config = config_lib.base_config()
    config.batch_size = batch
    config.model.shape = shape
    if scan is not None:
        config.model.scan = scan
    if mae:
        config.model.update(num_classes=0, positions="sincos2d")
        with config.ignore_type():
            config.objective = MAE
    config.optimizer.update(clip_norm=None, weight_decay=1e-4)
    exp = experiment.build(config, devices=jax.devices()[:1])
    step, state = exp.compile(), exp.fresh_state()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, batch).astype(np.int32)
    data = parallel.to_global({"images": images, "labels": labels}, exp.mesh, len(images))

    def work():
        nonlocal state
        state, metrics = step(state, data)
        return state, metrics

    jax_serve(work, batch, exp.objective.flops_per_image, seconds)


def run_nnx(shape: str, batch: int, seconds: float | None) -> None:
    """A ViT as the Flax documentation writes one: nnx layers, a list of blocks, nnx.jit."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from vitjax.models.shapes import parse_shape

    s, patch = parse_shape(shape)
    dtype = None if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    norm = functools.partial(nnx.LayerNorm, s.width, dtype=dtype)
    linear = functools.partial(nnx.Linear, dtype=dtype)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = norm(rngs=rngs), norm(rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                s.num_heads, s.width, decode=False, dtype=dtype, rngs=rngs
            )
            self.up = linear(s.width, s.mlp_dim, rngs=rngs)
            self.down = linear(s.mlp_dim, s.width, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class ViT(nnx.Module):
        def __init__(self, rngs):
            kernel = (patch, patch)
            self.embed = nnx.Conv(
                3, s.width, kernel, strides=kernel, padding="VALID", dtype=dtype, rngs=rngs
            )
            self.positions = nnx.Param(jnp.zeros((1, (SIZE // patch) ** 2, s.width)))
            self.blocks = nnx.List([Block(rngs) for _ in range(s.depth)])
            self.norm = norm(rngs=rngs)
            self.head = linear(s.width, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x)
            x = x.reshape(x.shape[0], -1, s.width) + self.positions[...].astype(x.dtype)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1)).astype(jnp.float32)

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
        return step(model, optimizer, images, labels), nnx.state(model)

    jax_serve(work, batch, flops_per_image(shape), seconds)


def torch_vit(shape: str) -> Any:
    """A ViT of torch's own layers: SDPA, one matrix product for queries, keys and values."""
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

    return ViT()


def timm_vit(shape: str) -> Any:
    """timm's ViT at the same sizes, without a class token."""
    import timm

    from vitjax.models.shapes import parse_shape

    s, patch = parse_shape(shape)
    return timm.models.VisionTransformer(
        img_size=SIZE, patch_size=patch, embed_dim=s.width, depth=s.depth, num_heads=s.num_heads,
        mlp_ratio=(s.mlp_dim + 0.5) / s.width,  # it rounds the product down
        num_classes=CLASSES, class_token=False, global_pool="avg", act_layer="gelu_tanh",
    )  # fmt: skip


def run_torch(
    shape: str, batch: int, seconds: float | None, make: Callable[[str], Any], compiled: bool
) -> None:
    """Eager, or compiled with max-autotune: model and loss as one graph, fused AdamW."""
    import torch

    from vitjax.devices import PEAK_FLOPS

    is_cuda = torch.cuda.is_available()
    place = torch.device("cuda" if is_cuda else "cpu")
    if is_cuda:
        torch.set_float32_matmul_precision("high")
    model = make(shape).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=is_cuda)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, device=place)
    labels = torch.randint(0, CLASSES, (batch,), device=place)

    def loss(images, labels):
        x = (images.float() / 255 - 0.5) / 0.5
        with torch.autocast(place.type, torch.bfloat16, enabled=is_cuda):
            logits = model(x)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    if compiled:
        loss = torch.compile(loss, mode="max-autotune")

    def work():
        if compiled and is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        loss(images, labels).backward()
        optimizer.step()

    def memory() -> dict[str, float]:
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if is_cuda else {}

    kind = torch.cuda.get_device_name() if is_cuda else "cpu"
    about = {"batch": batch, "flops_per_image": flops_per_image(shape), "device": kind}
    if kind in PEAK_FLOPS:
        about |= {"peak_flops": PEAK_FLOPS[kind], "peak_source": "data sheet"}
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    interleave.serve(work, wait=wait, seconds=seconds, about=about, more=memory)


# Each takes a shape, a batch size, and the seconds of a window, None for single steps.
COMPETITORS: dict[str, Callable[[str, int, float | None], None]] = {
    "vitjax": run_vitjax,
    "torch.compile": functools.partial(run_torch, make=torch_vit, compiled=True),
    "vitjax MAE": functools.partial(run_vitjax, mae=True),
    "vitjax scanned": functools.partial(run_vitjax, scan=True),
    "vitjax unrolled": functools.partial(run_vitjax, scan=False),
    "plain nnx": run_nnx,
    "torch eager": functools.partial(run_torch, make=torch_vit, compiled=False),
    "timm compiled": functools.partial(run_torch, make=timm_vit, compiled=True),
}
