"""MAE on grey chest radiographs without labels, from ImageNet weights or from nothing.

    vitjax train --config=mae_xray --workdir=runs/mae_xray --config.data.root=radiographs \\
        --config.init.checkpoint=CHECKPOINT --config.init.drop="('head/.*',)"

The data: a folder `train/<anything>/*.png` (or .jpg, .dcm); what the folders are called means
nothing.
Without `init.checkpoint` it starts afresh.
Runs on: 8 GPUs or more; for how long we have not measured.
Expected: for a ViT-S/16 so pretrained on radiographs and fine-tuned, a mean AUROC of about 0.89 on
CheXpert's validation set is reported (Xiao et al. 2023, arXiv 2210.12843). Not run by us.
"""

from vitjax.config import base_config


def get_config():
    config = base_config()
    config.batch_size = 2048
    config.total_steps = 40_000
    config.checkpoint_every = 1000

    config.model.update(shape="S/16", num_classes=0, pool="cls", positions="sincos2d")
    config.objective = {
        "target": "vitjax.objectives.mae:MAE",
        "mask_ratio": 0.9,
        "decoder": {"width": 512, "depth": 8, "num_heads": 16},
    }

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=224, channels=1, mean=(0.5,), std=(0.25,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.5},
    )

    config.optimizer.algorithm = {"target": "optax:scale_by_adam", "b1": 0.9, "b2": 0.95}
    config.optimizer.peak_lr = 1.2e-3  # 1.5e-4 x batch / 256
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule.warmup_steps = 2000
    return config
