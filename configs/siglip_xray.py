"""SigLIP's loss on grey chest radiographs and the sentences of their reports.

    vitjax train --config=siglip_xray --workdir=runs/siglip_xray --config.data.root=reports \\
        --config.init.checkpoint=runs/mae_xray

The data: in that folder `train.jsonl`, a row with `image` (a path in the folder) and `caption`, the
findings of its report, for each image; `val.jsonl` likewise. Text is read as bytes, 256 of them, so
that no vocabulary is needed; what follows is cut off. Left and right stay what they are: nothing is
mirrored. Without `init.checkpoint` the image tower starts afresh.
Runs on: 8 GPUs or more; for how long we have not measured.
Expected: we know of nothing published for this setting (BiomedCLIP, arXiv 2303.00915, trains on
figures and captions of articles). Not run by us.
"""

from vitjax.config import base_config


def get_config():
    config = base_config()
    config.batch_size = 1024
    config.total_steps = 20_000
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.model.update(shape="S/16", num_classes=0, pool="cls", positions="sincos2d")
    config.objective = {
        "target": "vitjax.objectives.contrastive:Contrastive",
        "loss_type": "sigmoid",
        "scale": None,
        "bias": -10.0,
        "chunk_size": 512,
        "text": {
            "target": "vitjax.models.text:text_transformer",
            "vocab_size": 259,
            "length": 256,
            "shape": "S",
            "pool": "last",
        },
    }

    pairs = "vitjax.data.sources.pairs:Pairs"
    root = config.data.get_ref("root")
    config.data.source = {"target": pairs, "path": root + "/train.jsonl"}
    config.data.update(image_size=224, channels=1, mean=(0.5,), std=(0.25,))
    config.data.transforms = (
        {"target": "vitjax.data.transforms:RandomResizedCrop", "min_area": 0.6},
    )
    config.data.tokenizer = {"target": "vitjax.data.text:ByteTokenizer", "length": 256}

    config.optimizer.peak_lr = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.schedule.warmup_steps = 1000

    config.evals.val = {
        "target": "vitjax.evals.retrieval:Retrieval",
        "source": {"target": pairs, "path": root + "/val.jsonl"},
        "batch_size": 512,
    }
    config.checkpoint.metric = "eval/val/text_to_image_recall_1"
    return config
