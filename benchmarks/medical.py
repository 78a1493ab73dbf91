"""What the statistics of a transfer report cost, beside scikit-learn on the same numbers.

    python benchmarks/medical.py [--rounds 5] [--data pneumoniamnist.npz]

Two units of work, each done by both sides in turn, in CPU-seconds of processes that are warm:

bootstrap  2,000 resamples of groups of a 20,000-case AUROC (7,000 groups); scikit-learn's
           roc_auc_score does 20 of them, and that is scaled up
probe      logistic regressions on the features of PneumoniaMNIST by a ViT-S (384 numbers), at seven
           penalties, the best by validation AUROC; without the file, as many made-up features
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import numpy as np
from interleave import compare, serve

CASES, GROUPS, RESAMPLES, PEER_RESAMPLES = 20_000, 7_000, 2000, 20
WIDTH = 384


def make_scores():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, GROUPS, CASES).astype(str)
    labels = rng.integers(0, 2, CASES).astype(float)
    return labels, labels + rng.normal(size=CASES), groups


def bootstrap_ours():
    from vitjax.medical.metrics.intervals import auroc_interval

    labels, scores, groups = make_scores()
    return lambda: auroc_interval(labels, scores, groups, num=RESAMPLES)


def bootstrap_peer():
    from sklearn.metrics import roc_auc_score

    labels, scores, groups = make_scores()
    names, codes = np.unique(groups, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(names) + 1))
    rng = np.random.default_rng(0)

    def work():
        for _ in range(PEER_RESAMPLES):
            drawn = rng.integers(0, len(names), len(names))
            rows = np.concatenate([order[starts[g] : starts[g + 1]] for g in drawn])
            roc_auc_score(labels[rows], scores[rows])

    return work


def make_features(path):
    """Features, labels and splits of the file, by a ViT-S/4 as it is drawn."""
    import jax

    from vitjax.medical.readers.medmnist import medmnist
    from vitjax.models.vit import vit

    cohort = medmnist(path)
    model = vit(image_size=28, channels=1, num_classes=0, shape="S/4")
    params = model.init(jax.random.key(0))
    run = jax.jit(lambda x: model.apply(params, x)["embedding"])
    images = np.stack([cohort.images[i] for i in range(len(cohort))])
    images = images.reshape(len(cohort), 28, 28, 1).astype(np.float32) / 255 - 0.5
    parts = [np.asarray(run(images[i : i + 64])) for i in range(0, len(images), 64)]
    return np.concatenate(parts), cohort


def probe_ours(folder):
    from vitjax.medical import probes

    x, cohort = load(folder)
    train, val = cohort.rows("train"), cohort.rows("val")
    return lambda: probes.linear(x, cohort, train, val)


def probe_peer(folder):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    from vitjax.medical.probes import PENALTIES

    x, cohort = load(folder)
    labels = cohort.labels["class"]
    train, val = cohort.rows("train"), cohort.rows("val")

    def work():
        scaled = StandardScaler().fit(x[train]).transform(x)
        for penalty in sorted(PENALTIES, reverse=True):
            made = LogisticRegression(C=1 / (penalty * len(train)), max_iter=500)
            made.fit(scaled[train], labels[train])
            roc_auc_score(labels[val], made.decision_function(scaled[val]))

    return work


def load(folder):
    from vitjax.medical.readers.medmnist import medmnist

    with np.load(folder / "features.npz") as file:
        return file["x"], medmnist(str(file["path"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="pneumoniamnist.npz")
    parser.add_argument("--out", default="benchmarks/results/medical.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        folder = [Path(arguments.folder)] if arguments.work.startswith("probe") else []
        serve(globals()[arguments.work](*folder))
        return
    works = ["bootstrap_ours", "bootstrap_peer"]
    folder = Path(arguments.out).parent / "medical.tmp"
    if arguments.data:
        folder.mkdir(exist_ok=True)
        np.savez(folder / "features.npz", x=make_features(arguments.data)[0], path=arguments.data)
        works += ["probe_ours", "probe_peer"]
    command = [sys.executable, __file__, f"--folder={folder}"]
    reports = compare({w: [*command, f"--work={w}"] for w in works}, arguments.rounds)
    scale = {"bootstrap_peer": RESAMPLES / PEER_RESAMPLES}
    seconds = {w: [v * scale.get(w, 1) for v in reports[w]["cpu"]] for w in works}
    medians = {w: statistics.median(v) for w, v in seconds.items()}
    for work, values in seconds.items():
        print(f"{work:16} {medians[work]:9.2f} CPU-s  ({min(values):.2f} to {max(values):.2f})")
    for name in ("bootstrap", "probe"):
        if f"{name}_ours" in medians:
            ratio = medians[f"{name}_peer"] / medians[f"{name}_ours"]
            print(f"{name}: scikit-learn takes {ratio:.1f} times as long")
    import sklearn

    facts = {"python": platform.python_version(), "numpy": np.__version__}
    facts |= {"scikit-learn": sklearn.__version__, "processor": platform.machine()}
    result = {"versions": facts, "cpu_seconds": seconds, "medians": medians}
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    if folder.is_dir():
        (folder / "features.npz").unlink()
        folder.rmdir()


if __name__ == "__main__":
    main()
