"""Hugging Face folders: config.json, preprocessor_config.json, model.safetensors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vitjax.errors import InputError, suggest
from vitjax.interop import hf_conv
from vitjax.interop.contents import VIT, Described, Source, axis_sizes, full_model, number
from vitjax.interop.conv_layouts import ARCHITECTURES
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.hf_families import (
    FAMILIES,
    TOWERS,
    Family,
    read_sizes,
    siglip_pool,
    write_sizes,
)
from vitjax.interop.layout import Leaf
from vitjax.interop.processors import from_processor, to_processor
from vitjax.interop.torch_names import vit_leaves
from vitjax.interop.widen import unfit, widen

NAME = "hf"
MULTI_LABEL = "multi_label_classification"
OUTER = ("head", "distill_head", "projection")  # ours that lie outside of the encoder's prefix
COUNTERS = (r".*position_ids", "a counter")
TEXT = (r"text_model\..*|text_projection.*|logit_scale|logit_bias", "the text tower")
DECODER = (r"decoder\..*", "the decoder of masked images")


def recognise(source: Source) -> bool:
    return isinstance(source.config.get("model_type"), str)


def _leaves(model: Mapping[str, Any], family: Family, prefix: str) -> tuple[Leaf, ...]:
    heads = {"head": "classifier", "distill_head": ""}
    if model["distill_head"]:
        heads = {"head": "cls_classifier", "distill_head": "distillation_classifier"}
    names = dataclasses.replace(
        family.names, **heads, projection="visual_projection.weight", pool=lambda: siglip_pool("")
    )
    if model["mlp"] == "gated" and names.gate == "mlp.weights_in":  # DINOv2 g
        names = dataclasses.replace(names, down="mlp.weights_out")
    found = []
    for leaf in vit_leaves(model, names):
        if leaf.ours.split("/")[0] not in OUTER:
            inner = tuple(prefix + name for name in leaf.names)
            theirs = inner[0] if isinstance(leaf.theirs, str) else inner
            leaf = dataclasses.replace(leaf, theirs=theirs)
        found.append(leaf)
    return tuple(found)


def _find_prefix(source: Source, patch: str, where: str) -> str:
    ending = f"{patch}.weight"
    found = [n.removesuffix(ending) for n in source.shapes if n.endswith(ending)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if len(found) != 1:
        raise InputError(
            f"{where} describes a model whose patch embedding is {ending!r}; "
            f"the weights hold {len(found)} such arrays"
        )
    return found[0]


def _heads(source: Source, model_type: str, family: Family, where: str) -> dict[str, Any]:
    """The options that a classifier or a projection brings."""
    shapes, found = source.shapes, {}
    for name in ("cls_classifier.weight", "classifier.weight"):
        if name in shapes:
            found["num_classes"] = int(shapes[name][0])
    if "num_classes" in found and not family.architectures[1]:
        raise InputError(f"{where}: a classifier on model_type={model_type!r} is not supported")
    if "distillation_classifier.weight" in shapes:
        found["distill_head"] = True
    if "num_classes" in found and model_type.startswith("dinov2"):
        found["pool"] = "cls_gap"
    if "visual_projection.weight" in shapes:
        found["projection_dim"] = int(shapes["visual_projection.weight"][0])
    return found


def _class_names(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    labels = config.get("id2label") or {}
    names = [str(labels.get(str(i), labels.get(i, f"LABEL_{i}"))) for i in range(num_classes)]
    is_named = any(name != f"LABEL_{i}" for i, name in enumerate(names))
    return tuple(names) if is_named else None


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The model that a folder holds.

    Raises:
      InputError: a model type, or a setting of it, that has no counterpart here.
    """
    del given  # config.json says all
    where, config = f"{source.path} (config.json)", source.config
    model_type, unused = config["model_type"], [COUNTERS, DECODER]
    if model_type in hf_conv.MODEL_TYPES:
        found = hf_conv.describe(source)
        names = _class_names(config, found.model["num_classes"])
        return dataclasses.replace(found, class_names=names)
    if model_type in TOWERS:
        model_type = TOWERS[model_type]
        config = config.get("vision_config") or {}
        unused.append(TEXT)
    if model_type not in FAMILIES:
        allowed = (*FAMILIES, *TOWERS, *hf_conv.MODEL_TYPES)
        raise InputError(
            f"{where}: unknown model_type {model_type!r}; {suggest(model_type, allowed)}"
        )
    family = FAMILIES[model_type]
    prefix = _find_prefix(source, family.names.patch, where)
    inner = {n.removeprefix(prefix): s for n, s in source.shapes.items() if n.startswith(prefix)}
    options = dict(family.fixed) | {"position_resampling": family.resampling}
    if model_type.startswith("dinov2"):
        config = {"mlp_ratio": 4} | dict(config)
    options |= read_sizes(config, where)
    options |= family.read(config, inner, where)
    options |= _heads(source, model_type, family, where)
    if "mask_token" in family.free and family.names.mask in inner:
        options["mask_token"] = True
    if "siglip" in model_type:
        has_pool = "head.probe" in inner and not options.get("num_classes")
        options["pool"] = "map" if has_pool else "gap"
        if not has_pool:
            unused.append((r".*head\.(probe|attention|layernorm|mlp).*", "the pool, not used"))
    channels = int(number(config, "num_channels", where, 3))
    if model_type.startswith("siglip2"):
        table = math.isqrt(int(number(config, "num_patches", where))) * int(options["patch_size"])
    else:
        table = int(number(config, "image_size", where))
    assumed = []
    if source.processor:
        preprocess: dict[str, Any] = from_processor(
            source.processor, table, channels, f"{source.path} (preprocessor_config.json)"
        )
    else:
        preprocess = family.processor | {"image_size": table, "channels": channels}
        if channels != 3:
            preprocess |= {"mean": (0.5,), "std": (0.5,)}
        assumed.append(
            "no preprocessor_config.json: mean, std and resizing are those of the published "
            f"{model_type} models"
        )
    if options.get("positions") == "learned" and preprocess["image_size"] != table:
        options["table_size"] = table
    model = full_model(options)
    return Described(
        family=model_type,
        model=model,
        preprocess=preprocess,
        leaves=_leaves(model, family, prefix),
        unused=tuple(unused),
        assumed=tuple(assumed),
        class_names=_class_names(source.config, model["num_classes"]),
        loss_type="sigmoid" if source.config.get("problem_type") == MULTI_LABEL else None,
        extra={"config": config, "prefix": prefix},
    )


def _unfit(model: Mapping[str, Any], model_type: str) -> list[str]:
    """What of a model, already widened, a model type cannot express."""
    family = FAMILIES[model_type]
    found = unfit(model, family.fixed, family.free)
    has_head, pool = bool(model["num_classes"]), model["pool"]
    if has_head and not family.architectures[1]:
        found.append(f"model.num_classes={model['num_classes']}")
    if has_head and model["pre_logits_dim"]:
        found.append(f"model.pre_logits_dim={model['pre_logits_dim']} with a head")
    pools = {"dinov2": "cls_gap" if has_head else "cls", "siglip": "gap" if has_head else "map"}
    for start, wanted in pools.items():
        if model_type.startswith(start) and pool != wanted:
            found.append(f"model.pool={pool!r} {'with' if has_head else 'without'} a head")
    is_dino = model_type.startswith("dino")
    if is_dino and model["mlp"] == "gated" and model["activation"] != "silu":
        found.append(f"model.activation={model['activation']!r} in a gated MLP")
    if is_dino and model["layer_scale"] is None:
        found.append("model.layer_scale=None")
    if "registers" in model_type and not model["num_registers"]:
        found.append("model.num_registers=0")
    if model_type in ("dinov2_with_registers", "dinov3_vit") and not model["mask_token"]:
        found.append("model.mask_token=False")
    return found


def _wanted(model: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The options that a model type implies, for `widen`."""
    family = FAMILIES[model_type]
    always = {"patch_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True}
    wanted = always | {"key_bias": True} | family.fixed
    if "qkv_bias" not in family.free:
        wanted["qkv_bias"] = True
    if model_type.startswith("dino"):
        wanted |= {"layer_scale": 1.0, "mask_token": model_type != "dinov2" or model["mask_token"]}
    return {
        k: v
        for k, v in wanted.items()
        if k not in family.free or k in ("layer_scale", "mask_token")
    }


def _head_config(e: Exported) -> dict[str, Any]:
    """What a config says of the classes; nothing without a head."""
    count, names = e.model["num_classes"], e.class_names or ()
    if not count:
        return {}
    labels = [names[i] if i < len(names) else f"LABEL_{i}" for i in range(count)]
    is_multi = e.loss_type == "sigmoid"
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": MULTI_LABEL if is_multi else "single_label_classification",
    }


def _config(e: Exported, model: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    family, origin = FAMILIES[model_type], e.origin.get("extra", {})
    has_head = bool(model["num_classes"])
    architecture = family.architectures[has_head]
    if model["distill_head"]:
        architecture += "WithTeacher"
    if model["projection_dim"]:
        architecture += "WithProjection"
    config = dict(origin.get("config", {})) if e.origin.get("family") == model_type else {}
    config |= write_sizes(model) | family.write(model)
    side = model["table_size"] or e.preprocess.image_size
    if model_type.startswith("siglip2"):
        config["num_patches"] = (side // model["patch_size"]) ** 2
    else:
        config["image_size"] = side
    config |= {
        "model_type": model_type,
        "architectures": [architecture],
        "num_channels": e.preprocess.channels,
    }
    config |= _head_config(e)
    if model_type.startswith("siglip"):
        config["vision_use_head"] = not has_head
    if model_type.startswith("siglip") and has_head:
        outer = ("architectures", "id2label", "label2id", "problem_type")
        config = {
            "model_type": model_type.removesuffix("_vision_model"),
            **{key: config.pop(key) for key in outer},
            "vision_config": config,
        }
    return config


def plan(e: Exported) -> ExportPlan:
    """Decides how the model is written.

    Raises:
      InputError: no model type of transformers computes this model; names the options.
    """
    if e.model["target"] in ARCHITECTURES:
        return hf_conv.plan(e, _head_config(e))
    if e.model["target"] != VIT:
        raise InputError(f"--format=hf cannot express {e.model['target']}")
    first = e.origin.get("family") if e.origin.get("format") == NAME else None
    order = sorted(FAMILIES, key=lambda name: name != first)
    tried = []
    for model_type in order:
        wanted = _wanted(e.model, model_type)
        model, params, changed = widen(e.model, e.params, wanted, e.preprocess.image_size)
        problems = _unfit(model, model_type)
        tried.append((problems, model_type))
        if not problems:
            break
    else:
        problems, model_type = min(tried, key=lambda pair: len(pair[0]))
        raise InputError(
            "--format=hf cannot express this model: no model type of transformers has "
            f"{' and '.join(problems)} (nearest: {model_type}); nothing was written"
        )
    family = FAMILIES[model_type]
    config = _config(e, model, model_type)
    same = e.origin.get("family") == model_type
    needs_prefix = model["num_classes"] or (model["projection_dim"] and "clip" in model_type)
    prefix = family.prefix if needs_prefix else ""
    old = e.origin.get("extra", {})
    if same and old.get("config", {}).get("architectures") == config.get("architectures"):
        prefix = old.get("prefix", prefix)
    architecture = config["architectures"][0]
    return ExportPlan(
        family=model_type,
        leaves=_leaves(model, family, prefix),
        params=params,
        sizes=axis_sizes(model, e.preprocess.channels),
        weights="model.safetensors",
        files={"config.json": config, "preprocessor_config.json": to_processor(e.preprocess)},
        metadata={"format": "pt"},
        usage="import transformers\n\n"
        f"model = transformers.{architecture}.from_pretrained('FOLDER')",
        notes=tuple(f"model.{name} was rewritten as {model_type} has it" for name in changed),
    )
