"""From a config to everything that a run needs, checked before any work starts."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vitjax import choices, parallel
from vitjax import config as config_lib
from vitjax import precision as precision_lib
from vitjax.config import Config
from vitjax.data.check import check_source
from vitjax.data.loader import Loader
from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.evals import evaluation
from vitjax.guard import Guard
from vitjax.models.functional import Model
from vitjax.optim import make_optimizer, store_in_bfloat16
from vitjax.state import TrainState, init_state, make_train_step, tree_bytes

PREPROCESS_KEYS = [field.name for field in dataclasses.fields(Preprocess)]
GUARD_KEYS = [field.name for field in dataclasses.fields(Guard)]
LOADER_KEYS = ["num_threads", "max_labels", "max_unreadable_fraction", "sampling", "repeats"]

# Without these, TPU v5e turns the gathers of small shards into all-reduces of twice the bytes.
# On v5p nothing that its compiler supports keeps it from doing so (LOG.md).
COMPILER_OPTIONS: dict[str, Any] = {
    "tpu": {
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
        "xla_enable_async_all_gather": "true",
    }
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
      train_step: pure, not jitted: (state, batch) -> (state, metrics).
      init_state: pure, not jitted: () -> state.
      state_shardings: of every leaf of the state.
      choices: what the config's model leaves open, as decided for these devices.

    No data is touched here, so that a run can be planned where its data is not.
    """

    config: Config
    mesh: Mesh
    precision: precision_lib.Precision
    preprocess: Preprocess
    model: Model
    objective: Any
    train_step: Callable
    init_state: Callable[[], TrainState]
    abstract_state: TrainState
    state_shardings: TrainState
    choices: dict[str, choices.Choice]

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global training batch, with their shardings."""
        return abstract_batch(self.config, self.mesh)

    @property
    def state_target(self) -> TrainState:
        """Shapes and shardings of the state: what a restore fills."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract_state,
            self.state_shardings,
        )

    def compile(self) -> Any:
        """The training step for this mesh, compiled ahead of its first call."""
        step = jax.jit(
            parallel.on_mesh(self.train_step, self.mesh),
            donate_argnums=0,
            out_shardings=(self.state_shardings, parallel.replicated(self.mesh)),
        )
        lowered = step.lower(self.state_target, self.abstract_batch)
        options = COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform)
        return lowered.compile(compiler_options=options)

    def fresh_state(self) -> TrainState:
        """Draws a state. Used once, so on CPUs it is compiled without optimising (LOG.md)."""
        init = jax.jit(self.init_state, out_shardings=self.state_shardings)
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options: Any = {"xla_backend_optimization_level": 0} if is_cpu else None
        return init.lower().compile(compiler_options=options)()

    def summary(self) -> str:
        """Sizes of model and state, and the devices, for people."""
        abstract, shards, mib = self.abstract_state, self.state_shardings, 2**20
        local = sum(
            math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
            for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shards), strict=True)
        )
        return (
            f"model: {self.model.num_params:,} parameters, "
            f"{self.model.flops_per_image / 1e9:,.3g} GFLOP an image forward (2 x MAC)\n"
            f"state: {tree_bytes(abstract) / mib:,.1f} MiB "
            f"(parameters {tree_bytes(abstract.params) / mib:,.1f}, "
            f"optimizer {tree_bytes(abstract.opt_state) / mib:,.1f}), "
            f"{local / mib:,.1f} MiB a device\n"
            f"devices: {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, "
            f"mesh {dict(self.mesh.shape)}"
            + ("\nchosen: " + "; ".join(c.reason for c in self.choices.values()))
            * bool(self.choices)
        )

    def contract(self, class_names: tuple[str, ...] | None) -> dict[str, Any]:
        """What a checkpoint says of itself to whoever loads it."""
        return {
            "format": "vitjax-1",
            "model": config_lib.plain(self.config.model),
            "description": dict(self.model.description),
            "preprocess": dataclasses.asdict(self.preprocess),
            "class_names": class_names if self.config.model.get("num_classes", 1) else None,
            "loss_type": getattr(self.objective, "loss_type", None),
            "precision": config_lib.plain(self.config.precision),
            "weights": list(self.objective.PLACES[0]),
        }


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = parallel.batch_sharding(mesh)
    size, rows = config.data.image_size, config.batch_size
    data, kind = config.data, np.int32
    labels = (rows,) if data.max_labels is None else (rows, data.max_labels)
    if data.num_targets is not None:
        labels, kind = (rows, data.num_targets), np.float32
    shapes = {
        "images": ((rows, size, size, data.channels), np.uint8),
        "labels": (labels, kind),
    }
    if data.num_inputs:
        shapes["inputs"] = (rows, data.num_inputs), np.float32
    if data.get("tokenizer"):
        if not isinstance(length := data.tokenizer.get("length"), int):
            raise InputError(f"data.tokenizer.length must be a number of tokens, got {length!r}")
        shapes["texts"] = (rows, length), np.int32
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _check_numbers(config: Config, mesh: Mesh) -> None:
    for name in ("total_steps", "batch_size", "log_every"):
        if config[name] < 1:
            raise InputError(f"{name} must be at least 1, got {config[name]}")
    for name in ("eval_every", "checkpoint_every"):
        if config[name] < 0:
            raise InputError(f"{name} must be 0 (only at the end) or more, got {config[name]}")
    shards, parts = parallel.batch_shards(mesh), config.optimizer.accumulation_steps
    if parts < 1:
        raise InputError(f"optimizer.accumulation_steps must be at least 1, got {parts}")
    if config.batch_size % (shards * parts):
        raise InputError(
            f"batch_size {config.batch_size} is not divisible by {shards} data-parallel devices "
            f"x {parts} accumulation steps = {shards * parts}"
        )


def make_preprocess(config: Config) -> Preprocess:
    return Preprocess(**{k: config.data[k] for k in PREPROCESS_KEYS})


def make_model(model: Any, preprocess: Preprocess, precision: precision_lib.Precision) -> Model:
    """The model that a config's block describes."""
    return config_lib.build(
        model,
        image_size=preprocess.image_size,
        channels=preprocess.channels,
        precision=precision,
    )


def build(config: Config, *, devices: list | None = None) -> Experiment:
    """Builds every part of a run from its config.

    Raises:
      InputError: anything in the config that cannot work, before anything is computed.
    """
    sizes = config_lib.plain(config.mesh)
    if sizes == "auto":
        from vitjax.planning import search, targets  # which build experiments themselves

        devices = jax.devices() if devices is None else devices
        sizes = search.choose_mesh(config, targets.of_devices(devices), devices)
    elif isinstance(sizes, str):
        raise InputError(f"mesh must be sizes of axes or 'auto', got {sizes!r}")
    mesh = parallel.make_mesh(sizes, devices)
    _check_numbers(config, mesh)
    if config.model.get("remat") == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise InputError('model.remat="offload" needs an accelerator; CPUs have one memory')
    precision = precision_lib.make_precision(**config.precision)
    preprocess = make_preprocess(config)
    model = make_model(config.model, preprocess, precision)
    rebuild = functools.partial(build, devices=devices)
    decided = choices.decide(config, mesh, precision, model, rebuild)
    if decided:
        values = {key: choice.value for key, choice in decided.items()}
        model = make_model(config_lib.plain(config.model) | values, preprocess, precision)
    objective = config_lib.build(
        config.objective,
        model=model,
        preprocess=preprocess,
        total_steps=config.total_steps,
        mesh=mesh,
    )
    batch = abstract_batch(config, mesh)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch)[0])

    settings = config_lib.plain(config.optimizer)
    parts, ema_decay = settings.pop("accumulation_steps"), settings.pop("ema_decay")
    offload = settings.pop("offload", False)
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise InputError(f"optimizer.ema_decay must be in (0, 1) or None, got {ema_decay}")
    judge = make_guard(config)
    if offload and judge.policy == "skip":
        raise InputError(
            'faults.policy="skip" cannot leave out an update whose optimizer state is offloaded; '
            'choose "rollback", or optimizer.offload=False'
        )
    schedule = config_lib.build(settings.pop("schedule"), total_steps=config.total_steps)
    algorithm = config_lib.build(settings.pop("algorithm"))
    if precision.optimizer == "bfloat16":
        algorithm = store_in_bfloat16(algorithm)
    optimizer = make_optimizer(
        params,
        algorithm=algorithm,
        schedule=schedule,
        total_steps=config.total_steps,
        frozen_blocks=config.model.get("frozen_blocks", 0),
        **settings,
    )

    def fresh():
        return init_state(
            objective, optimizer, batch, seed=config.seed, use_ema=ema_decay is not None
        )

    abstract_state = jax.eval_shape(fresh)
    state_shardings = parallel.tree_shardings(abstract_state, params, mesh)
    updater = optimizer
    if offload:
        on_device = state_shardings.opt_state
        on_host = parallel.on_host(abstract_state.opt_state, on_device, mesh)
        state_shardings = dataclasses.replace(state_shardings, opt_state=on_host)
        updater = parallel.fetching(optimizer, on_device, on_host)
    train_step = make_train_step(
        objective,
        updater,
        preprocess,
        learning_rate=lambda step: config.optimizer.peak_lr * schedule(step),
        augment=config_lib.build_all(config.augment),
        accumulation_steps=parts,
        ema_decay=ema_decay,
        judge=judge,
        layer_norms=config.monitor.layer_norms,
    )
    return Experiment(
        config=config,
        mesh=mesh,
        precision=precision,
        preprocess=preprocess,
        model=model,
        objective=objective,
        train_step=train_step,
        init_state=fresh,
        abstract_state=abstract_state,
        state_shardings=state_shardings,
        choices=decided,
    )


def make_tokenizer(config: Config) -> Any:
    """The tokenizer of the data's captions, or None.

    Raises:
      InputError: the text tower has another vocabulary.
    """
    if not config.data.get("tokenizer"):
        return None
    tokenizer = config_lib.build(config.data.tokenizer)
    tower = config.objective.get("text") or {}
    vocab_size = tower.get("vocab_size", tokenizer.vocab_size)
    if vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, but objective.text.vocab_size is "
            f"{vocab_size}"
        )
    return tokenizer


def make_guard(config: Config) -> Guard:
    """What judges the steps of a run."""
    return Guard(**{k: config.faults[k] for k in GUARD_KEYS})


def make_loader(
    config: Config,
    source: Any,
    preprocess: Preprocess,
    *,
    name: str = "data.source",
    training: bool,
    between: Callable[[], None] = lambda: None,
) -> Loader:
    """Opens a source of the config and checks it, also against the model's head.

    Args:
      name: of the source in the config, for messages.
      between: see Loader.
    """
    if not source.get("target"):
        raise InputError(f"{name}.target is not set: give the import path of a source")
    loaded = config_lib.build(source)
    widths = {
        "num_targets": getattr(loaded, "num_targets", None),
        "num_inputs": getattr(loaded, "num_inputs", 0),
    }
    for key, width in widths.items():
        if width != config.data[key]:
            raise InputError(f"{name} gives {width} for data.{key}, which is {config.data[key]}")
    tokenizer = make_tokenizer(config)
    if training and getattr(loaded, "has_captions", False) != (tokenizer is not None):
        raise InputError(
            f"{name} gives captions, but data.tokenizer is not set"
            if tokenizer is None
            else f"data.tokenizer is set, but {name} gives no captions"
        )
    head = config.model.get("num_classes", loaded.num_classes)
    if head and loaded.num_classes > head:
        raise InputError(
            f"the data has {loaded.num_classes} classes, more than the head's "
            f"model.num_classes={config.model.num_classes}"
        )
    check_source(loaded, name, every_class=training)
    transforms = config.data.transforms if training else ()
    loader = Loader(
        loaded,
        preprocess,
        transforms=config_lib.build_all(transforms, image_size=preprocess.image_size),
        tokenizer=tokenizer,
        between=between,
        **{k: config.data[k] for k in LOADER_KEYS},
    )
    if training:
        loader.order(config.seed)  # raises where the source cannot tell what it asks
    return loader


def make_evaluators(
    experiment: Experiment, between: Callable[[], None] = lambda: None
) -> dict[str, Callable[[TrainState], dict[str, float]]]:
    """The evaluators that the config names, with their data opened.

    What a block names `source`, `train_source` and the like is handed over as `loader`,
    `train_loader`; equal ones are opened once. `between` is called before each of their batches; it
    leaves the evaluation by raising.
    """
    config, evaluators, opened = experiment.config, {}, {}
    for name, block in config.evals.items():
        spec = config_lib.plain(block)
        loaders = {}
        for key, source in evaluation.take_sources(spec, f"evals.{name}").items():
            if repr(source) not in opened:
                opened[repr(source)] = make_loader(
                    config,
                    source,
                    experiment.preprocess,
                    name=f"evals.{name}.{key}",
                    training=False,
                    between=between,
                )
            loaders[evaluation.loader_name(key)] = opened[repr(source)]
        evaluators[name] = config_lib.build(
            spec, objective=experiment.objective, mesh=experiment.mesh, **loaders
        )
    return evaluators
