"""The reference checkpoints of DINOv2 and DINOv3."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitjax.errors import InputError
from vitjax.interop.contents import Described, Source, count_blocks, find_heads, full_model
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.processors import IMAGENET
from vitjax.interop.timm_names import is_dino, names
from vitjax.interop.torch_names import vit_leaves

NAME = "dinov2"
UNUSED = (
    (r"(dino|ibot)_head\..*|head\..*", "the head of pretraining"),
    (r"rope_embed\.periods|.*bias_mask", "computed from the options"),
    (r"local_cls_norm\..*", "the norm of small crops in pretraining"),
)


def recognise(source: Source) -> bool:
    s = source.shapes
    has_parts = "patch_embed.proj.weight" in s and "blocks.0.attn.qkv.weight" in s
    return has_parts and is_dino(s)


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The model of a state dict; DINOv3's are known by their storage tokens.

    Raises:
      InputError: the shapes do not make such a model.
    """
    given, shapes, where = given or {}, source.shapes, str(source.path)
    is_v3 = "storage_tokens" in shapes
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    depth = count_blocks(shapes, "blocks.{i}.")
    assumed = []
    registers = "storage_tokens" if is_v3 else "register_tokens"
    options: dict[str, Any] = {
        "width": width, "depth": depth, "patch_size": patch, "pool": "cls", "cls_token": True,
        "mask_token": True, "eps": 1e-5 if is_v3 else 1e-6, "activation": "gelu",
        "num_registers": shapes[registers][1] if registers in shapes else 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "position_resampling": "bicubic_antialias" if registers in shapes else "bicubic",
    }  # fmt: skip
    gate: Any = ""
    if is_v3:
        if "rope_embed.periods" not in shapes:
            raise InputError(f"{where} holds storage_tokens but no rope_embed.periods, as DINOv3's")
        quarter = shapes["rope_embed.periods"][0]  # a period for each axis and pair of numbers
        options |= {"num_heads": width // (4 * quarter), "positions": "rope"}
        periods = source.read("rope_embed.periods").astype(np.float64)
        theta = float(periods[-1] ** (quarter / max(quarter - 1, 1)))
        options["rope_theta"] = float(f"{theta:.3g}")  # the file has it in bfloat16 at times
    else:
        options["num_heads"], note = find_heads(width, depth, where, given.get("num_heads"))
        assumed += [note] if note else []
    if "blocks.0.mlp.w12.weight" in shapes:
        options |= {"mlp_dim": shapes["blocks.0.mlp.w3.weight"][1], "mlp": "gated"}
        gate, down = "mlp.w12", "mlp.w3"
    elif "blocks.0.mlp.w1.weight" in shapes:
        options |= {"mlp_dim": shapes["blocks.0.mlp.w3.weight"][1], "mlp": "gated"}
        gate, down = ("mlp.w1", "mlp.w2"), "mlp.w3"
    else:
        options["mlp_dim"], down = shapes["blocks.0.mlp.fc1.weight"][0], "mlp.fc2"
    options["activation"] = "silu" if gate else "gelu"
    size = 224
    if not is_v3:
        side = math.isqrt(shapes["pos_embed"][1] - 1)
        if side * side != shapes["pos_embed"][1] - 1:
            raise InputError(
                f"{where}: pos_embed has {shapes['pos_embed'][1]} rows, no square grid"
            )
        size = side * patch
    model = full_model(options)
    table = dataclasses.replace(
        names(model), registers=registers, mask="mask_token", mask_pattern="1 d -> 1 d",
        gate=gate, down=down,
    )  # fmt: skip

    def read(name: str) -> np.ndarray:
        array, mask = source.read(name), re.sub(r"bias$", "bias_mask", name)
        if name.endswith("attn.qkv.bias") and mask in shapes:  # DINOv3's keys have none
            third = len(array) // 3
            array = array.copy()
            array[third : 2 * third] = 0
        return array

    assumed.append("the file holds no preprocessing: ImageNet's mean and std")
    return Described(
        family="dinov3" if is_v3 else "dinov2",
        model=model,
        preprocess={"image_size": size, "channels": channels} | IMAGENET,
        leaves=vit_leaves(model, table),
        unused=UNUSED,
        assumed=tuple(assumed),
        read=read,
    )


def plan(e: Exported) -> ExportPlan:
    raise InputError("--format=dinov2 is only read; write --format=hf, which holds the same model")
