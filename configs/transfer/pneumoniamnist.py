"""PneumoniaMNIST: pneumonia on chest radiographs of children, 28 to 224 pixels.

    vitjax transfer --config=transfer/pneumoniamnist --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/pneumoniamnist

The data: pneumoniamnist.npz, or pneumoniamnist_224.npz, of MedMNIST (CC BY 4.0).
Runs on: two CPU cores with a small checkpoint, presets in an hour and a half. Run by us: see
docs/medical.md.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.medmnist:medmnist",
        "path": config.get_ref("root"),
    }
    config.seeds = (0, 1, 2, 3, 4)
    config.train.update(epochs=4.0, evaluations=12, patience=5, min_steps=100, ema_decay=0.98)
    config.train.peak_lr.update(lp_ft=5e-4, freeze=1e-3, full=2e-3)  # of a small model
    methods = ("linear", "lp_ft", "full", "scratch", "vit", "cnn")
    config.low_data.update(labelled=(50.0, 200.0, 500.0), methods=methods)
    config.report.goals = {"auc": 0.970}
    return config
