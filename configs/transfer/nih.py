"""NIH ChestX-ray14: fourteen findings on chest radiographs, official split by patient.

    vitjax transfer --config=transfer/nih --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/nih

The data: Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt and the images.
Runs on: one GPU or more. Not run by us.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.nih:nih",
        "root": config.get_ref("root"),
    }
    config.presets = ("linear", "lora", "full")
    config.floors = ("majority", "pixels", "cnn")
    config.image_size = 224
    config.train.update(batch_size=256, epochs=5.0)
    return config
