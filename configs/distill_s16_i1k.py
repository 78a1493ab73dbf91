"""A ViT-S/16 taught by a larger model on ImageNet-1k ("patient and consistent", arXiv 2106.05237).

    vitjax train --config=distill_s16_i1k --workdir=runs/distill_s16 \\
        --config.data.root=/data/imagenet --config.objective.teacher=TEACHER

The data: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`. The teacher: whatever vitjax.load reads,
with the same thousand classes in the same order, for images of 224 pixels. A teacher without a
head teaches with objective.logits_weight=0 and features_weight=1 or tokens_weight=1.
Runs on: 8 GPUs or more; for how long we have not measured.
Expected: unknown for this student; a ResNet-50 so taught reaches 82.8% after 9,600 epochs, as
published (Beyer et al. 2022). Not run by us.
"""

from vitjax.config import base_config

IMAGES = 1_281_167


def get_config():
    config = base_config()
    config.batch_size = 1024
    config.total_steps = 300 * IMAGES // 1024
    config.eval_every = 10_000
    config.checkpoint_every = 1000

    config.model.update(shape="S/16", num_classes=1000)
    config.objective = {
        "target": "vitjax.objectives.distill:Distill",
        "teacher": "",
        "temperature": 1.0,
        "logits_weight": 1.0,
        "features_weight": 0.0,
        "tokens_weight": 0.0,
        "labels_weight": 0.0,
    }

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=224, crop_fraction=0.875)
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.05},
    )
    config.augment = (
        {"target": "vitjax.data.augment:RandomFlip"},
        {"target": "vitjax.data.augment:Mixup", "alpha": 1.0},
    )

    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.warmup_steps = 5000

    config.evals.val = {
        "target": "vitjax.evals.classification:Classification",
        "source": {"target": folder, "path": root, "split": "val"},
        "batch_size": 1024,
    }
    config.checkpoint.metric = "eval/val/accuracy"
    return config
