"""ISIC 2019: eight diagnoses of skin lesions, and what is none of them.

    vitjax transfer --config=transfer/isic2019 --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/isic2019

The data: ISIC_2019_Training_Input, ..._GroundTruth.csv and ..._Metadata.csv (CC BY-NC 4.0).
Runs on: one GPU or more. Not run by us.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.isic2019:isic2019",
        "root": config.get_ref("root"),
    }
    config.presets = ("linear", "lora", "full")
    config.imbalance = "class_weights"
    config.image_size = 224
    config.train.update(batch_size=128, epochs=25.0)
    return config
