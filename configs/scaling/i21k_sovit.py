"""The star sweep of "Getting ViT in Shape" (arXiv 2305.13035) on ImageNet-21k.

    vitjax sweep plan --config=scaling/i21k_sovit --workdir=runs/sovit --target=tpu:v5p:8x8x8
    vitjax sweep run --workdir=runs/sovit --array=k8s

The data: a folder for each of the 21,843 classes under `train` and under `val` (hold some out),
given to the first command as --sweep.train.data.root=/data/imagenet21k.
Runs on: 64 or more accelerators a run. Planned by us, not run by us.
Expected: exponents of width, depth and MLP near 0.22, 0.45 and 0.60, as published for JFT-3B;
nothing is published for ImageNet-21k. Centre and grid are the paper's; its runs saw up to billions
of new images, these see 14 million again and again.
"""

from vitjax.config import load_config
from vitjax.sweep.config import base_sweep

IMAGES = 14_197_122


def get_sweep():
    train = load_config("vit_b16_i21k").unlock()
    train.model.update(shape=None, patch_size=14, pool="map", remat="full")
    train.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.05},
    )
    train.optimizer.algorithm = {"target": "vitjax.optim:scale_by_adafactor"}

    sweep = base_sweep(train)
    sweep.num_images = IMAGES
    sweep.budget.target = "tpu:v5p:8x8x8"
    sweep.star.centre = (1968, 40, 6144)
    sweep.star.widths = (608, 768, 928, 1088, 1328, 1648)
    sweep.star.depths = (8, 10, 12, 16, 20, 24)
    sweep.star.mlp_dims = (1088, 1360, 1728, 2160, 2592, 3072)
    sweep.star.images = (3 * IMAGES, 10 * IMAGES, 30 * IMAGES)
    # The hold-out run is the centre scaled up: twice its size for twice as long.
    sweep.isoflop.budgets = ()
    sweep.isoflop.guess.update(params=1.9e9, flops=1.3e21, exponent=0.5)
    sweep.shapes.update(widths=(1024, 3072), width_multiple=128, width_per_depth=49.0)
    sweep.shapes.update(depths=(24, 32, 40, 48, 56), mlp_ratio=3.125)
    sweep.lr.update(peak=1e-3, params=86e6, exponent=0.25)
    sweep.batch.size = 4096
    sweep.trunks.warmup_images = 4096 * 2500
    sweep.holdout.update(factors=(4.0,), sizes=1, share=0.3)
    return sweep
