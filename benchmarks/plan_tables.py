"""Writes docs/plans.md: the shipped configs planned for the usual pods.

    python benchmarks/plan_tables.py

Each line is `vitjax plan` in a process of its own, low effort; all numbers go to
benchmarks/results/plans.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
G14 = ["--config=vit_l16_jft", "--config.model.shape=g/14", "--config.model.remat=full"]
CASES = [
    ("vit_b16_i21k", "B/16", ["--config=vit_b16_i21k"],
     ["tpu:v5e:8x8", "tpu:v5p:4x4x4", "gpu:h100:1x8x8"]),
    ("vit_l16_jft", "L/16", ["--config=vit_l16_jft"],
     ["tpu:v5e:8x8", "tpu:v5p:4x4x4", "gpu:h100:1x8x8"]),
    ("vit_l16_jft, g/14", "g/14", G14, ["tpu:v5e:8x16", "tpu:v5p:4x4x8", "gpu:h100:1x16x8"]),
    ("vit_22b", "22B/14", ["--config=vit_22b", "--config.batch_size=4096"],
     ["tpu:v5e:16x16", "tpu:v5p:8x8x16", "gpu:h100:1x32x8", "gpu:h100:1x128x8"]),
]  # fmt: skip
HEAD = """# The shipped configs on the usual pods

Made by `python benchmarks/plan_tables.py`, from the compiled programs and data-sheet speeds; nothing
here was measured on an accelerator, and the comparison of these peaks with a device's own statement is
still owed. Step, images/s and MFU are the span from "nothing overlaps" to "everything does". "Traffic"
is what a device sends in a step, beside the least that the sharding needs.

| config | target | devices: replica x fsdp x tensor | batch | state a device | peak (free) | traffic (over least) | binds | images/s | MFU | hours, whole run |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def line(name: str, plan: dict) -> str:
    gb = 1e9
    mesh = " x ".join(str(n) for n in plan["mesh"].values())
    moved = sum(n for *_, n in plan["collectives"])
    least = sum(n for *_, n in plan["least"])
    run, state = plan["run"], sum(plan["state"].values())
    return (
        f"| {name} | {plan['target']} | {plan['num_devices']}: {mesh} | {plan['batch_size']:,} "
        f"| {state / gb:.3f} GB | {plan['memory']['peak'] / gb:.1f} GB ({plan['headroom']:.0%}) "
        f"| {moved / gb:.2f} GB ({moved / least:.2f}) | {plan['roofline']['binds']} "
        f"| {run['images_per_second_low']:,.0f} to {run['images_per_second_high']:,.0f} "
        f"| {run['mfu_low']:.0%} to {run['mfu_high']:.0%} "
        f"| {run['hours_low']:,.0f} to {run['hours_high']:,.0f} |\n"
    )


def main() -> None:
    plans, text = [], HEAD
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        for name, _, words, names in CASES:
            for target in names:
                command = [sys.executable, "-m", "vitjax", "plan", *words, f"--target={target}"]
                subprocess.run([*command, f"--json={out}"], check=True, stdout=subprocess.DEVNULL)
                plans.append(json.loads(out.read_text()))
                text += line(name, plans[-1])
                print(line(name, plans[-1]), end="", flush=True)
    (ROOT / "docs" / "plans.md").write_text(text)
    results = ROOT / "benchmarks" / "results" / "plans.json"
    results.write_text(json.dumps(plans, indent=1) + "\n")


if __name__ == "__main__":
    main()
