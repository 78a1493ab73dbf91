"""DINOv2's objective for a ViT-S/16 on ImageNet-1k without labels (arXiv 2304.07193).

    vitjax train --config=dino_s16_i1k --workdir=runs/dino_s16 --config.data.root=/data/imagenet

The data: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`; classes are for evaluation alone.
Runs on: two nodes of 8 GPUs or more; for how long we have not measured.
Expected: nothing is published for this setting; DINO alone gives such a model 74.5% by kNN and
77.0% by a linear probe after 800 epochs (arXiv 2104.14294). Not run by us. The weight decay is
constant here, where theirs rises from 0.04 to 0.4.
"""

from vitjax.config import base_config

IMAGES = 1_281_167
COLOURS = (
    {"target": "vitjax.data.augment:RandomFlip"},
    {"target": "vitjax.data.colour:ColourJitter", "brightness": 0.4, "contrast": 0.4,
     "saturation": 0.2, "hue": 0.1},
    {"target": "vitjax.data.colour:Grayscale", "probability": 0.2},
)  # fmt: skip


def get_config():
    config = base_config()
    config.batch_size = 1024
    config.total_steps = 300 * IMAGES // 1024
    config.eval_every = 12_500
    config.checkpoint_every = 1250

    config.model.update(shape="S/16", num_classes=0, pool="cls", mask_token=True)
    config.model.update(table_size=224, layer_scale=1e-5, drop_path_rate=0.1, activation="gelu")
    crops = {"global_size": 224, "local_size": 96, "num_local": 8}
    config.objective = {
        "target": "vitjax.objectives.dino:DINO",
        "head": {"prototypes": 65536, "hidden": 2048, "bottleneck": 256},
        "teacher_warmup_steps": 30 * IMAGES // 1024,
        "freeze_last_layer_steps": IMAGES // 1024,
    } | crops

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    train = {"target": folder, "path": root, "split": "train"}
    config.data.source = train
    config.data.update(image_size=256)  # from which the crops are cut, on the device
    config.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    blur = {"target": "vitjax.data.colour:GaussianBlur", "probability": 1.0}
    second = {"target": "vitjax.data.colour:Solarize", "probability": 0.2}
    config.augment = (
        {"target": "vitjax.data.multicrop:MultiCrop", "operations": (*COLOURS, blur),
         "second_operations": (*COLOURS, second)} | crops,
    )  # fmt: skip

    config.optimizer.peak_lr = 2e-3
    config.optimizer.update(weight_decay=0.04, final_weight_decay=0.2)
    config.optimizer.clip_norm = 3.0
    config.optimizer.schedule.warmup_steps = 10 * IMAGES // 1024

    val = {"target": folder, "path": root, "split": "val"}
    config.evals.knn = {
        "target": "vitjax.evals.knn:KNN", "source": val, "train_source": train, "batch_size": 1024
    }  # fmt: skip
    config.evals.health = {"target": "vitjax.evals.health:Health", "source": val}
    return config
