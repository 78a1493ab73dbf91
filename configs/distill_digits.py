"""A smaller network taught by the quickstart's, on the same digits, without their labels.

    vitjax train --config=quickstart --workdir=runs/labelled_digits
    vitjax train --config=distill_digits --workdir=runs/distill_digits \\
        --config.objective.teacher=runs/labelled_digits

Runs on: two CPU cores, in about a minute and a half.
Expected: see docs/objectives.md. Run by us.
"""

from vitjax.config import load_config


def get_config():
    config = load_config("quickstart").unlock()
    config.model.update(width=32, depth=2, mlp_dim=64, num_heads=2)
    config.objective = {
        "target": "vitjax.objectives.distill:Distill",
        "teacher": "",
        "logits_weight": 1.0,
        "features_weight": 1.0,
        "tokens_weight": 0.0,
        "labels_weight": 0.0,
    }
    return config
