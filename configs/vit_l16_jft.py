"""ViT-L/16 on any large multi-label set in ArrayRecord shards, JFT-shaped (arXiv 2106.04560).

    vitjax train --config=vit_l16_jft --workdir=runs/l16 --config.data.root='/data/*.array_record'

The data: tf.train.Example records with `image` (encoded) and `label` (a list of class numbers).
Runs on: a pod; 4 billion images seen, 1.5e21 FLOP. Expected: JFT is not public, so no number
carries over to other data. Not run by us.
"""

from vitjax.config import base_config

CLASSES = 29_593


def get_config():
    config = base_config()
    config.batch_size = 4096
    config.total_steps = 1_000_000
    config.checkpoint_every = 2000

    config.model.update(shape="L/16", pool="map", positions="learned", num_classes=CLASSES)
    config.model.head_bias = -10.0
    config.model.remat = "dots"
    config.objective.loss_type = "sigmoid"

    config.data.source = {
        "target": "vitjax.data.sources.array_record:ArrayRecord",
        "pattern": config.data.get_ref("root"),
        "num_classes": CLASSES,
        "multi_label": True,
    }
    config.data.update(image_size=224, crop_fraction=0.875, interpolation="bilinear")
    config.data.max_labels = 32
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.05},
    )
    config.augment = ({"target": "vitjax.data.augment:RandomFlip"},)

    config.optimizer.algorithm = {"target": "vitjax.optim:scale_by_adafactor"}
    config.optimizer.schedule = {
        "target": "vitjax.schedules:rsqrt",
        "warmup_steps": 10_000,
        "cooldown_steps": 50_000,
    }
    config.optimizer.peak_lr = 8e-4
    # A head that decays a hundred times more than the body transfers better in few shots.
    config.optimizer.weight_decay = 0.03
    config.optimizer.decay = ((".*/kernel", 1.0), ("head/kernel", 100.0))
    return config
