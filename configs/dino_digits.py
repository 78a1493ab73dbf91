"""DINOv2's objective on handwritten digits (scikit-learn's, 8x8), without their labels.

    vitjax train --config=dino_digits --workdir=runs/dino_digits

Runs on: two CPU cores, in a few minutes.
Expected: see docs/objectives.md. Run by us.
"""

from vitjax.config import load_config


def get_config():
    config = load_config("quickstart").unlock()
    config.total_steps = config.eval_every = 600
    config.checkpoint_every = 200
    config.model.update(num_classes=0, pool="cls", mask_token=True)
    crops = {"global_size": 8, "local_size": 6, "num_local": 3}
    config.objective = {
        "target": "vitjax.objectives.dino:DINO",
        "head": {"prototypes": 256, "hidden": 128, "bottleneck": 32},
        "momentum": 0.98,
        "freeze_last_layer_steps": 50,
    } | crops
    config.augment = (
        {"target": "vitjax.data.augment:RandomShift", "pixels": 1},
        {"target": "vitjax.data.multicrop:MultiCrop", "global_area": (0.6, 1.0),
         "local_area": (0.35, 0.6)} | crops,
    )  # fmt: skip
    config.optimizer.ema_decay = None  # the teacher is an average already
    train, test = config.data.source.to_dict(), config.evals.test.source.to_dict()
    both = {"source": test, "train_source": train}
    config.evals = {
        "knn": {"target": "vitjax.evals.knn:KNN"} | both,
        "probe": {"target": "vitjax.evals.linear_probe:LinearProbe"} | both,
        "health": {"target": "vitjax.evals.health:Health", "source": test},
    }
    config.checkpoint.metric = None
    return config
