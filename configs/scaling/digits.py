"""A scaling law of handwritten digits (scikit-learn's, 8x8, embedded): the whole loop in minutes.

    vitjax sweep plan --config=scaling/digits --workdir=runs/sweep
    vitjax sweep run --workdir=runs/sweep --workers=2

Runs on: two CPU cores, in two to three minutes for the 21 runs to fit; one more for the hold-out.
Expected: at each budget a best size inside the range: about 2,000 parameters at 2e9 training FLOPs
(test loss 1.4), 3,000 at 8e9 (0.6) and 4,000 at 3.2e10 (0.2). Run by us. The 1,437 images are seen
up to 350 times, shifted, and 360 test images give a loss to a few percent: a law of this set alone.
"""

from vitjax.config import base_config
from vitjax.sweep.config import base_sweep


def get_sweep():
    train = base_config()
    train.log_every = 50
    train.model.update(patch_size=2, num_classes=10, positions="learned", scan=False)
    digits = "vitjax.data.sources.arrays:Digits"
    train.data.source = {"target": digits, "split": "train"}
    train.data.update(image_size=8, channels=1, mean=(0.3,), std=(0.38,), num_threads=1)
    train.augment = ({"target": "vitjax.data.augment:RandomShift", "pixels": 1},)
    train.optimizer.weight_decay = 0.05
    train.optimizer.algorithm.b2 = 0.99
    train.evals.test = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": digits, "split": "test"},
        "batch_size": 360,
    }

    sweep = base_sweep(train)
    sweep.num_images = 1437
    sweep.shapes.update(widths=(4, 64), width_multiple=4, depths=(2, 3, 4), head_dim=8)
    sweep.shapes.width_per_depth = 16.0
    sweep.isoflop.update(budgets=(2e9, 8e9, 3.2e10), sizes=5, spread=3.0)
    sweep.isoflop.guess.update(params=3000.0, flops=8e9, exponent=0.3)
    sweep.lr.update(peak=1e-2, params=3000.0, exponent=0.4)
    sweep.batch.size = 32
    sweep.trunks.warmup_images = 640
    sweep.seeds.extra = (1, 2)
    # The largest budget is a third of the fit; what is held out must be four times as large.
    sweep.holdout.update(factors=(4.0,), sizes=1, seeds=(0, 1), share=0.6)
    return sweep
