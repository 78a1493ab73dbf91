"""timm: state dicts alone, or folders with the config.json that timm writes.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads what is exported. MAE's and DINO's
first reference code name their arrays the same way.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitjax.data.preprocess import Preprocess
from vitjax.errors import InputError
from vitjax.interop import timm_dinov3
from vitjax.interop.contents import (
    VIT,
    Described,
    Source,
    axis_sizes,
    choice,
    count_blocks,
    find_heads,
    full_model,
    number,
)
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.processors import IMAGENET, refuse_padding, unit_normalisation
from vitjax.interop.timm_names import is_dino, names
from vitjax.interop.torch_names import vit_leaves
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
# timm runs SigLIP with the exact GELU, though it was trained with the other; but not these.
TANH = r"(base_patch32|(giantopt|so400m)_patch16)_siglip_|large_patch16_siglip_(gap_)?512"
# Arguments that the arrays or the code below speak for, and those that change no result.
ARGUMENTS = (
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth",
    "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token",
    "pos_embed", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "act_layer",
    "pool_include_prefix", "num_reg_tokens", "use_fc_norm", "swiglu_mlp", "swiglu_align_to",
    "rope_temperature", "dynamic_img_size", "dynamic_img_pad", "drop_rate", "pos_drop_rate",
    "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
    "fix_init",
)  # fmt: skip
FREE = (
    "width", "depth", "num_heads", "mlp_dim", "patch_size", "shape", "num_classes", "table_size",
    "pool", "norm_after_pool", "position_prefix", "cls_token", "num_registers", "distill_token",
    "distill_head", "pre_norm", "qkv_bias", "qk_norm", "qk_norm_bias", "layer_scale", "mlp",
    "activation", "eps",
)  # fmt: skip


def recognise(source: Source) -> bool:
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    return all(name in source.shapes for name in needed) and not is_dino(source.shapes)


def _positions(
    rows: int, num_placed: int, num_registers: int, args: Mapping[str, Any]
) -> tuple[str, int]:
    """Which tokens have rows in the table (all or none in timm), and the side of its grid."""
    counts = {"none": 0}
    if not args.get("no_embed_class"):
        every = "all" if num_registers else "cls"
        counts = {every: num_placed + num_registers} | counts
    for name, count in counts.items():
        side = math.isqrt(max(rows - count, 0))
        if side and side * side == rows - count:
            return name, side
    raise InputError(
        f"pos_embed has {rows} rows: no square grid of patches, with or without tokens"
    )


def _preprocess(given: Mapping[str, Any], size: int, channels: int, where: str) -> dict[str, Any]:
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


def _heads(width: int, architecture: str, args: Mapping[str, Any]) -> int | None:
    """The number of heads of a folder with a config: stated, or of timm's architecture."""
    if args.get("num_heads") or "embed_dim" in args or not re.match("vit_|deit", architecture):
        return args.get("num_heads")
    if width in (1152, 1280, 1408, 1664) or re.search("giantopt_|base_patch16_gap_", architecture):
        return 16
    return width // 64


def _check(args: Mapping[str, Any], model: Mapping[str, Any], config: Any, where: str) -> None:
    """Raises InputError for what timm computes in a way that `vit` has no word for."""
    others = [
        f"{k}={v!r}" for k, v in args.items() if k not in ARGUMENTS and v not in (None, False)
    ]
    if re.search(r"_rpn_|relpos", str(config.get("architecture", ""))):  # the same names
        others.append(f"architecture={config['architecture']!r}")
    has_prefix, pools_all = model["cls_token"] or model["num_registers"], model["pool"] == "map"
    if model["pool"] != "cls" and has_prefix and pools_all != bool(args.get("pool_include_prefix")):
        others.append(f"pool_include_prefix={not pools_all} for a pool of {model['pool']!r}")
    if others:
        raise InputError(f"{where}: {', '.join(others)} has no counterpart here")


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The model of a state dict.

    Arrays tell nearly all of it; heads, activation and epsilon come from the config, or from what
    timm's models of the same name and shape have, which is then said.

    Raises:
      InputError: the shapes do not make a ViT, or the number of heads cannot be known.
    """
    given, shapes, config = given or {}, source.shapes, source.config
    where, architecture = str(source.path), str(config.get("architecture", ""))
    args, about = dict(config.get("model_args") or {}), config.get("pretrained_cfg") or config
    assumed = []
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    input_size = about.get("input_size") or (0, 0, 0)
    if timm_dinov3.recognise(shapes, architecture):
        size = int(number(args, "img_size", where, input_size[-1] or 224))
        found = timm_dinov3.describe(source, _preprocess(about, size, channels, where))
        _check(args, found.model, config, where)
        return found
    depth = count_blocks(shapes, "blocks.{i}.")
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        if name not in shapes:
            raise InputError(f"{where}: an MLP without {name} is not supported")
    up, down = shapes["blocks.0.mlp.fc1.weight"], shapes["blocks.0.mlp.fc2.weight"]
    is_gated = up[0] == 2 * down[1]
    heads = given.get("num_heads") or _heads(width, architecture, args)
    if (width, depth, is_gated) == (1536, 40, False):  # SigLIP 2's; DINOv2's has the same numbers
        heads = heads or 16
    heads, note = find_heads(width, depth, where, heads)
    has_cls, has_distill = "cls_token" in shapes, "dist_token" in shapes
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    options: dict[str, Any] = {
        "width": width, "depth": depth, "num_heads": heads, "mlp_dim": down[1],
        "patch_size": patch, "cls_token": has_cls, "distill_token": has_distill,
        "num_registers": registers, "distill_head": "head_dist.weight" in shapes,
        "mlp": "gated" if is_gated else "dense",
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
    elif pool:
        options["pool"] = choice(pool, POOLS, "global_pool", where)
    else:
        is_mean = options["norm_after_pool"] or not has_cls
        options["pool"] = "gap" if is_mean else "cls"
        assumed.append(f"the file does not say how tokens are pooled: {options['pool']!r}")
    if args.get("act_layer") is not None:
        options["activation"] = choice(args["act_layer"], ACTIVATIONS, "act_layer", where)
    elif options["mlp"] == "gated":
        options["activation"] = "silu"
    else:
        by_name = {"quickgelu": "quick_gelu", TANH: "gelu_tanh"}
        found = [value for part, value in by_name.items() if re.search(part, architecture)]
        options["activation"] = found[0] if found else "gelu"
        if "siglip" in architecture and not found and "activation" not in given:
            assumed.append(
                "timm computes this SigLIP with the exact GELU; it was trained with the other, "
                "--model.activation=gelu_tanh"
            )
        if not architecture and "activation" not in given:
            assumed.append("the file does not hold the activation: exact GELU, timm's default")
    options["eps"] = 1e-5 if "_clip_" in architecture else 1e-6
    if note and "num_heads" not in given:
        assumed.append(note)
    table = None
    if "pos_embed" in shapes:
        rows = shapes["pos_embed"][1]
        placed = _positions(rows, has_cls + has_distill, registers, args)
        options["position_prefix"], side = placed
        options["positions"], table = "learned", side * patch
    else:
        options["positions"] = "none"
    size = int(number(args, "img_size", where, table or input_size[-1] or 224))
    if table and args.get("dynamic_img_size") and input_size[-1] and input_size[-1] % patch == 0:
        size = input_size[-1]  # which timm brings images to; the table is made for img_size
        options["table_size"] = None if size == table else table
    if not about.get("mean"):
        assumed.append("no pretrained_cfg: ImageNet's mean and std, a centre crop of 0.875")
    model, labels = full_model(options), config.get("label_names")
    _check(args, model | dict(given), config, where)
    return Described(
        family=architecture or "vision_transformer",
        model=model,
        preprocess=_preprocess(about, size, channels, where),
        leaves=vit_leaves(model | dict(given), names(model)),
        unused=(
            (r"decoder_.*|mask_token", "the decoder of masked images"),
            (r"(dino|ibot)_head\..*|head\.(mlp|last_layer).*", "the head of pretraining"),
        ),
        assumed=tuple(assumed),
        class_names=tuple(labels) if isinstance(labels, list) else None,
        extra={"config": config},
    )


def _ratio(model: Mapping[str, Any]) -> float:
    """timm states the MLP's width as a ratio and cuts the product to an integer."""
    hidden = model["mlp_dim"] * (2 if model["mlp"] == "gated" else 1)
    ratio = hidden / model["width"]
    return ratio if int(model["width"] * ratio) == hidden else (hidden + 0.5) / model["width"]


def _pretrained_cfg(p: Preprocess, num_classes: int) -> dict[str, Any]:
    refuse_padding(p)
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
    gated, distilled = e.model["mlp"] == "gated", e.model["distill_token"]
    fixed = {
        "positions": "none" if e.model["positions"] == "none" else "learned",
        "patch_bias": not pre, "out_bias": True, "mlp_bias": True, "norm_bias": True,
        "key_bias": True, "mask_token": False,
    } | ({"position_prefix": "cls"} if distilled else {})  # fmt: skip
    model, params, changed = widen(e.model, e.params, fixed, e.preprocess.image_size)
    if model["projection_dim"] and not model["num_classes"]:  # timm's CLIP towers keep it as head
        params["head/kernel"] = params.pop("projection/kernel")
        params["head/bias"] = params["head/kernel"][0] * 0
        model |= {"num_classes": model["projection_dim"], "projection_dim": None}
        changed.append("projection_dim")
    has_cls = model["cls_token"] = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    registers, is_learned = model["num_registers"], model["positions"] == "learned"
    if registers and is_learned and model["position_prefix"] == "cls" and not distilled:
        if has_cls:  # timm's table has rows for all of these tokens, or for none
            first, others = np.split(np.asarray(params["positions"]), [1])
            zeros = np.zeros((registers, model["width"]), np.float32)
            params["positions"] = np.concatenate([first, zeros, others])
        model["position_prefix"] = "all" if has_cls else "none"
        changed.append("position_prefix")
    problems = unfit(model, fixed, FREE)
    if model["pool"] == "cls_gap":
        problems.append("model.pool='cls_gap'")
    if model["eps"] not in (1e-6, 1e-5):
        problems.append(f"model.eps={model['eps']} (1e-6 and 1e-5 only)")
    if gated and (model["activation"] != "silu" or model["eps"] != 1e-6 or model["pool"] == "map"):
        what = f"activation={model['activation']!r}, eps={model['eps']}, pool={model['pool']!r}"
        problems.append(f"model.mlp='gated' with {what}")
    if distilled and not (
        model["distill_head"] and model["pool"] == "cls" and model["eps"] == 1e-6 and is_learned
        and not (gated or registers or model["norm_after_pool"])
    ):  # fmt: skip
        problems.append("model.distill_token=True in other than DeiT's model")
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
        "class_token": has_cls,
        "no_embed_class": model["position_prefix"] == "none",
        "reg_tokens": registers,
        "pos_embed": "learn" if is_learned else "none",
        "pre_norm": pre,
        "fc_norm": model["norm_after_pool"],
        "global_pool": pools[model["pool"]],
        "dynamic_img_size": bool(model["table_size"]),
        "pool_include_prefix": model["pool"] == "map" and bool(has_cls or registers),
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
