"""IsoFLOP curves up to billions of images on any large multi-label set in ArrayRecord shards.

    vitjax sweep plan --config=scaling/jft_like --workdir=runs/jft --target=tpu:v5p:8x8x8
    vitjax sweep run --workdir=runs/jft --array=k8s

The data: as for vit_l16_jft, given to the first command as
--sweep.train.data.root='/data/*.array_record'; set --sweep.num_images to how many there are.
Runs on: a pod a run. Expected: JFT is not public, so no number carries over; Scaling Vision
Transformers (arXiv 2106.04560) found the frontier of such data to rise through the sizes planned
here. Planned by us, not run by us. Every image is new: nothing repeats in 4 billion.
"""

from vitjax.config import load_config
from vitjax.sweep.config import base_sweep


def get_sweep():
    train = load_config("vit_l16_jft").unlock()
    train.model.update(shape=None, patch_size=16)

    sweep = base_sweep(train)
    sweep.num_images = 4_000_000_000
    sweep.budget.target = "tpu:v5p:8x8x8"
    sweep.shapes.update(widths=(256, 2048), width_multiple=64, width_per_depth=43.0)
    sweep.shapes.depths = (6, 8, 12, 16, 20, 24, 32, 40, 48)
    sweep.isoflop.update(budgets=(5e18, 2e19, 8e19, 3.2e20), sizes=6, spread=4.0)
    sweep.isoflop.guess.update(params=3e8, flops=1.5e21, exponent=0.4)
    sweep.isoflop.max_epochs = 1.0
    sweep.lr.update(peak=8e-4, params=3e8, exponent=0.25)
    sweep.lr.update(check_factors=(0.5, 1.0, 2.0), check_params=(6e7, 2e8))
    sweep.batch.size = 4096
    sweep.trunks.warmup_images = 4096 * 1000
    sweep.seeds.update(every=(0, 1), extra=(2,))
    sweep.data.update(params=1e8, images=(10**7, 10**8, 10**9), repeats=(10.0, 100.0))
    sweep.holdout.update(factors=(4.0,), sizes=1)
    return sweep
