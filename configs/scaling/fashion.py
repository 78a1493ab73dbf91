"""A scaling law of Fashion-MNIST (28x28, 49 tokens), with a tested prediction and a known floor.

    vitjax sweep plan --config=scaling/fashion --workdir=runs/fashion
    vitjax sweep run --workdir=runs/fashion --workers=2
    vitjax scaling freeze --workdir=runs/fashion
    vitjax sweep run --workdir=runs/fashion --workers=2 --stage=holdout
    vitjax scaling report --workdir=runs/fashion

The data: the four idx files, by default where Debian's package dataset-fashion-mnist puts them;
elsewhere --sweep.train.data.root=FOLDER in the first command.
Runs on: two CPU cores, in 16 minutes for the 52 runs to fit and 6 for the 4 held out, with other
work on the same cores.
Expected: best sizes of about 2,100 to 3,300 parameters, with test losses of 1.28, 0.97, 0.75 and
0.60; at 4 and 10 times the compute 0.483 and 0.448 predicted, 0.506 and 0.478 measured (means of
two seeds). Run by us: docs/scaling.md.

The sizes are smaller than elsewhere because they were measured first: 60,000 images, seen up to
four times, teach so little that from 10,000 parameters on a model is too large for these budgets.
"""

from vitjax.config import base_config
from vitjax.sweep.config import arm, base_sweep

ROOT = "/usr/share/datasets/fashion-mnist"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "ankle boot")  # fmt: skip


def get_sweep():
    train = base_config()
    train.log_every = 50
    train.model.update(patch_size=4, num_classes=10, positions="learned", scan=False)
    train.data.root = ROOT
    idx = {
        "target": "vitjax.data.sources.idx:Idx",
        "root": train.data.get_ref("root"),
        "class_names": NAMES,
    }
    train.data.source = idx | {
        "images": "train-images-idx3-ubyte.gz",
        "labels": "train-labels-idx1-ubyte.gz",
    }
    train.data.update(image_size=28, channels=1, mean=(0.286,), std=(0.353,), num_threads=1)
    # Moved and mirrored, an image is worth seeing again: up to four epochs.
    train.augment = (
        {"target": "vitjax.data.augment:RandomShift", "pixels": 2},
        {"target": "vitjax.data.augment:RandomFlip"},
    )
    train.optimizer.weight_decay = 0.05
    train.optimizer.algorithm.b2 = 0.99
    train.evals.test = {
        "target": "vitjax.evals.classification:Classification",
        "source": idx
        | {"images": "t10k-images-idx3-ubyte.gz", "labels": "t10k-labels-idx1-ubyte.gz"},
        "batch_size": 500,
    }

    sweep = base_sweep(train)
    sweep.num_images = 60_000
    # Every width from 4 to 48, at depth 2, so that the sizes differ in one number alone.
    sweep.shapes.update(widths=(4, 48), width_multiple=2, depths=(2,), head_dim=8)
    sweep.isoflop.update(budgets=(6e9, 1.8e10, 5.4e10, 1.62e11), sizes=6, spread=2.5)
    sweep.isoflop.guess.update(params=2000.0, flops=2e10, exponent=0.45)
    sweep.isoflop.max_epochs = 4.0
    sweep.lr.update(peak=1e-2, params=3000.0, exponent=0.4)
    sweep.lr.update(check_factors=(0.5, 1.0, 2.0), check_params=(2000.0, 8000.0))
    sweep.batch.size = 32
    sweep.trunks.warmup_images = 320
    sweep.seeds.update(every=(0,), extra=(1, 2))
    sweep.arms.noise = arm(label_noise=0.2, sizes=4)
    # The fit is so cheap that no run of 4 times its largest budget fits in 20% of all FLOPs.
    sweep.holdout.update(factors=(4.0, 10.0), sizes=1, seeds=(0, 1), share=0.9)
    return sweep
