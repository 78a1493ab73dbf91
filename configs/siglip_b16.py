"""SigLIP B/16 on pairs of images and captions (Zhai et al. 2023, arXiv 2303.15343).

    vitjax train --config=siglip_b16 --workdir=runs/siglip --config.data.root=/data/pairs

The data: in that folder `train.jsonl`, a row with `image` (a path in the folder) and `caption` for
each image; `val.jsonl` likewise; and `pieces.model`, a SentencePiece model of 32,000 tokens.
Runs on: 32 or more accelerators for days (3 billion pairs, 4.2e20 FLOP in all).
Expected: SigLIP 2's released model of this shape has 78.2% zero-shot on ImageNet, after 13 times
as many pairs and with more losses; we know of no number for so many public pairs. Not run by us.
"""

from vitjax.config import base_config

PAIRS_SEEN = 3_000_000_000


def get_config():
    config = base_config()
    config.batch_size = 16_384
    config.total_steps = PAIRS_SEEN // 16_384
    config.eval_every = 10_000
    config.checkpoint_every = 2000

    config.model.update(shape="B/16", pool="map", positions="learned", num_classes=0)
    config.objective = {
        "target": "vitjax.objectives.contrastive:Contrastive",
        "loss_type": "sigmoid",
        "scale": None,
        "bias": -10.0,
        "chunk_size": 1024,
        "text": {
            "target": "vitjax.models.text:text_transformer",
            "vocab_size": 32_000,
            "length": 64,
            "shape": "B",
            "pool": "last",
        },
    }

    pairs = "vitjax.data.sources.pairs:Pairs"
    root = config.data.get_ref("root")
    config.data.source = {"target": pairs, "path": root + "/train.jsonl"}
    config.data.update(image_size=224, resize="squash")
    config.data.tokenizer = {
        "target": "vitjax.data.text:SentencePieceTokenizer",
        "path": root + "/pieces.model",
        "length": 64,
        "lower": True,
    }

    config.optimizer.algorithm = {
        "target": "vitjax.optim:scale_by_adafactor",
        "max_decay": 0.95,
    }
    config.optimizer.peak_lr = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule.warmup_steps = 10_000

    config.evals.val = {
        "target": "vitjax.evals.retrieval:Retrieval",
        "source": {"target": pairs, "path": root + "/val.jsonl"},
        "batch_size": 1024,
    }
    config.checkpoint.metric = "eval/val/text_to_image_recall_1"
    return config
