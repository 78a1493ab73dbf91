"""timm: state dicts alone, or folders with the config.json that timm writes.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads what is exported. MAE's and DINO's
first reference code name their arrays the same way.
"""

import math
from collections.abc import Mapping
from typing import Any

from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.interop.contents import (
    VIT,
    Described,
    Source,
    axis_sizes,
    choice,
    count_blocks,
    find_heads,
    full_model,
)
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.layout import Leaf
from vitjax.interop.processors import IMAGENET, unit_normalisation
from vitjax.interop.torch_names import Names, dense_leaves, norm_leaves, vit_leaves
from vitjax.interop.widen import unfit, widen

NAME = "timm"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
POOLS = {"token": "cls", "avg": "gap", "map": "map"}
FREE = (
    "width", "depth", "num_heads", "mlp_dim", "patch_size", "shape", "num_classes", "table_size",
    "pool", "norm_after_pool", "position_prefix", "cls_token", "num_registers", "distill_token",
    "distill_head", "pre_norm", "qkv_bias", "qk_norm", "qk_norm_bias", "layer_scale", "mlp",
    "activation", "eps",
)  # fmt: skip


def pool_leaves() -> list[Leaf]:
    p = "attn_pool."
    return [
        Leaf("pool/probe", f"{p}latent", "1 n d -> n d"),
        Leaf("pool/query/kernel", f"{p}q.weight", "(h k) d -> d h k"),
        Leaf("pool/query/bias", f"{p}q.bias", "(h k) -> h k"),
        Leaf("pool/key_value/kernel", f"{p}kv.weight", "(t h k) d -> d t h k"),
        Leaf("pool/key_value/bias", f"{p}kv.bias", "(t h k) -> t h k"),
        Leaf("pool/out/kernel", f"{p}proj.weight", "d (h k) -> h k d"),
        Leaf("pool/out/bias", f"{p}proj.bias"),
        *norm_leaves("pool/norm", f"{p}norm", True),
        *dense_leaves("pool/mlp/up", f"{p}mlp.fc1"),
        *dense_leaves("pool/mlp/down", f"{p}mlp.fc2"),
    ]


def names(model: Mapping[str, Any]) -> Names:
    return Names(
        patch="patch_embed.proj",
        cls="cls_token",
        distill="dist_token",
        registers="reg_token",
        positions="pos_embed",
        pre_norm="norm_pre",
        block="blocks.{i}.",
        norm1="norm1",
        norm2="norm2",
        qkv="attn.qkv",
        qk_norm=("attn.q_norm", "attn.k_norm"),
        out="attn.proj",
        up="mlp.fc1",
        gate="mlp.fc1",
        down="mlp.fc2",
        layer_scale=("ls1.gamma", "ls2.gamma"),
        norm="fc_norm" if model["norm_after_pool"] else "norm",
        head="head",
        distill_head="head_dist",
        pool=pool_leaves,
    )


def is_dino(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether arrays named as timm's are those of DINOv2's or DINOv3's own code."""
    has_registers = "storage_tokens" in shapes or "register_tokens" in shapes
    return has_registers or len(shapes.get("mask_token", ())) == 2  # MAE's has three dimensions


def recognise(source: Source) -> bool:
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    return all(name in source.shapes for name in needed) and not is_dino(source.shapes)


def _positions(
    shapes: Mapping[str, tuple[int, ...]], prefixes: Mapping[str, int], args: Mapping[str, Any]
) -> tuple[str, int]:
    """Which tokens have rows in the table, and the side of its grid."""
    rows = shapes["pos_embed"][1]
    order = ["cls", "none", "all"]
    if args.get("no_embed_class"):
        order = ["none"]
    for name in order:
        side = math.isqrt(max(rows - prefixes[name], 0))
        if side and side * side == rows - prefixes[name]:
            return name, side
    raise InputError(
        f"pos_embed has {rows} rows: no square grid of patches, with or without tokens"
    )


def _preprocess(config: Mapping[str, Any], size: int, channels: int, where: str) -> dict[str, Any]:
    given = config.get("pretrained_cfg") or {}
    if not {"mean", "std"} <= set(given):
        found: dict[str, Any] = {"image_size": size, "channels": channels, "crop_fraction": 0.875}
        return found | (IMAGENET if channels == 3 else {})
    interpolation = given.get("interpolation", "bicubic")
    mode = choice(
        given.get("crop_mode") or "center", {"center": 0, "squash": 1}, "crop_mode", where
    )
    return {
        "image_size": size,
        "channels": channels,
        "mean": tuple(map(float, given["mean"])),
        "std": tuple(map(float, given["std"])),
        "interpolation": choice(
            interpolation,
            {"bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos"},
            "interpolation",
            where,
        ),
        "resize": "squash" if mode else "shorter_side",
        "crop_fraction": 1.0 if mode else float(given.get("crop_pct") or 0.875),
    }


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The model of a state dict.

    Arrays tell nearly all of it; heads, activation and epsilon come from the config, or from what
    timm's models of the same name and shape have, which is then said.

    Raises:
      InputError: the shapes do not make a ViT, or the number of heads cannot be known.
    """
    given, shapes, config = given or {}, source.shapes, source.config
    where, architecture = str(source.path), str(config.get("architecture", ""))
    args = dict(config.get("model_args") or {})
    assumed = []
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    depth = count_blocks(shapes, "blocks.{i}.")
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        if name not in shapes:
            raise InputError(f"{where}: an MLP without {name} is not supported")
    up, down = shapes["blocks.0.mlp.fc1.weight"], shapes["blocks.0.mlp.fc2.weight"]
    heads, note = find_heads(width, depth, where, given.get("num_heads", args.get("num_heads")))
    has_cls, has_distill = "cls_token" in shapes, "dist_token" in shapes
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    options: dict[str, Any] = {
        "width": width, "depth": depth, "num_heads": heads, "mlp_dim": down[1],
        "patch_size": patch, "cls_token": has_cls, "distill_token": has_distill,
        "num_registers": registers, "distill_head": "head_dist.weight" in shapes,
        "mlp": "gated" if up[0] == 2 * down[1] else "dense",
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "qk_norm_bias": "blocks.0.attn.q_norm.bias" in shapes,
        "pre_norm": "norm_pre.weight" in shapes,
        "norm_after_pool": "fc_norm.weight" in shapes,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        "position_resampling": "bicubic_antialias",
    }  # fmt: skip
    if "blocks.0.ls1.gamma" in shapes:
        options["layer_scale"] = float(args.get("init_values") or 1e-5)
    pool = args.get("global_pool", config.get("global_pool"))
    if "attn_pool.latent" in shapes:
        options["pool"] = "map"
    elif pool in POOLS:
        options["pool"] = POOLS[pool]
    else:
        is_mean = options["norm_after_pool"] or not has_cls
        options["pool"] = "gap" if is_mean else "cls"
        assumed.append(f"the file does not say how tokens are pooled: {options['pool']!r}")
    if args.get("act_layer") is not None:
        options["activation"] = choice(args["act_layer"], ACTIVATIONS, "act_layer", where)
    elif options["mlp"] == "gated":
        options["activation"] = "silu"
    else:
        by_name = {"quickgelu": "quick_gelu", "siglip": "gelu_tanh"}
        found = [value for part, value in by_name.items() if part in architecture]
        options["activation"] = found[0] if found else "gelu"
        if not architecture and "activation" not in given:
            assumed.append("the file does not hold the activation: exact GELU, timm's default")
    options["eps"] = 1e-5 if "_clip_" in architecture else 1e-6
    if note and "num_heads" not in given:
        assumed.append(note)
    table = None
    if "pos_embed" in shapes:
        prefixes = {"cls": has_cls + has_distill, "none": 0}
        prefixes["all"] = prefixes["cls"] + registers
        options["position_prefix"], side = _positions(shapes, prefixes, args)
        options["positions"], table = "learned", side * patch
    else:
        options["positions"] = "none"
    input_size = (config.get("pretrained_cfg") or {}).get("input_size") or (0, 0, 0)
    size = int(table or args.get("img_size") or input_size[-1] or 224)
    if not (config.get("pretrained_cfg") or {}).get("mean"):
        assumed.append("no pretrained_cfg: ImageNet's mean and std, a centre crop of 0.875")
    model = full_model(options)
    return Described(
        family=architecture or "vision_transformer",
        model=model,
        preprocess=_preprocess(config, size, channels, where),
        leaves=vit_leaves(model | dict(given), names(model)),
        unused=(
            (r"decoder_.*|mask_token", "the decoder of masked images"),
            (r"(dino|ibot)_head\..*|head\.(mlp|last_layer).*", "the head of pretraining"),
        ),
        assumed=tuple(assumed),
        class_names=tuple(config["label_names"]) if config.get("label_names") else None,
        extra={"config": config},
    )


def _ratio(model: Mapping[str, Any]) -> float:
    """timm states the MLP's width as a ratio and cuts the product to an integer."""
    hidden = model["mlp_dim"] * (2 if model["mlp"] == "gated" else 1)
    ratio = hidden / model["width"]
    return ratio if int(model["width"] * ratio) == hidden else (hidden + 0.5) / model["width"]


def _pretrained_cfg(p: Preprocess, num_classes: int) -> dict[str, Any]:
    mean, std = unit_normalisation(p)
    return {
        "input_size": [p.channels, p.image_size, p.image_size],
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "interpolation": p.interpolation,
        "crop_pct": p.crop_fraction,
        "crop_mode": "squash" if p.resize == "squash" else "center",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }


def plan(e: Exported) -> ExportPlan:
    """Decides how the model is written.

    Raises:
      InputError: timm's VisionTransformer has no word for an option.
    """
    if e.model["target"] != VIT:
        raise InputError(f"--format=timm cannot express {e.model['target']}")
    pre = e.model["pre_norm"]  # in which case timm's patch embedding has no bias
    fixed = {
        "positions": "learned", "patch_bias": not pre, "out_bias": True, "mlp_bias": True,
        "norm_bias": True, "key_bias": True, "mask_token": False,
    }  # fmt: skip
    model, params, changed = widen(e.model, e.params, fixed, e.preprocess.image_size)
    if model["projection_dim"] and not model["num_classes"]:  # timm's CLIP towers keep it as head
        params["head/kernel"] = params.pop("projection/kernel")
        params["head/bias"] = params["head/kernel"][0] * 0
        model |= {"num_classes": model["projection_dim"], "projection_dim": None}
        changed.append("projection_dim")
    model["cls_token"] = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    problems = unfit(model, fixed, FREE)
    if model["pool"] == "cls_gap":
        problems.append("model.pool='cls_gap'")
    if model["pool"] == "map" and (model["cls_token"] or model["norm_after_pool"]):
        problems.append("model.pool='map' with a class token")
    if model["eps"] not in (1e-6, 1e-5):
        problems.append(f"model.eps={model['eps']} (1e-6 and 1e-5 only)")
    gated, distilled = model["mlp"] == "gated", model["distill_token"]
    if gated and (model["activation"] != "silu" or model["eps"] != 1e-6):
        problems.append(f"model.mlp='gated' with activation={model['activation']!r}")
    if distilled and (gated or not model["distill_head"] or model["eps"] != 1e-6):
        problems.append("model.distill_token=True without a head of its own")
    if model["qk_norm"] and not model["qk_norm_bias"]:
        problems.append("model.qk_norm_bias=False")
    if problems:
        raise InputError(
            f"--format=timm cannot express {' and '.join(problems)}; nothing was written"
        )
    base = "vit_base_patch16_224" if model["eps"] == 1e-6 else "vit_base_patch16_clip_224"
    base = "vit_giant_patch14_dinov2" if gated else base
    base = "deit_base_distilled_patch16_224" if distilled else base
    pools = {ours: theirs for theirs, ours in POOLS.items()}
    args: dict[str, Any] = {
        "img_size": model["table_size"] or e.preprocess.image_size,
        "patch_size": model["patch_size"],
        "in_chans": e.preprocess.channels,
        "embed_dim": model["width"],
        "depth": model["depth"],
        "num_heads": model["num_heads"],
        "mlp_ratio": _ratio(model),
        "qkv_bias": model["qkv_bias"],
        "qk_norm": model["qk_norm"],
        "init_values": model["layer_scale"],
        "class_token": model["cls_token"],
        "no_embed_class": model["position_prefix"] == "none",
        "reg_tokens": model["num_registers"],
        "pre_norm": pre,
        "fc_norm": model["norm_after_pool"],
        "global_pool": pools[model["pool"]],
        "dynamic_img_size": bool(model["table_size"]),
    }
    if not gated:
        args["act_layer"] = model["activation"]
    if distilled:
        args = {k: v for k, v in args.items() if k not in ("class_token", "reg_tokens")}
    config: dict[str, Any] = {
        "architecture": base,
        "num_classes": model["num_classes"],
        "num_features": model["width"],
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": _pretrained_cfg(e.preprocess, model["num_classes"]),
    }
    if e.class_names:
        config["label_names"] = list(e.class_names)
    return ExportPlan(
        family=base,
        leaves=vit_leaves(model, names(model)),
        params=params,
        sizes=axis_sizes(model, e.preprocess.channels),
        weights="model.safetensors",
        files={"config.json": config},
        metadata={"format": "pt"},
        usage='import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)',
        notes=tuple(f"model.{name} was rewritten as timm has it" for name in changed),
    )
