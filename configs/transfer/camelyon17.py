"""CAMELYON17: whole slides of lymph nodes, cut into tiles, embedded, and pooled by attention.

    vitjax transfer --config=transfer/camelyon17 --config.root=DATA \\
        --checkpoint=CHECKPOINT --workdir=runs/camelyon17

The data: the folder as published (CC0); see vitjax/medical/slides/camelyon.py.
Runs on: one GPU; the slides are read once. Not run by us on the real slides.
"""

from vitjax.medical.settings import transfer_config


def get_config():
    config = transfer_config()
    config.slides = {
        "target": "vitjax.medical.slides.camelyon:camelyon17",
        "root": config.get_ref("root"),
    }
    config.presets = ("gated", "attention", "mean", "max")
    config.floors = ("majority",)
    config.seeds = (0, 1, 2, 3, 4)
    return config
