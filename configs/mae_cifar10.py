"""MAE on CIFAR-10 without labels, small enough for a CPU.

    vitjax train --config=mae_cifar10 --workdir=runs/mae_cifar10 --config.data.root=cifar10.zip

The data: `train/<class>/*.png` and `test/<class>/*.png` (or .jpg); classes are for evaluation
alone.
Runs on: two CPU cores, in about ten minutes and two more for the evaluation.
Expected: 47% by nearest neighbours, 49% by ridge regression; see docs/objectives.md. Run by us with
three seeds.
"""

from vitjax.config import base_config


def get_config():
    config = base_config()
    config.batch_size = 256
    config.total_steps = 1600
    config.eval_every = 1600
    config.checkpoint_every = 500

    config.model.update(width=96, depth=4, mlp_dim=384, num_heads=3, patch_size=4)
    config.model.update(num_classes=0, positions="sincos2d", scan=False)
    config.objective = {
        "target": "vitjax.objectives.mae:MAE",
        "mask_ratio": 0.75,
        "decoder": {"width": 48, "depth": 1, "num_heads": 1},
    }

    folder = "vitjax.data.sources.folders:open_folder"
    root = config.data.get_ref("root")
    config.data.source = {"target": folder, "path": root, "split": "train"}
    config.data.update(image_size=32, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.3},
    )
    config.augment = ({"target": "vitjax.data.augment:RandomFlip"},)

    config.optimizer.algorithm = {"target": "optax:scale_by_adam", "b1": 0.9, "b2": 0.95}
    config.optimizer.peak_lr = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule.warmup_steps = 100

    train = {"target": folder, "path": root, "split": "train"}
    test = {"target": folder, "path": root, "split": "test"}
    config.evals.knn = {
        "target": "vitjax.evals.knn:KNN", "source": test, "train_source": train
    }  # fmt: skip
    config.evals.probe = {
        "target": "vitjax.evals.linear_probe:LinearProbe", "source": test, "train_source": train
    }  # fmt: skip
    config.evals.images = {"target": "vitjax.evals.reconstruction:Reconstruction", "source": test}
    return config
