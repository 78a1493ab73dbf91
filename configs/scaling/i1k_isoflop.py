"""IsoFLOP curves of ViTs from S to L on ImageNet-1k, after the plain recipe (arXiv 2205.01580).

    vitjax sweep plan --config=scaling/i1k_isoflop --workdir=runs/i1k --target=gpu:h100:1x1x8
    vitjax sweep run --workdir=runs/i1k --array=slurm

The data: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, given to the first command as
--sweep.train.data.root=/data/imagenet.
Runs on: H100 hosts, a host a run, so that the array takes as many as there are.
Expected: no published optimum for this recipe; the plan's table says what each run costs. Planned
by us, not run by us. Larger budgets see the images up to 300 times, so that the law is one of
repeated, augmented data; the plan's notes name the runs.
"""

from vitjax.config import load_config
from vitjax.sweep.config import base_sweep


def get_sweep():
    train = load_config("vit_s16_i1k").unlock()
    train.model.update(shape=None, patch_size=16)
    train.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    train.evals.val.batch_size = 1000

    sweep = base_sweep(train)
    sweep.num_images = 1_281_167
    sweep.budget.target = "gpu:h100:1x1x8"
    sweep.shapes.update(widths=(192, 1280), width_multiple=64, width_per_depth=40.0)
    sweep.shapes.depths = (6, 8, 10, 12, 16, 20, 24, 32)
    sweep.isoflop.update(budgets=(3e17, 1e18, 3e18, 1e19), sizes=6, spread=4.0)
    sweep.isoflop.guess.update(params=22e6, flops=1e18, exponent=0.5)
    sweep.isoflop.max_epochs = 300.0
    sweep.lr.update(peak=1e-3, params=22e6, exponent=0.25)
    sweep.lr.update(check_factors=(0.5, 1.0, 2.0), check_params=(22e6, 86e6))
    sweep.batch.size = 1024
    sweep.trunks.warmup_images = 1_024_000
    sweep.seeds.update(every=(0, 1), extra=(2,))
    sweep.holdout.update(factors=(4.0,), sizes=1)
    return sweep
