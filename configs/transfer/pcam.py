"""PatchCamelyon: tumour in the centre of a patch of lymph node.

    vitjax transfer --config=transfer/pcam --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/pcam

The data: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 (CC0).
Runs on: one GPU or more. Not run by us.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.cohort = {
        "target": "vitjax.medical.readers.pcam:pcam",
        "root": config.get_ref("root"),
    }
    config.presets = ("linear", "lora", "full")
    config.image_size = 96
    config.train.update(batch_size=256, epochs=2.0)
    config.report.duplicates = False
    return config
