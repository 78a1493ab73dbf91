"""The picture of docs/objectives.md: python benchmarks/pretraining_picture.py

Reads what benchmarks/pretraining.py wrote to benchmarks/results/pretraining_*.json.
"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
MEASURES = {"knn/accuracy": "kNN", "probe/ridge_accuracy": "linear probe (ridge)",
            "probe/sgd_accuracy": "linear probe (SGD)"}  # fmt: skip
PANELS = {
    "CIFAR-10": {
        "pixels": ("mae_cifar10", "pixels"),
        "MAE's network as drawn": ("mae_cifar10", "before"),
        "MAE": ("mae_cifar10", "after"),
        "DINO's network as drawn": ("dino_cifar10", "before"),
        "DINO": ("dino_cifar10", "after"),
    },
    "PneumoniaMNIST": {
        "pixels": ("mae_medmnist", "pixels"),
        "network as drawn": ("mae_medmnist", "before"),
        "MAE on radiographs": ("mae_medmnist", "after"),
        "MAE on CIFAR-10": ("mae_medmnist_continued", "before"),
        "MAE on CIFAR-10, then radiographs": ("mae_medmnist_continued", "after"),
    },
}


def main() -> None:
    folder = ROOT / "benchmarks" / "results"
    found = {p.stem.removeprefix("pretraining_"): json.loads(p.read_text())
             for p in folder.glob("pretraining_*.json")}  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=False)
    for axis, (title, bars) in zip(axes, PANELS.items(), strict=True):
        for index, (label, (name, kind)) in enumerate(bars.items()):
            places = [group + (index - 2) * 0.16 for group in range(len(MEASURES))]
            seeds = [[100 * v for v in found[name][kind][m]] for m in MEASURES]
            heights = [statistics.mean(values) for values in seeds]
            axis.bar(places, heights, 0.15, label=label)
            for place, values in zip(places, seeds, strict=True):
                axis.plot([place] * len(values), values, "k.", ms=3)
        low = min(min(r) for n, k in bars.values() for r in found[n][k].values())
        axis.set_ylim(bottom=100 * low - 8)
        axis.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
        axis.set(title=title, ylabel="test accuracy, % (does not begin at 0)")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "objectives.png", dpi=110)


if __name__ == "__main__":
    main()
