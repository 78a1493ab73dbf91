"""CAMELYON17 in the layout of WILDS: tumour in a patch, another hospital to test on.

    vitjax transfer --config=transfer/camelyon17_wilds --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/camelyon17_wilds

The data: metadata.csv and patches/ (CC0).
Runs on: one GPU or more. Not run by us.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.wilds:camelyon17",
        "root": config.get_ref("root"),
    }
    config.presets = ("linear", "lora", "full")
    config.image_size = 96
    config.train.update(batch_size=256, epochs=2.0)
    config.report.duplicates = False
    return config
