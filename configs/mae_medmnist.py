"""MAE on a small set of grey medical images without labels, such as PneumoniaMNIST, on a CPU.

    vitjax train --config=mae_medmnist --workdir=runs/mae_medmnist \\
        --config.data.root=pneumoniamnist.npz --config.init.checkpoint=runs/mae_cifar10

The data: a grey 28 pixel .npz file of MedMNIST with one label an image; labels are for evaluation
alone. Without `init.checkpoint` it starts afresh; a start from colour images is summed over them.
Runs on: two CPU cores, in a few minutes.
Expected: see docs/objectives.md. Run by us.
"""

from vitjax.config import load_config


def get_config():
    config = load_config("mae_cifar10").unlock()
    root = config.data.get_ref("root")
    rows = {"target": "vitjax.data.sources.arrays:Npz", "path": root}
    train, test = (rows | {"split": split} for split in ("train", "test"))
    config.data.source = train
    config.data.update(image_size=28, channels=1, mean=(0.5,), std=(0.25,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.5},
    )
    config.augment = ()
    config.total_steps = 300
    config.eval_every = 300
    config.checkpoint_every = 100
    config.optimizer.peak_lr = 1e-3

    knn, probe = "vitjax.evals.knn:KNN", "vitjax.evals.linear_probe:LinearProbe"
    config.evals = {
        "knn": {"target": knn, "source": test, "train_source": train},
        "probe": {"target": probe, "source": test, "train_source": train},
        "images": {"target": "vitjax.evals.reconstruction:Reconstruction", "source": test},
    }
    return config
