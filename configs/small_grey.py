"""A small hybrid ViT for grey images, from photographs of 32 pixels: a start for medical sets.

    vitjax train --config=small_grey --workdir=runs/small_grey --config.data.root=cifar10.zip

The data: CIFAR-10 as `train/<class>/*.png` and `test/<class>/*.png` (or .jpg), read in grey and
enlarged to 56 pixels, as images of 28 are that are transferred to. Any folder of classes does.
Runs on: two CPU cores, in about an hour, under 2.5 GiB.
Expected: 73.1% on CIFAR-10's test set (JPEG files) in grey. Run by us twice, in 55 and 72
minutes.
"""

from vitjax.config import base_config

BATCH_SIZE = 128
STEPS = 5500


def get_config():
    config = base_config()
    config.batch_size = BATCH_SIZE
    config.total_steps = STEPS
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 1100

    config.model.update(width=96, depth=4, mlp_dim=384, num_heads=3, patch_size=8)
    config.model.update(stem="resnet", stem_blocks=(1, 2), stem_width=32)
    config.model.update(num_classes=10, scan=False)

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=56, channels=1, mean=(0.48,), std=(0.24,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.5},
    )
    config.augment = ({"target": "vitjax.data.augment:RandomFlip"},)
    config.objective.label_smoothing = 0.1

    config.optimizer.peak_lr = 2e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 300
    config.optimizer.ema_decay = 0.999

    config.evals.test = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": folder, "path": root, "split": "test"},
        "batch_size": 500,
    }
    config.checkpoint.metric = "eval/test/accuracy"
    return config
