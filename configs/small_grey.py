"""A small ViT for grey images of 28 pixels, from photographs of 32: a start for small medical sets.

    vitjax train --config=small_grey --workdir=runs/small_grey --config.data.root=cifar10.zip

The data: CIFAR-10 as `train/<class>/*.png` and `test/<class>/*.png` (or .jpg), read in grey. Any
folder of classes does.
Runs on: two CPU cores, in about an hour, under 2.5 GiB.
Expected: 58% on CIFAR-10's test set (JPEG files) in grey. Run by us once.
"""

from vitjax.config import base_config

BATCH_SIZE = 256
STEPS = 2500


def get_config():
    config = base_config()
    config.batch_size = BATCH_SIZE
    config.total_steps = STEPS
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 500

    config.model.update(width=96, depth=6, mlp_dim=384, num_heads=3, patch_size=4)
    config.model.update(num_classes=10, stem="conv", scan=False)

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=28, channels=1, mean=(0.48,), std=(0.24,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.4},
    )
    config.augment = ({"target": "vitjax.data.augment:RandomFlip"},)
    config.objective.label_smoothing = 0.1

    config.optimizer.peak_lr = 2e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 200
    config.optimizer.ema_decay = 0.999

    config.evals.test = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": folder, "path": root, "split": "test"},
        "batch_size": 500,
    }
    config.checkpoint.metric = "eval/test/accuracy"
    return config
