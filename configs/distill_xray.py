"""A small ViT taught by a larger one's features and tokens, on grey chest radiographs, unlabelled.

    vitjax train --config=distill_xray --workdir=runs/distill_xray \\
        --config.data.root=radiographs --config.objective.teacher=runs/dino_xray

The data: a folder `train/<anything>/*.png` (or .jpg, .dcm); what the folders are called means
nothing. Left and right stay what they are: nothing is mirrored. The teacher: of grey images of 224
pixels and patches of 16, without a head, as `mae_xray` and `dino_xray` make it.
Runs on: 8 GPUs or more; for how long we have not measured.
Expected: we know of nothing published for this setting. Not run by us.
"""

from vitjax.config import base_config


def get_config():
    config = base_config()
    config.batch_size = 1024
    config.total_steps = 40_000
    config.checkpoint_every = 1000

    config.model.update(shape="Ti/16", num_classes=0, pool="cls")
    config.objective = {
        "target": "vitjax.objectives.distill:Distill",
        "teacher": "",
        "logits_weight": 0.0,
        "features_weight": 1.0,
        "tokens_weight": 1.0,
    }

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=224, channels=1, mean=(0.5,), std=(0.25,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.5},
    )
    config.augment = (
        {"target": "vitjax.data.colour:ColourJitter", "brightness": 0.2, "contrast": 0.2},
    )

    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.warmup_steps = 2000
    return config
