"""CIFAR-10 from scratch, from an image folder or a zip of one.

    vitjax train --config=cifar10 --workdir=runs/cifar10 --config.data.root=cifar10.zip

The data: `train/<class>/*.png` and `test/<class>/*.png` (or .jpg).
Runs on: one GPU, in well under an hour; on two CPU cores, see docs/cifar10.md for what ten minutes
give. Expected: 94 to 96% for models of this size, trained so. Run by us: only shortened.
"""

from vitjax.config import base_config

IMAGES = 50_000


def get_config():
    config = base_config()
    config.batch_size = 512
    config.total_steps = 200 * IMAGES // 512
    config.eval_every = 2000
    config.checkpoint_every = 2000

    config.model.update(width=256, depth=9, mlp_dim=1024, num_heads=4, patch_size=4)
    config.model.num_classes = 10
    config.model.drop_path_rate = 0.1

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=32, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
    config.data.num_ahead = 4
    config.augment = (
        {"target": "vitjax.data.augment:RandomFlip"},
        {"target": "vitjax.data.augment:RandomShift", "pixels": 4},
        {"target": "vitjax.data.augment:MixupOrCutmix", "mixup_alpha": 0.2},
    )
    config.objective.label_smoothing = 0.1

    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 1000
    config.optimizer.ema_decay = 0.999

    config.evals.test = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": folder, "path": root, "split": "test"},
        "batch_size": 500,
    }
    config.checkpoint.metric = "eval/test/accuracy"
    return config
