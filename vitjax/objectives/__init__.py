"""Objectives, one file each. The contract, which the step and the loop rely on:

An objective is a frozen dataclass with pure methods, built from the config with `model=`.

    init(key, batch) -> (params, extra)
    loss(params, extra, batch, key) -> (scalar, (extra, metrics))
    after_update(params, extra) -> extra          optional: teachers, centres, queues
    embed(params, extra, batch) -> [B, D]
    flops_per_image: int                          of a forward and backward pass

`extra` holds everything that is saved but not trained. `batch` has `images` (normalised float32)
and whatever else the data and the augmentation put there; `key` is None at evaluation.
"""
