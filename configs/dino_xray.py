"""DINOv2's objective on grey chest radiographs without labels, from other weights or from nothing.

    vitjax train --config=dino_xray --workdir=runs/dino_xray --config.data.root=radiographs \\
        --config.init.checkpoint=CHECKPOINT --config.init.skip="('mask_token',)"

The data: a folder `train/<anything>/*.png` (or .jpg, .dcm); what the folders are called means
nothing. Left and right stay what they are: nothing is mirrored. Without `init.checkpoint` it starts
afresh.
Runs on: 8 GPUs or more; for how long we have not measured.
Expected: nothing is published for this setting; RAD-DINO (arXiv 2401.10815) continues a ViT-B/14 of
DINOv2 so. Not run by us.
"""

from vitjax.config import base_config

CHANGES = (
    {"target": "vitjax.data.colour:ColourJitter", "brightness": 0.2, "contrast": 0.2},
    {"target": "vitjax.data.colour:GaussianBlur", "probability": 0.3},
)


def get_config():
    config = base_config()
    config.batch_size = 512
    config.total_steps = 60_000
    config.checkpoint_every = 1000

    config.model.update(shape="S/16", num_classes=0, pool="cls", mask_token=True)
    config.model.update(table_size=224, layer_scale=1e-5, drop_path_rate=0.1, activation="gelu")
    crops = {"global_size": 224, "local_size": 96, "num_local": 8}
    config.objective = {
        "target": "vitjax.objectives.dino:DINO",
        "head": {"prototypes": 16384, "hidden": 2048, "bottleneck": 256},
        "teacher_warmup_steps": 6000,
        "freeze_last_layer_steps": 500,
    } | crops

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=256, channels=1, mean=(0.5,), std=(0.25,))
    config.augment = (
        {"target": "vitjax.data.multicrop:MultiCrop", "operations": CHANGES,
         "global_area": (0.5, 1.0), "local_area": (0.1, 0.5)} | crops,
    )  # fmt: skip

    config.optimizer.peak_lr = 5e-4
    config.optimizer.update(weight_decay=0.04, final_weight_decay=0.2)
    config.optimizer.clip_norm = 3.0
    config.optimizer.schedule.warmup_steps = 3000
    return config
