"""DINOv3 as timm keeps it: its class Eva, which has names and defaults of its own.

Of that class, which also makes EVA and other models with rotary positions, only DINOv3 is read: its
positions are ours. Arrays do not tell these models apart, so the config must name the architecture.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.interop.contents import Described, Source, choice, count_blocks, full_model
from vitjax.interop.layout import Leaf
from vitjax.interop.timm_names import names
from vitjax.interop.torch_names import vit_leaves

POOLS = {"token": "cls", "avg": "gap"}


def recognise(shapes: Mapping[str, tuple[int, ...]], architecture: str) -> bool:
    """Whether timm's class Eva made these arrays."""
    marks = ("blocks.0.gamma_1", "blocks.0.attn.q_bias", "rope.freqs")
    return any(name in shapes for name in marks) or "vit_pe_" in architecture


def describe(source: Source, preprocess: dict[str, Any]) -> Described:
    """The model of a folder with a config; `preprocess` is what that says.

    Raises:
      InputError: it is none of timm's DINOv3.
    """
    shapes, config, where = source.shapes, source.config, str(source.path)
    args, architecture = config.get("model_args") or {}, str(config.get("architecture", ""))
    if "dinov3" not in architecture:
        raise InputError(
            f"{where} is of timm's class Eva (architecture: {architecture or 'not given'}), of "
            "which only DINOv3 with its config.json is read; DINOv3 from a Hugging Face folder "
            "(dinov3_vit) is read too"
        )
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    gated, has_bias = "blocks.0.mlp.fc1_g.weight" in shapes, "blocks.0.attn.q_bias" in shapes
    pool = args.get("global_pool", config.get("global_pool"))
    model = full_model({
        "width": width, "depth": count_blocks(shapes, "blocks.{i}."), "patch_size": patch,
        "num_heads": args.get("num_heads") or (32 if width == 4096 else width // 64),
        "mlp_dim": shapes["blocks.0.mlp.fc2.weight"][1], "mlp": "gated" if gated else "dense",
        "activation": "silu" if gated else "gelu", "eps": 1e-5, "positions": "rope",
        "rope_theta": float(args.get("rope_temperature", 100.0)), "cls_token": True,
        "num_registers": shapes["reg_token"][1] if "reg_token" in shapes else 0,
        "pool": choice(pool or "avg", POOLS, "global_pool", where), "qkv_bias": has_bias,
        "key_bias": False, "layer_scale": float(args.get("init_values") or 1e-5),
        "norm_after_pool": "fc_norm.weight" in shapes,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
    })  # fmt: skip
    table = dataclasses.replace(
        names(model), layer_scale=("gamma_1", "gamma_2"), gate=("mlp.fc1_g", "mlp.fc1_x")
    )
    leaves = vit_leaves(model | {"qkv_bias": False}, table)  # the matrix alone is fused
    if has_bias:
        pair = ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias")
        leaves += (Leaf("blocks/attention/qv_bias", pair, "t (h k) -> t h k"),)
    return Described(architecture, model, preprocess, leaves, extra={"config": config})
