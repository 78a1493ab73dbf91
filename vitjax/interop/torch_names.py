"""The table of a ViT as PyTorch code keeps it: linear weights [out, in], convolutions OIYX.

timm, Hugging Face, OpenCLIP and the DINO reference code differ in names alone; each gives its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vitjax.interop.layout import Leaf


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of one format; "" where it has no such array. Prefixes end in a dot.

    Attributes:
      block: prefix of a block, with "{i}".
      qkv: one name of the fused projection, or three.
      qkv_joint: between these names and "weight" or "bias".
      gate: one name of the gated MLP's fused first layer, or two (gate and the other).
      pool: makes the attention pool's leaves.
    """

    patch: str
    block: str
    norm1: str
    norm2: str
    qkv: str | tuple[str, str, str]
    out: str
    up: str
    down: str
    norm: str
    head: str = ""
    gate: str | tuple[str, str] = ""
    cls: str = ""
    cls_pattern: str = "1 1 d -> 1 d"
    distill: str = ""
    qkv_joint: str = "."
    registers: str = ""
    mask: str = ""
    mask_pattern: str = "1 1 d -> 1 d"
    positions: str = ""
    positions_pattern: str = "1 n d -> n d"
    patch_pattern: str = "d c y x -> (y x c) d"
    layer_scale: tuple[str, str] = ("", "")
    qk_norm: tuple[str, str] = ("", "")
    pre_norm: str = ""
    distill_head: str = ""
    pre_logits: str = ""
    projection: str = ""
    projection_pattern: str = "e d -> d e"
    pool: Callable[[], list[Leaf]] | None = None


def join(prefix: str, name: str | tuple[str, ...], suffix: str) -> Any:
    """Names with a prefix and a suffix, one or several."""
    if isinstance(name, str):
        return f"{prefix}{name}{suffix}"
    return tuple(f"{prefix}{n}{suffix}" for n in name)


def norm_leaves(ours: str, theirs: str, use_bias: bool) -> list[Leaf]:
    leaves = [Leaf(f"{ours}/scale", f"{theirs}.weight")]
    return [*leaves, Leaf(f"{ours}/bias", f"{theirs}.bias")] if use_bias else leaves


def dense_leaves(ours: str, theirs: str, use_bias: bool = True) -> list[Leaf]:
    leaves = [Leaf(f"{ours}/kernel", f"{theirs}.weight", "f d -> d f")]
    return [*leaves, Leaf(f"{ours}/bias", f"{theirs}.bias")] if use_bias else leaves


def _attention(model: Mapping[str, Any], n: Names) -> list[Leaf]:
    ours, fused = "blocks/attention", isinstance(n.qkv, str)
    kernel = "(s h k) d -> d s h k" if fused else "s (h k) d -> d s h k"
    leaves = [Leaf(f"{ours}/qkv/kernel", join(n.block, n.qkv, f"{n.qkv_joint}weight"), kernel)]
    if model["qkv_bias"] and model["key_bias"]:
        bias = "(s h k) -> s h k" if fused else "s (h k) -> s h k"
        leaves.append(Leaf(f"{ours}/qkv/bias", join(n.block, n.qkv, f"{n.qkv_joint}bias"), bias))
    elif model["qkv_bias"]:
        names = (n.qkv[0], n.qkv[2])
        leaves.append(Leaf(f"{ours}/qv_bias", join(n.block, names, ".bias"), "t (h k) -> t h k"))
    if model["qk_norm"]:
        for part, name in zip(("query", "key"), n.qk_norm, strict=True):
            leaves += norm_leaves(f"{ours}/{part}_norm", n.block + name, model["qk_norm_bias"])
    leaves.append(Leaf(f"{ours}/out/kernel", f"{n.block}{n.out}.weight", "d (h k) -> h k d"))
    if model["out_bias"]:
        leaves.append(Leaf(f"{ours}/out/bias", f"{n.block}{n.out}.bias"))
    return leaves


def _mlp(model: Mapping[str, Any], n: Names) -> list[Leaf]:
    has_bias = model["mlp_bias"]
    down = dense_leaves("blocks/mlp/down", n.block + n.down, has_bias)
    if model["mlp"] == "dense":
        return dense_leaves("blocks/mlp/up", n.block + n.up, has_bias) + down
    fused, ours = isinstance(n.gate, str), "blocks/mlp/gate_up"
    kernel = "(t f) d -> d t f" if fused else "t f d -> d t f"
    leaves = [Leaf(f"{ours}/kernel", join(n.block, n.gate, ".weight"), kernel)]
    if has_bias:
        bias = "(t f) -> t f" if fused else ""
        leaves.append(Leaf(f"{ours}/bias", join(n.block, n.gate, ".bias"), bias))
    return leaves + down


def vit_leaves(model: Mapping[str, Any], n: Names) -> tuple[Leaf, ...]:
    """The complete table of a ViT with these options under these names."""
    leaves = [Leaf("patch_embed/kernel", f"{n.patch}.weight", n.patch_pattern)]
    if model["patch_bias"]:
        leaves.append(Leaf("patch_embed/bias", f"{n.patch}.bias"))
    has_cls = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    for ours, theirs, pattern, is_there in (
        ("cls_token", n.cls, n.cls_pattern, has_cls),
        ("distill_token", n.distill, "1 1 d -> 1 d", model["distill_token"]),
        ("registers", n.registers, "1 n d -> n d", model["num_registers"]),
        ("mask_token", n.mask, n.mask_pattern, model["mask_token"]),
        ("positions", n.positions, n.positions_pattern, model["positions"] == "learned"),
    ):
        if is_there:
            leaves.append(Leaf(ours, theirs, pattern))
    has_norm_bias = model["norm_bias"]
    if model["pre_norm"]:
        leaves += norm_leaves("pre_norm", n.pre_norm, has_norm_bias)
    leaves += norm_leaves("blocks/norm1", n.block + n.norm1, has_norm_bias)
    leaves += _attention(model, n)
    if not model["parallel"]:
        leaves += norm_leaves("blocks/norm2", n.block + n.norm2, has_norm_bias)
    leaves += _mlp(model, n)
    if model["layer_scale"] is not None:
        for index, name in enumerate(n.layer_scale, 1):
            leaves.append(Leaf(f"blocks/layer_scale{index}", n.block + name))
    leaves += norm_leaves("norm", n.norm, has_norm_bias)
    if model["pool"] == "map" and n.pool is not None:
        leaves += n.pool()
    if model["pre_logits_dim"]:
        leaves += dense_leaves("pre_logits", n.pre_logits)
    if model["projection_dim"]:
        leaves.append(Leaf("projection/kernel", n.projection, n.projection_pattern))
    if model["num_classes"]:
        leaves += dense_leaves("head", n.head)
    if model["distill_head"]:
        leaves += dense_leaves("distill_head", n.distill_head)
    return tuple(leaves)
