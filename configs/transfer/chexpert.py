"""CheXpert: fourteen findings on chest radiographs, five of them scored by study.

    vitjax transfer --config=transfer/chexpert --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/chexpert

The data: CheXpert-v1.0-small or CheXpert-v1.0, with train.csv and valid.csv; by
agreement with Stanford.
Runs on: one GPU or more. Not run by us: the data may not be passed on.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.chexpert:chexpert",
        "root": config.get_ref("root"),
    }
    config.cohort.uncertain = "mixed"  # or zeros, ones, ignore, multiclass, smooth, selftrain
    config.presets = ("linear", "lora", "full")
    config.floors = ("majority", "pixels", "cnn")
    config.image_size = 224
    config.train.update(batch_size=256, epochs=3.0)
    config.report.duplicates = False  # views of a study look alike
    return config
