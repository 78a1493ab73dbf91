"""Where FSDP stops scaling, on paper: docs/weak_scaling.md and its picture.

    python benchmarks/weak_scaling.py

Weak scaling: the images a device stay the same while devices are added. For each model, device kind
and count, the least traffic of each mesh is set against its FLOPs, as `vitjax plan` does it
(`vitjax.planning.estimate`, no compiling). FSDP stops scaling where the network takes longer than
the arithmetic, so that no overlap can hide it.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vitjax import config as config_lib
from vitjax import experiment
from vitjax.errors import InputError
from vitjax.planning import estimate, search, targets

ROOT = Path(__file__).parent.parent
MODELS = {
    "B/16": ("vit_l16_jft", {"model__shape": "B/16", "model__remat": "none"}),
    "L/16": ("vit_l16_jft", {"model__remat": "dots"}),
    "g/14": ("vit_l16_jft", {"model__shape": "g/14", "model__remat": "full"}),
    "22B/14": ("vit_22b", {}),
}
IMAGES = {"B/16": 64, "L/16": 32, "g/14": 16, "22B/14": 4}  # a device
CUBES = {64: (4, 4, 4), 256: (4, 8, 8), 1024: (8, 8, 16), 4096: (16, 16, 16)}
KINDS = ("v5p", "h100")


class Described:
    """A device of a topology too large to describe to a compiler in a moment."""

    def __init__(self, index: int, target: targets.Target):
        self.id, self.slice_index, self.process_index = index, None, index // 8
        self.platform, self.device_kind = target.platform, target.kind
        if target.platform == "tpu":
            self.coords = tuple(int(i) for i in np.unravel_index(index, target.topology))


class Layout:
    """A mesh of described devices: all that the estimates ask of one."""

    def __init__(self, sizes: dict[str, int], target: targets.Target):
        devices = [Described(i, target) for i in range(target.num_devices)]
        self.shape = sizes
        self.devices = np.array(devices, dtype=object).reshape(tuple(sizes.values()))
        self.size = target.num_devices


def make_target(kind: str, count: int) -> targets.Target:
    name = f"{kind}, {count}"
    if kind == "h100":
        return targets.Target(name, "gpu", kind, (count // 8, 8))
    return targets.Target(name, "tpu", kind, CUBES[count])


def estimated(name: str, target: targets.Target, sizes: dict[str, int]) -> estimate.Roofline:
    """The roofline of one mesh; the sharding is made on virtual devices."""
    shipped, changes = MODELS[name]
    config = config_lib.load_config(shipped)
    batch = IMAGES[name] * target.num_devices
    config = search.changed(config, batch_size=batch, precision__compute="bfloat16", **changes)
    exp = experiment.build(search.changed(config, mesh=sizes), devices=abstract(sizes))
    return estimate.roofline(exp, target, estimate.least_collectives(exp), Layout(sizes, target))


def abstract(sizes: dict[str, int]) -> list:
    import jax

    return jax.devices()[: int(np.prod(list(sizes.values())))]


def shown(sizes: dict[str, int]) -> str:
    return " x ".join(str(n) for n in sizes.values())


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", max(CUBES))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    rows = []
    for axis, kind in zip(axes, KINDS, strict=True):
        for name in MODELS:
            ratios = []
            for count in CUBES:
                target = make_target(kind, count)
                pure = {"replica": 1, "fsdp": count, "tensor": 1}
                found = estimated(name, target, pure)
                ratios.append(found.network / found.compute)
                best, winner = found, pure
                for inner in (64, 256):
                    for tensor in (1, 2, 4, 8):
                        if count % (inner * tensor):
                            continue
                        sizes = {"replica": count // inner // tensor, "fsdp": inner,
                                 "tensor": tensor}  # fmt: skip
                        try:
                            other = estimated(name, target, sizes)
                        except InputError:  # heads that the tensor axis does not divide
                            continue
                        if other.network < 0.98 * best.network:
                            best, winner = other, sizes
                rows.append((kind, name, count, found, best, winner))
                print(kind, name, count, f"{ratios[-1]:.2f}", winner, flush=True)
            axis.plot(
                list(CUBES), ratios, marker="o", label=f"{name}, {IMAGES[name]} images a device"
            )
        axis.axhline(1, color="black", lw=0.8)
        axis.set(
            xscale="log", yscale="log", xlabel="devices", title=f"{kind}, FSDP over all devices"
        )
        axis.set_xticks(list(CUBES), [str(n) for n in CUBES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("network time / compute time")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "weak_scaling.png", dpi=110)
    table = "".join(
        f"| {kind} | {name} | {count:,} | {1e3 * found.compute:.0f} | {1e3 * found.network:.0f} "
        f"| {found.network / found.compute:.2f} "
        f"| {IMAGES[name] * found.network / found.compute:.1f} of {IMAGES[name]} | {shown(winner)} "
        f"| {best.network / best.compute:.2f} |\n"
        for kind, name, count, found, best, winner in rows
    )
    page = ROOT / "docs" / "weak_scaling.md"
    text = page.read_text()
    start, end = text.index("<!-- table -->\n") + 15, text.index("<!-- end -->")
    page.write_text(text[:start] + table + text[end:])


if __name__ == "__main__":
    main()
