"""BCCD: which of three kinds of cells are in a field of blood (several labels an image).

    vitjax transfer --config=transfer/bccd --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/bccd

The data: BCCD's folder or a zip archive of it (MIT). Nearly every field has red and white cells.
Runs on: two CPU cores with a small checkpoint, in three minutes. Run by us: see docs/medical.md.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.bccd:bccd",
        "path": config.get_ref("root"),
    }
    config.drop_colour = True  # of a checkpoint of grey images
    config.image_size = 56
    config.seeds = (0,)
    config.presets = ("knn", "linear", "lp_ft", "full")
    config.floors = ("majority", "pixels", "scratch")
    config.imbalance = "class_weights"
    config.train.update(epochs=8.0, batch_size=32, evaluations=8, patience=4, min_steps=50)
    return config
