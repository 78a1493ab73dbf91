"""BiT R50x1 on ImageNet-1k: the convolutional baseline in the ViT's trainer.

    vitjax train --config=bit_r50_i1k --workdir=runs/bit --config.data.root=imagenet

Data and recipe are those of `vit_s16_i1k`, to compare in one trainer. Weights are standardised
and norms are over groups, so any batch size will do (Kolesnikov et al. 2020, arXiv 1912.11370).
Another network is another `model` block, as here; ConvNeXt has the target
"vitjax.models.convnext:convnext" and a size such as "T".
Runs on: 8 accelerators; 4.1 GMACs an image, close to S/16's 4.6.
Expected: not known for this recipe. Not run by us.
"""

from ml_collections import ConfigDict

from vitjax.config import load_config


def get_config():
    config = load_config("vit_s16_i1k")
    config.unlock()
    config.model = ConfigDict(
        {
            "target": "vitjax.models.bit:bit",
            "num_classes": 1000,
            "depth": 50,
            "width_factor": 1,
        }
    )
    config.optimizer.decay = ((".*/kernel", 1.0),)
    return config
