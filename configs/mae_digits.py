"""MAE on handwritten digits (scikit-learn's, 8x8), without their labels.

    vitjax train --config=mae_digits --workdir=runs/mae_digits

Runs on: two CPU cores, in about two minutes.
Expected: see docs/objectives.md. Run by us.
"""

from vitjax.config import load_config


def get_config():
    config = load_config("quickstart").unlock()
    config.eval_every = config.total_steps
    config.model.update(num_classes=0, positions="sincos2d")
    config.objective = {
        "target": "vitjax.objectives.mae:MAE",
        "mask_ratio": 0.75,
        "decoder": {"width": 32, "depth": 1, "num_heads": 2},
    }
    config.augment = ({"target": "vitjax.data.augment:RandomShift", "pixels": 1},)
    train, test = config.data.source.to_dict(), config.evals.test.source.to_dict()
    both = {"source": test, "train_source": train}
    config.evals = {
        "knn": {"target": "vitjax.evals.knn:KNN"} | both,
        "probe": {"target": "vitjax.evals.linear_probe:LinearProbe"} | both,
        "images": {"target": "vitjax.evals.reconstruction:Reconstruction", "source": test},
    }
    config.checkpoint.metric = None
    return config
