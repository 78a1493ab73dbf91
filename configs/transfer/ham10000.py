"""HAM10000: seven diagnoses of skin lesions, split by lesion.

    vitjax transfer --config=transfer/ham10000 --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/ham10000

The data: HAM10000_metadata and both folders of images (CC BY-NC 4.0).
Runs on: one GPU or more. Not run by us.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.ham10000:ham10000",
        "root": config.get_ref("root"),
    }
    config.presets = ("linear", "lora", "full")
    config.imbalance = "class_weights"
    config.image_size = 224
    config.train.update(batch_size=128, epochs=25.0)
    return config
