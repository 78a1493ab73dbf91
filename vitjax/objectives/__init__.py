"""Objectives, one file each. The contract, which the step and the loop rely on:

An objective is a frozen dataclass with pure methods, an `objective.Objective`, built from the
config with `model=` and, where it takes them, `total_steps=` and `mesh=`.

    init(key, batch) -> (params, extra)
    loss(params, extra, batch, key) -> (scalar, (extra, metrics))
    after_update(params, extra) -> extra          optional: teachers, centres, queues
    first_extra(shardings) -> extra               optional: what a run begins with, from files
    backbone(params, extra) -> parameters of `model`; embed(params, extra, batch) -> [B, D]
    flops_per_image: int                          of a forward and backward pass

`extra` holds everything that is saved but not trained. `batch` has `images` (normalised float32)
and whatever else the data and the augmentation put there; `key` is None at evaluation.
"""
