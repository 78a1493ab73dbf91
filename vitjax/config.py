"""Configs: Python files with a `get_config`, overridden from the command line, locked.

A component is a block with a `target`, the import path of a class or function, and its arguments:
`{"target": "vitjax.objectives.supervised:Supervised", "label_smoothing": 0.1}`.
"""

import ast
import importlib
import inspect
import json
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitjax.errors import InputError, suggest

Config = Any  # an ml_collections.ConfigDict, whose keys no type checker can know
Block = Mapping[str, Any] | ConfigDict  # a component: its target and arguments


def base_config() -> Config:
    """Every key that a training config has, with its default; experiments assign from here."""
    return ConfigDict(
        {
            "seed": 0,
            "total_steps": 1000,
            "batch_size": 128,  # global
            "eval_every": 0,  # steps; 0: only at the end. Likewise below
            "log_every": 50,
            "checkpoint_every": 0,
            "model": {
                "target": "vitjax.models.vit:vit",
                "shape": None,  # a name such as "B/16", or the five numbers below
                "width": None,
                "depth": None,
                "mlp_dim": None,
                "num_heads": None,
                "patch_size": None,
                "num_classes": 1000,
                "stem": "patch",
                "stem_blocks": (3, 4, 9),
                "stem_width": 64,
                "pool": "gap",
                "norm_after_pool": False,
                "positions": "learned",
                "position_prefix": "cls",
                "table_size": None,
                "position_resampling": "bicubic_antialias",
                "rope_theta": 100.0,
                "cls_token": None,  # None: only where the pool needs it
                "num_registers": 0,
                "mask_token": False,
                "distill_token": False,
                "distill_head": False,
                "pre_norm": False,
                "patch_bias": True,
                "qkv_bias": True,
                "key_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "norm_bias": True,
                "qk_norm": False,
                "qk_norm_bias": False,
                "parallel": False,
                "layer_scale": None,
                "mlp": "dense",
                "activation": "gelu_tanh",
                "eps": 1e-6,
                "pre_logits_dim": None,
                "projection_dim": None,
                "dropout_rate": 0.0,
                "drop_path_rate": 0.0,
                "scan": None,  # None and "auto" here: what suits the devices, see choices.py
                "remat": "auto",
                "attention": "auto",
                "head_bias": 0.0,
                "input_sizes": (),  # numbers of each variable beside the image, a token each
                "lora_rank": 0,
                "lora_alpha": None,
                "lora_targets": ("qkv", "out"),
                "frozen_blocks": 0,  # of the first ones, with what comes before them
            },
            "objective": {
                "target": "vitjax.objectives.supervised:Supervised",
                "loss_type": "softmax",
                "label_smoothing": 0.0,
            },
            "data": {
                "root": "",  # where files lie; the sources of data and evals refer to it
                "source": {"target": ""},
                "image_size": 224,
                "channels": 3,
                "mean": (0.5,),
                "std": (0.5,),
                "value_range": (0.0, 1.0),
                "resize": "shorter_side",
                "crop_fraction": 1.0,
                "interpolation": "bicubic",
                "transforms": (),  # on the host, for training; without any, as at evaluation
                "sampling": "examples",  # or "classes", "groups": what comes equally often
                "repeats": 1,  # of an example in a row, each with other transforms
                "num_threads": None,  # that decode; None for one a core
                "num_ahead": 2,  # batches
                "max_labels": None,  # of an example, for multi-label data
                "num_targets": None,  # instead: labels are so many numbers, NaN where unknown
                "num_inputs": 0,  # numbers beside the image, NaN where unknown
                "tokenizer": None,  # {target, length, ...} for data with captions
                "max_unreadable_fraction": 0.01,
            },
            "augment": (),  # on the device, in order
            "optimizer": {
                "algorithm": {"target": "optax:scale_by_adam", "b1": 0.9, "b2": 0.999},
                "schedule": {"target": "vitjax.schedules:cosine", "warmup_steps": 0},
                "peak_lr": 1e-3,
                "weight_decay": 0.0,  # times the learning rate, as in AdamW
                "final_weight_decay": None,  # where half a cosine leads it; None: it stays
                "decay": ((".*/kernel", 1.0),),  # pattern and factor; the last match counts
                "layer_decay": None,
                "freeze": (),
                "clip_norm": 1.0,
                "accumulation_steps": 1,
                "offload": False,  # keep the optimizer's state in the host's memory
                "ema_decay": None,
            },
            "mesh": {"replica": 1, "fsdp": -1, "tensor": 1},  # or "auto", by --config.mesh=auto
            "precision": {
                "params": "float32",
                "compute": "auto",
                "gradients": "auto",  # as compute
                "optimizer": "float32",
                "products": "compute",  # or "fp8", for the blocks of wide models on new GPUs
            },
            "evals": {},  # name: {target, ...}
            "init": {
                "checkpoint": None,  # a run, a step, or weights in any format
                "skip": (),  # patterns of the model's arrays that start afresh
                "drop": (),  # patterns of the checkpoint's arrays that may be left over
            },
            "checkpoint": {
                "every_minutes": None,  # beside checkpoint_every; looked at when a step is logged
                "keep_last": 2,
                "keep_best": 1,
                "metric": None,  # such as "eval/test/accuracy"; None: no best
                "mode": "max",
                "at_steps": (),  # saved at these steps and never removed
                "at_powers_of": None,  # likewise at 1 and all powers of this number
                "max_failed_saves": 3,  # in a row; the run ends at the next
                "preempt_exit_code": 75,
            },
            "early_stop": {
                "metric": None,  # such as "eval/val/auroc"; None: never
                "mode": "max",
                "patience": 5,  # evaluations without a gain
                "min_delta": 0.0,  # that counts as one
            },
            "faults": {
                "policy": "stop",  # at a loss that is no number or jumps; or "skip", "rollback"
                "spike_factor": None,  # a loss above so many times its running mean is a jump
                "max_faults": 10,  # of a launch; the run stops at the next
                "watchdog_seconds": 1800.0,  # without a sign of life; 0: never
                "heartbeat_seconds": 100,  # until a silent process is taken for dead
            },
            "monitor": {
                "layer_norms": False,  # of gradients, parameters and updates, by layer
                "attention_logits": False,  # the largest by layer, at every logged step
                "attention_alarm": 100.0,  # an event when one is above this, or has doubled since
            },
        }
    )


def config_folder() -> Path:
    """Where the shipped configs lie: in the package once installed, else beside it."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def load_config(name: str, function: str = "get_config") -> Config:
    """Runs `get_config()`, or another function, of a file or of a shipped config by its name."""
    shipped = sorted(p.relative_to(config_folder()).with_suffix("").as_posix()
                     for p in config_folder().rglob("*.py"))  # fmt: skip
    path = Path(name)
    if not path.is_file():
        key = name.removeprefix("configs/").removesuffix(".py")
        if key not in shipped:
            raise InputError(
                f"no config {name!r}: neither a file nor shipped; {suggest(key, shipped)}"
            )
        path = config_folder() / f"{key}.py"
    try:
        get_config = runpy.run_path(str(path)).get(function)
    except SyntaxError as error:
        raise InputError(f"config {path}: {error}") from error
    if get_config is None:
        raise InputError(f"config {path} has no function {function}()")
    config = get_config()
    config.lock()
    return config


def parse_value(text: str) -> Any:
    """A Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _fit_type(value: Any, old: Any, key: str, flag: str) -> Any:
    """Checks a new value against the type of the old one, which None leaves open."""
    if isinstance(old, ConfigDict):
        raise InputError(f"--{flag}.{key} is a block; set one of its keys: {', '.join(old)}")
    if old is None or value is None:
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, str):
        return str(value)
    if isinstance(old, tuple | list):
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    if type(value) is not type(old):
        raise InputError(
            f"--{flag}.{key}={value!r} is of type {type(value).__name__}; "
            f"it must be {type(old).__name__}, as the default {old!r}"
        )
    return value


def override(config: Config, assignments: Iterable[str], flag: str = "config") -> Config:
    """Applies "optimizer.peak_lr=3e-4" and the like, in order, in place.

    Args:
      flag: what the command line calls the config, for messages.

    Raises:
      InputError: an unknown key (with the nearest real one), or a value of another type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--{flag}.{key} needs a value: --{flag}.{key}=VALUE")
        *parents, last = key.split(".")
        node: Any = config
        for depth, part in enumerate(parents):
            node = node[_member(node, part, ".".join(parents[: depth + 1]))]
        name = _member(node, last, key)
        if isinstance(node, tuple | list):
            raise InputError(f"--{flag}.{key} is a block; set one of its keys")
        if key == "mesh" and text == "auto":
            with config.ignore_type():
                config.mesh = "auto"
            continue
        is_word = isinstance(node[name], str) and text == "none"  # a choice, such as model.remat
        node[name] = _fit_type(text if is_word else parse_value(text), node[name], key, flag)
    return config


def _member(node: Any, part: str, key: str) -> str | int:
    """The key or index that `part` means in a block or a list of blocks."""
    if isinstance(node, tuple | list) and part.isdigit() and int(part) < len(node):
        return int(part)
    allowed = list(node) if isinstance(node, Mapping | ConfigDict) else []
    if isinstance(node, tuple | list):
        allowed = [str(i) for i in range(len(node))]
    if part not in allowed or isinstance(node, tuple | list):
        raise InputError(f"unknown config key {key!r}; {suggest(part, allowed)}")
    return part


def plain(value: Any) -> Any:
    """A config as plain dicts, tuples and numbers."""
    if isinstance(value, ConfigDict | Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(plain(v) for v in value)
    return value


def resolve(target: str) -> Any:
    """The object at "package.module:name"."""
    module, colon, name = target.partition(":")
    if not colon:
        raise InputError(f"target {target!r} is not of the form 'package.module:name'")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"target {target!r}: cannot import {module!r}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"target {target!r}: {suggest(part, [n for n in dir(found) if n[0] != '_'])}"
            )
        found = getattr(found, part)
    return found


def build(spec: Block, **given: Any) -> Any:
    """Calls a block's target with its arguments and the given ones.

    Of the given arguments those are passed that the target takes.

    Raises:
      InputError: no such target, or arguments that it does not take or still needs.
    """
    arguments: dict[str, Any] = plain(spec)
    target = arguments.pop("target", "")
    function = resolve(target)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters or name in given:
                allowed = [p for p in parameters if p not in given]
                raise InputError(f"{target} takes no argument {name!r}; {suggest(name, allowed)}")
        given = {k: v for k, v in given.items() if k in parameters}
    arguments |= given
    for name, parameter in parameters.items():
        is_plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_plain and parameter.default is parameter.empty and name not in arguments:
            raise InputError(
                f"{target} needs the argument {name!r}, which the config does not give"
            )
    return function(**arguments)


def build_all(specs: Sequence[Block], **given: Any) -> list[Any]:
    """Builds each block of a list."""
    return [build(spec, **given) for spec in specs]


def from_json(text: str) -> Config:
    """The config of a run directory; lists come back as tuples."""
    return ConfigDict(plain(json.loads(text)))


def from_plain(values: Mapping[str, Any]) -> Config:
    """A config of plain values, such as `plain` gave; unlocked."""
    return ConfigDict(plain(values))


def with_defaults(old: Mapping, defaults: Mapping) -> dict[str, Any]:
    """A recorded config with the keys that it lacks, being older than they are."""
    filled = dict(old)
    for key, value in defaults.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, Mapping) and isinstance(filled[key], Mapping):
            is_other = "target" in value and filled[key].get("target") != value["target"]
            filled[key] = filled[key] if is_other else with_defaults(filled[key], value)
    return filled


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """The dotted keys in which two plain configs differ."""
    keys = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return keys
