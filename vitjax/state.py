"""The train state, and the step that moves it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from vitjax import guard, monitor, optim
from vitjax.data.preprocess import Preprocess, to_unit
from vitjax.errors import InputError

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a run must save to go on bit for bit: arrays, or their shapes or shardings.

    Attributes:
      step: batches seen, int32 []. Updates that were skipped count.
      key: the run's random key as uint32 words; every step folds its number into it.
      params: trained.
      ema: a moving average of params, or None.
      opt_state: the optimizer's.
      extra: the objective's own, not trained.
      health: of the loss so far; see `vitjax.guard`.
    """

    step: PyTree
    key: PyTree
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    extra: PyTree
    health: PyTree

    @property
    def eval_params(self) -> PyTree:
        """What evaluation and inference use: the average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    objective: Any,
    optimizer: optax.GradientTransformation,
    batch: dict[str, Any],
    *,
    seed: int,
    use_ema: bool,
) -> TrainState:
    """A fresh state; pure, so it is jitted with the shardings of its result."""
    key = jax.random.key(seed)
    init_key, run_key = jax.random.split(key)
    params, extra = objective.init(init_key, batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
        opt_state=optimizer.init(params),
        extra=extra,
        health=guard.fresh_health(),
    )


def prepare(images: Array, preprocess: Preprocess) -> Array:
    """uint8 images to what the model sees."""
    return preprocess.normalise(to_unit(images))


def make_train_step(
    objective: Any,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocess,
    *,
    learning_rate: Callable[[Array], Array] | None = None,
    augment: Sequence[Callable] = (),
    accumulation_steps: int = 1,
    ema_decay: float | None = None,
    judge: guard.Guard | None = None,
    layer_norms: bool = False,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, a pure function to jit.

    `learning_rate`, of the number of updates done, is only for the metrics. The batch
    holds uint8 `images` [B, Y, X, C] and `labels`. With accumulation it is augmented as a whole,
    and then goes through the model in parts whose gradients are averaged.

    The metrics hold scalars, "fault" (a number of `guard.KINDS`) among them, and with `layer_norms`
    "layers", see `monitor.layer_norms`.
    """
    judge = judge or guard.Guard()

    def gradients(params, extra, batch, key):
        (loss, (extra, metrics)), grads = jax.value_and_grad(objective.loss, has_aux=True)(
            params, extra, batch, key
        )
        return extra, grads, {"loss": loss} | metrics

    def accumulate(params, extra, batch, key):
        # Part i takes every n-th example, so that each part lies spread over all devices.
        def split(x):
            parts = x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:])
            return jnp.swapaxes(parts, 0, 1)

        def body(carry, part):
            extra, sums = carry
            index, batch = part
            extra, *results = gradients(params, extra, batch, jax.random.fold_in(key, index))
            return (extra, jax.tree.map(jnp.add, sums, results)), None

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, batch))
        first = jax.tree.map(lambda x: x[0], parts[1])
        shapes = jax.eval_shape(gradients, params, extra, first, key)[1:]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), list(shapes))
        (extra, sums), _ = jax.lax.scan(body, (extra, zeros), parts)
        grads, metrics = jax.tree.map(lambda x: x / accumulation_steps, sums)
        return extra, grads, metrics

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss_key, *augment_keys = jax.random.split(key, 1 + len(augment))
        batch = batch | {"images": to_unit(batch["images"])}
        for operation, augment_key in zip(augment, augment_keys, strict=True):
            batch = operation(augment_key, batch)
        for name in [name for name in batch if name.endswith("images")]:  # crops too
            x = batch[name]
            x = preprocess.normalise(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)
            batch = batch | {name: x}
        run = gradients if accumulation_steps == 1 else accumulate
        extra, grads, metrics = run(state.params, state.extra, batch, loss_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if hasattr(objective, "after_update"):
            extra = objective.after_update(params, extra)
        ema = state.ema
        if ema_decay is not None:
            ema = optim.update_ema(ema, params, state.step, ema_decay)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step - state.health["skipped"])
        if layer_norms:
            metrics["layers"] = monitor.layer_norms(state.params, grads, updates)
        health, fault = judge(state.health, metrics["loss"], metrics["grad_norm"])
        metrics["fault"] = fault
        if judge.policy != "stop":
            metrics["skipped"] = health["skipped"]
        new = TrainState(state.step + 1, state.key, params, ema, opt_state, extra, health)
        return judge.settle(fault, new, state), metrics

    return train_step


def pass_over(state: TrainState, step: int) -> TrainState:
    """The state as if the batches up to a later step had been seen and left out."""

    def like(x, value):
        place = lambda _: np.asarray(value, x.dtype)  # noqa: E731
        return jax.make_array_from_callback((), x.sharding, place)

    then, skipped = (int(x.addressable_data(0)) for x in (state.step, state.health["skipped"]))
    health = state.health | {"skipped": like(state.health["skipped"], skipped + step - then)}
    return dataclasses.replace(state, step=like(state.step, step), health=health)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_differences(wanted: PyTree, found: PyTree) -> list[str]:
    """How two trees of arrays (or their shapes) differ, a line each, in path order."""
    name = optim.path_name
    left = {name(p): (tuple(x.shape), str(x.dtype)) for p, x in jax.tree.leaves_with_path(wanted)}
    right = {name(p): (tuple(x.shape), str(x.dtype)) for p, x in jax.tree.leaves_with_path(found)}
    lines = []
    for path in sorted(left.keys() | right.keys()):
        if path not in right:
            lines.append(f"{path}: the checkpoint has none, the model wants {left[path]}")
        elif path not in left:
            lines.append(f"{path}: the checkpoint has {right[path]}, the model has none")
        elif left[path] != right[path]:
            lines.append(f"{path}: the checkpoint has {right[path]}, the model wants {left[path]}")
    return lines


def check_same_tree(wanted: PyTree, found: PyTree, where: str) -> None:
    """Raises InputError naming the first leaves that differ."""
    lines = tree_differences(wanted, found)
    if lines:
        shown = "\n  ".join(lines[:5])
        raise InputError(f"{where} is of another model; {len(lines)} leaves differ:\n  {shown}")
