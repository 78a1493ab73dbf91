"""ViT-22B on a JFT-shaped multi-label set (Dehghani et al. 2023, arXiv 2302.05442).

    vitjax train --config=vit_22b --workdir=gs://... --config.data.root='/data/train-*.array_record'

Runs on: 256 accelerators of 16 GB or more to hold it, 1,024 to finish: 177,000 steps of 65,536
images, about 4e23 FLOP. Expected: 89.5% on ImageNet-1k by a linear probe of frozen features, as
published. Not run by us. Attention and MLP in parallel, queries and keys normalised, no bias in the
query, key and value projections nor in the norms.
"""

from vitjax.config import base_config

CLASSES = 29_593


def get_config():
    config = base_config()
    config.batch_size = 65_536
    config.total_steps = 177_000
    config.checkpoint_every = 500

    config.model.update(shape="22B/14", pool="map", positions="learned", num_classes=CLASSES)
    config.model.update(parallel=True, qk_norm=True, qkv_bias=False, norm_bias=False)
    config.model.head_bias = -10.0
    config.model.remat = "full"
    config.objective.loss_type = "sigmoid"
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 4}

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
        "cooldown_steps": 30_000,
    }
    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 0.03
    config.optimizer.decay = ((".*/kernel", 1.0), ("head/kernel", 100.0))
    return config
