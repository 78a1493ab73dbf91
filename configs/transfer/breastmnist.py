"""BreastMNIST: malignant or not on breast ultrasound, 28 to 224 pixels.

    vitjax transfer --config=transfer/breastmnist --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/breastmnist

The data: breastmnist.npz, or breastmnist_224.npz, of MedMNIST (CC BY 4.0).
Class 1 is the healthy one. The 78 images of its validation split are too few to choose by (see
docs/medical.md), so they and the 546 training images are cross-validated.
Runs on: CPUs, with small_grey in an hour and a half of one core, without the curves of few labels.
Run by us: see docs/medical.md.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.medmnist:medmnist",
        "path": config.get_ref("root"),
    }
    config.seeds = (0, 1, 2, 3, 4)
    config.folds = 5
    config.policy = "ultrasound"
    config.train.update(epochs=24.0, batch_size=32, evaluations=20, patience=6, min_steps=100)
    config.train.ema_decay = 0.97
    config.train.peak_lr.update(freeze=1e-3, full=2e-3)  # of a small model
    methods = ("linear", "lp_ft", "full", "scratch", "vit", "cnn")
    config.low_data.update(labelled=(50.0, 200.0), methods=methods)
    config.report.goals = {"auc": 0.901}
    return config
