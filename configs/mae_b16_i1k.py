"""MAE of a ViT-B/16 on ImageNet-1k without labels (He et al. 2022, arXiv 2111.06377).

    vitjax train --config=mae_b16_i1k --workdir=runs/mae_b16 --config.data.root=/data/imagenet

The data: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`; classes are for evaluation alone.
Runs on: a pod or several nodes of GPUs; for how long we have not measured.
Expected: after 1600 epochs (--config.total_steps=500400) 83.6% fine-tuned and 68.0% by a linear
probe, as published. Not run by us.
"""

from vitjax.config import base_config

IMAGES = 1_281_167


def get_config():
    config = base_config()
    config.batch_size = 4096
    config.total_steps = 800 * IMAGES // 4096
    config.eval_every = 25_000
    config.checkpoint_every = 1000

    config.model.update(shape="B/16", num_classes=0, pool="cls", positions="sincos2d")
    config.model.activation = "gelu"
    config.objective = {"target": "vitjax.objectives.mae:MAE", "mask_ratio": 0.75}

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    train = {"target": folder, "path": root, "split": "train"}
    config.data.source = train
    config.data.update(image_size=224, crop_fraction=0.875)
    config.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.2,
         "interpolation": "bicubic"},
    )  # fmt: skip
    config.augment = ({"target": "vitjax.data.augment:RandomFlip"},)

    config.optimizer.algorithm = {"target": "optax:scale_by_adam", "b1": 0.9, "b2": 0.95}
    config.optimizer.peak_lr = 2.4e-3  # 1.5e-4 x batch / 256
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule.warmup_steps = 40 * IMAGES // 4096

    val = {"target": folder, "path": root, "split": "val"}
    config.evals.knn = {
        "target": "vitjax.evals.knn:KNN", "source": val, "train_source": train, "batch_size": 1024
    }  # fmt: skip
    config.evals.images = {"target": "vitjax.evals.reconstruction:Reconstruction", "source": val}
    return config
