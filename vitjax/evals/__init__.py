"""Evaluators, one file each. The contract, which the loop and `vitjax eval` rely on:

An evaluator takes what is static in its constructor and jits there, once. It is built from a block
of `config.evals` with `objective=`, `mesh=`, and for each key that ends with `source` a loader:
`loader=` for `source`, `train_loader=` for `train_source`.

    __call__(state) -> dict[str, float]           numbers, which become eval/NAME/...
    pictures(state) -> dict[str, bytes]           optional: PNGs, WORKDIR/pictures/NAME/...

Sums and counts are taken under a padding mask and divided at the end, so that every example counts
exactly once. Every process runs it, with the same result. Its data come through
`Loader.eval_batches`; what takes long beside calls `loader.between()` from time to time.
"""
