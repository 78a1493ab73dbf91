"""CLIP's own names, as OpenAI's and OpenCLIP's files have them: the vision tower is read."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.interop import timm
from vitjax.interop.contents import Described, Source, choice, count_blocks, find_heads, full_model
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.layout import Leaf
from vitjax.interop.processors import CLIP
from vitjax.interop.torch_names import Names, vit_leaves

NAME = "openclip"
TEXT = (
    r"transformer\..*|token_embedding\..*|positional_embedding|ln_final\..*|text_projection.*|"
    r"logit_scale|logit_bias|text\..*|attn_mask|input_resolution|context_length|vocab_size"
)
NAMES = Names(
    patch="visual.conv1",
    cls="visual.class_embedding",
    cls_pattern="d -> 1 d",
    positions="visual.positional_embedding",
    positions_pattern="",
    pre_norm="visual.ln_pre",
    block="visual.transformer.resblocks.{i}.",
    norm1="ln_1",
    norm2="ln_2",
    qkv="attn.in_proj",
    qkv_joint="_",
    out="attn.out_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    layer_scale=("ls_1.gamma", "ls_2.gamma"),
    norm="visual.ln_post",
    projection="visual.proj",
    projection_pattern="",
)
POOLS = {"tok": "cls", "avg": "gap"}
TRUNK, PROJECTION = "visual.trunk.", "visual.head.proj.weight"


def recognise(source: Source) -> bool:
    s = source.shapes
    return "visual.conv1.weight" in s or f"{TRUNK}patch_embed.proj.weight" in s


def _preprocess(
    config: Mapping[str, Any], size: int, assumed: list[str], where: str
) -> dict[str, Any]:
    given = config.get("preprocess_cfg") or {}
    if not given:
        assumed.append("no preprocess_cfg: CLIP's mean and std, a centre crop")
    found = {"image_size": size, "channels": 3, "interpolation": "bicubic"} | CLIP
    found |= {k: tuple(map(float, given[k])) for k in ("mean", "std") if k in given}
    interpolation = given.get("interpolation") or "bicubic"
    known = {name: name for name in ("bicubic", "bilinear")}
    found["interpolation"] = choice(interpolation, known, "interpolation", where)
    mode = given.get("resize_mode") or "shortest"
    modes = {"shortest": "shorter_side", "squash": "squash"}
    return found | {"resize": choice(mode, modes, "resize_mode", where)}


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The vision tower of a file.

    Raises:
      InputError: what only the config says (heads, GELU or quick-GELU) is not given.
    """
    given, shapes, where = given or {}, source.shapes, str(source.path)
    outer = source.config.get("model_cfg") or {}
    config, assumed = outer.get("vision_cfg") or {}, []
    if f"{TRUNK}patch_embed.proj.weight" in shapes:
        inner = dataclasses.replace(source, prefix=source.prefix + TRUNK, config={
            "architecture": config.get("timm_model_name", ""), "model_args": {},
            "global_pool": config.get("timm_pool"),
        })  # fmt: skip
        found = timm.describe(inner, given)
        preprocess = _preprocess(source.config, found.preprocess["image_size"], assumed, where)
        leaves = tuple(
            dataclasses.replace(
                leaf, theirs=TRUNK + leaf.theirs if isinstance(leaf.theirs, str)
                else tuple(TRUNK + name for name in leaf.theirs)
            )
            for leaf in found.leaves
        )  # fmt: skip
        kept = tuple(note for note in found.assumed if "pretrained_cfg" not in note)
        model = found.model
        if PROJECTION in shapes:
            model = model | {"projection_dim": shapes[PROJECTION][0]}
            leaves += (Leaf("projection/kernel", PROJECTION, "e d -> d e"),)
        return dataclasses.replace(
            found, model=model, leaves=leaves, preprocess=preprocess,
            unused=((TEXT, "the text tower"),), assumed=(*kept, *assumed), extra={},
        )  # fmt: skip
    width, _, patch, _ = shapes["visual.conv1.weight"]
    depth = count_blocks(shapes, NAMES.block)
    heads = given.get("num_heads")
    if not heads and config:
        heads = width // int(config.get("head_width", 64))
    heads, note = find_heads(width, depth, where, heads)
    assumed += [note] if note else []
    if "activation" in given:
        activation = given["activation"]
    elif outer:
        activation = "quick_gelu" if outer.get("quick_gelu") else "gelu"
        if (config.get("act_kwargs") or {}).get("approximate") == "tanh":
            activation = "gelu_tanh"
    else:
        raise InputError(
            f"{where} does not hold the activation; give --model.activation=quick_gelu for "
            "OpenAI's weights and those trained like them, or --model.activation=gelu"
        )
    if "visual.ln_pre.weight" not in shapes and not config:
        assumed.append("the file does not say how tokens are pooled: 'cls'; CLIPA has 'gap'")
    rows = shapes["visual.positional_embedding"][0] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise InputError(f"{where}: {rows} positions are no square grid of patches")
    model = full_model({
        "width": width, "depth": depth, "num_heads": heads, "patch_size": patch,
        "mlp_dim": shapes[f"{NAMES.block}mlp.c_fc.weight".format(i=0)][0],
        "pool": choice(config.get("pool_type", "tok"), POOLS, "pool_type", where),
        "norm_after_pool": bool(config.get("final_ln_after_pool")), "cls_token": True,
        "pre_norm": "visual.ln_pre.weight" in shapes, "patch_bias": False,
        "eps": float((config.get("norm_kwargs") or {}).get("eps", 1e-5)),
        "activation": activation, "position_resampling": "bicubic_antialias",
        "projection_dim": shapes["visual.proj"][1] if "visual.proj" in shapes else None,
        "layer_scale": 1e-5 if NAMES.block.format(i=0) + "ls_1.gamma" in shapes else None,
    })  # fmt: skip
    return Described(
        family="clip",
        model=model,
        preprocess=_preprocess(source.config, side * patch, assumed, where),
        leaves=vit_leaves(model, NAMES),
        unused=((TEXT, "the text tower"),),
        assumed=tuple(assumed),
    )


def plan(e: Exported) -> ExportPlan:
    raise InputError("--format=openclip is only read; write --format=hf or --format=timm")
