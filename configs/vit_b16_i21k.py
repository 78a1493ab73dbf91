"""ViT-B/16 on ImageNet-21k, as in AugReg (Steiner et al. 2021, arXiv 2106.10270).

    vitjax train --config=vit_b16_i21k --workdir=runs/b16 --config.data.root=/data/imagenet21k

The data: a folder for each of the 21,843 classes under `train` and under `val` (hold some out).
Runs on: 64 or more accelerators for days (300 epochs of 14 million images, 4.5e20 FLOP in all).
Expected: the B/32 of this recipe transfers to ImageNet-1k with 83.27%; we know of no official
number for exactly this B/16. Not run by us.
"""

from vitjax.config import base_config

IMAGES = 14_197_122


def get_config():
    config = base_config()
    config.batch_size = 4096
    config.total_steps = 300 * IMAGES // 4096
    config.eval_every = 10_000
    config.checkpoint_every = 2000

    config.model.update(shape="B/16", pool="gap", positions="learned", num_classes=21_843)
    config.model.head_bias = -10.0
    config.objective.loss_type = "sigmoid"

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=224, crop_fraction=0.875, interpolation="bilinear")
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.05},
    )
    config.augment = (
        {"target": "vitjax.data.augment:RandomFlip"},
        {"target": "vitjax.data.randaugment:RandAugment", "num_layers": 2, "magnitude": 10},
        {"target": "vitjax.data.augment:Mixup", "alpha": 0.2},
    )

    config.optimizer.algorithm = {"target": "optax:scale_by_adam", "mu_dtype": "bfloat16"}
    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 10_000

    config.evals.val = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": folder, "path": root, "split": "val"},
        "batch_size": 4096,
    }
    return config
