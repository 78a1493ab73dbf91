"""The names of timm's VisionTransformer, which MAE and DINO's reference code share."""

from collections.abc import Mapping
from typing import Any

from vitjax.interop.layout import Leaf
from vitjax.interop.torch_names import Names, dense_leaves, norm_leaves


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
