"""Google's npz files: vision_transformer and AugReg, and big_vision."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.interop import conv_layouts, hf_conv
from vitjax.interop.contents import VIT, Described, Source, axis_sizes, count_blocks, full_model
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.layout import Leaf
from vitjax.interop.processors import unit_normalisation
from vitjax.interop.widen import unfit, widen
from vitjax.models.stems import stride_of

NAME = "npz"
BLOCK = "Transformer/encoderblock_{i}/"
STACKED = "Transformer/encoderblock/"
# Where vision_transformer numbers a block's layers in one sequence, big_vision does by kind.
LAYERS = {
    "vision_transformer": (0, 1, 2, 3),
    "big_vision": (0, 0, 1, 0),
}
LAYER_NAMES = ("LayerNorm_{}", "MultiHeadDotProductAttention_{}", "LayerNorm_{}", "MlpBlock_{}")
FREE = (
    "width", "depth", "num_heads", "mlp_dim", "patch_size", "shape", "num_classes", "table_size",
    "stem", "stem_blocks", "stem_width", "pool", "pre_logits_dim", "position_prefix", "cls_token",
    "positions",
)  # fmt: skip
# What the code of these files does with an image.
CONVENTION = {"mean": (0.5,), "std": (0.5,), "resize": "squash", "interpolation": "bilinear"}
ASSUMED = "npz holds no preprocessing: values in [-1, 1], squashed, as its code does"
FIXED = {"activation": "gelu_tanh", "eps": 1e-6}


UNIT = re.compile(r"block(\d+)/unit(\d+)/conv1/kernel$")
USAGE = "import numpy\n\nweights = numpy.load('FILE')"
BIT_ROOT = re.compile(r"resnet/root_block/standardized_conv2d(_\d+)?/kernel")


def _prefix(source: Source) -> str:
    """big_vision's contrastive models keep the image tower under "img/"."""
    return "img/" if any(n.startswith("img/embedding/") for n in source.shapes) else ""


def _is_bit(source: Source) -> bool:
    return any(BIT_ROOT.fullmatch(name) for name in source.shapes)


def _describe_bit(source: Source) -> Described:
    model = conv_layouts.read_google_bit(source.shapes)
    (root,) = (shape for name, shape in source.shapes.items() if BIT_ROOT.fullmatch(name))
    config = source.config if source.config.get("vitjax") else {}
    preprocess = config.get("preprocess")
    assumed = () if preprocess else (ASSUMED,)
    preprocess = preprocess or {"image_size": 224, "channels": root[2]} | CONVENTION
    names = config.get("class_names")
    return Described(
        family="bit",
        model=model,
        preprocess=preprocess,
        leaves=conv_layouts.google_bit_leaves(model, source.shapes),
        assumed=assumed,
        class_names=tuple(names) if names else None,
        loss_type=config.get("loss_type"),
    )


def recognise(source: Source) -> bool:
    return f"{_prefix(source)}embedding/kernel" in source.shapes or _is_bit(source)


def _layer_names(style: str) -> tuple[str, ...]:
    return tuple(n.format(i) for n, i in zip(LAYER_NAMES, LAYERS[style], strict=True))


def _norm(ours: str, theirs: str) -> list[Leaf]:
    return [Leaf(f"{ours}/scale", f"{theirs}/scale"), Leaf(f"{ours}/bias", f"{theirs}/bias")]


def _dense(ours: str, theirs: str) -> list[Leaf]:
    return [Leaf(f"{ours}/kernel", f"{theirs}/kernel"), Leaf(f"{ours}/bias", f"{theirs}/bias")]


def _attention(ours: str, theirs: str, *, is_pool: bool) -> list[Leaf]:
    qkv = tuple(f"{theirs}/{name}" for name in ("query", "key", "value"))
    leaves = []
    for part, kernel, bias in (
        ("kernel", "s d h k -> d s h k", ""),
        ("bias", "", "s h k -> s h k"),
    ):
        pattern = kernel or ""
        if is_pool:
            leaves.append(Leaf(f"{ours}/query/{part}", f"{qkv[0]}/{part}"))
            names = tuple(f"{name}/{part}" for name in qkv[1:])
            leaves.append(Leaf(f"{ours}/key_value/{part}", names, pattern or bias))
        else:
            names = tuple(f"{name}/{part}" for name in qkv)
            leaves.append(Leaf(f"{ours}/qkv/{part}", names, pattern or bias))
    return leaves + _dense(f"{ours}/out", f"{theirs}/out")


def _stem_blocks(names: Iterable[str]) -> tuple[int, ...]:
    """How many units each stage of a hybrid's ResNet has."""
    found = {tuple(map(int, m.groups())) for n in names if (m := UNIT.match(n))}
    stages = range(1, 1 + max((stage for stage, _ in found), default=0))
    return tuple(sum(stage == s for stage, _ in found) for s in stages)


def _stem(blocks: tuple[int, ...]) -> list[Leaf]:
    leaves = [Leaf("stem/root/kernel", "conv_root/kernel"), *_norm("stem/root_norm", "gn_root")]
    for stage, count in enumerate(blocks, 1):
        for unit in range(1, count + 1):
            ours, theirs = f"stem/stage{stage}/unit{unit}", f"block{stage}/unit{unit}"
            parts = [(f"conv{i}", f"norm{i}", f"conv{i}", f"gn{i}") for i in (1, 2, 3)]
            if unit == 1:
                parts.append(("shortcut", "shortcut_norm", "conv_proj", "gn_proj"))
            for conv, norm, their_conv, their_norm in parts:
                leaves.append(Leaf(f"{ours}/{conv}/kernel", f"{theirs}/{their_conv}/kernel"))
                leaves += _norm(f"{ours}/{norm}", f"{theirs}/{their_norm}")
    return leaves


def _leaves(model: Mapping[str, Any], style: str, block: str, prefix: str) -> tuple[Leaf, ...]:
    norm1, attention, norm2, mlp = _layer_names(style)
    leaves = [
        Leaf("patch_embed/kernel", "embedding/kernel", "y x c d -> (y x c) d"),
        Leaf("patch_embed/bias", "embedding/bias"),
    ]
    if model.get("stem") == "resnet":
        leaves += _stem(tuple(model["stem_blocks"]))
    if model["cls_token"]:
        leaves.append(Leaf("cls_token", "cls", "1 1 d -> 1 d"))
    if model["positions"] == "learned":
        name = (
            "Transformer/posembed_input/pos_embedding" if style != "big_vision" else "pos_embedding"
        )
        leaves.append(Leaf("positions", name, "1 n d -> n d"))
    leaves += _norm("blocks/norm1", block + norm1) + _norm("blocks/norm2", block + norm2)
    leaves += _attention("blocks/attention", block + attention, is_pool=False)
    leaves += _dense("blocks/mlp/up", f"{block}{mlp}/Dense_0")
    leaves += _dense("blocks/mlp/down", f"{block}{mlp}/Dense_1")
    leaves += _norm("norm", "Transformer/encoder_norm")
    if model["pool"] == "map":
        leaves.append(Leaf("pool/probe", "MAPHead_0/probe", "1 n d -> n d"))
        leaves += _attention("pool", "MAPHead_0/MultiHeadDotProductAttention_0", is_pool=True)
        leaves += _norm("pool/norm", "MAPHead_0/LayerNorm_0")
        leaves += _dense("pool/mlp/up", "MAPHead_0/MlpBlock_0/Dense_0")
        leaves += _dense("pool/mlp/down", "MAPHead_0/MlpBlock_0/Dense_1")
    if model["pre_logits_dim"]:
        leaves += _dense("pre_logits", "pre_logits")
    if model["num_classes"]:
        leaves += _dense("head", "head")
    return tuple(
        Leaf(leaf.ours, tuple(prefix + n for n in leaf.names), leaf.pattern)
        if not isinstance(leaf.theirs, str)
        else Leaf(leaf.ours, prefix + leaf.theirs, leaf.pattern)
        for leaf in leaves
    )


def describe(source: Source, given: Mapping[str, Any] | None = None) -> Described:
    """The model of a file; all of it is in the shapes, apart from the preprocessing.

    Raises:
      InputError: a position table that is no square grid.
    """
    del given
    if _is_bit(source):
        return _describe_bit(source)
    where, prefix = str(source.path), _prefix(source)
    inner = {n.removeprefix(prefix): s for n, s in source.shapes.items() if n.startswith(prefix)}
    is_stacked = any(name.startswith(STACKED) for name in inner)
    block = STACKED if is_stacked else BLOCK
    style = (
        "vision_transformer"
        if f"{block.format(i=0)}MlpBlock_3/Dense_0/kernel" in inner
        else "big_vision"
    )
    _, attention, _, mlp = _layer_names(style)
    first = block.format(i=0)
    for name in (f"{first}{attention}/query/kernel", f"{first}{mlp}/Dense_0/kernel"):
        if name not in inner:
            raise InputError(
                f"{where} has an embedding but no {prefix}{name}: not a ViT of Google's"
            )
    query, hidden = inner[f"{first}{attention}/query/kernel"], inner[f"{first}{mlp}/Dense_0/kernel"]
    depth = query[0] if is_stacked else count_blocks(inner, BLOCK)
    patch, _, channels, width = inner["embedding/kernel"]
    blocks = _stem_blocks(inner)
    if "conv_root/kernel" in inner:
        patch *= stride_of("resnet", 0, blocks)
        channels = inner["conv_root/kernel"][2]
    table = inner.get("Transformer/posembed_input/pos_embedding", inner.get("pos_embedding"))
    has_cls, has_map = "cls" in inner, "MAPHead_0/probe" in inner
    options: dict[str, Any] = {
        "width": width, "depth": depth, "num_heads": query[-2], "mlp_dim": hidden[-1],
        "patch_size": patch, "position_resampling": "bilinear_corners", "cls_token": has_cls,
        "pool": "map" if has_map else "cls" if has_cls else "gap",
        "position_prefix": "cls" if style == "vision_transformer" else "none",
        "positions": "learned" if table else "sincos2d",
    } | FIXED  # fmt: skip
    if "conv_root/kernel" in inner:
        root = inner["conv_root/kernel"][3]
        options |= {"stem": "resnet", "stem_blocks": blocks, "stem_width": root}
    if "pre_logits/kernel" in inner:
        options["pre_logits_dim"] = inner["pre_logits/kernel"][1]
    if "head/kernel" in inner:
        options["num_classes"] = inner["head/kernel"][1]
    config = source.config if source.config.get("vitjax") else {}
    assumed = []
    if table:
        patches = table[1] - (has_cls and options["position_prefix"] == "cls")
        side = math.isqrt(patches)
        if side * side != patches:
            raise InputError(f"{where}: {patches} positions are no square grid of patches")
        image_size = side * patch
    else:
        image_size = config.get("preprocess", {}).get("image_size", 224)
        assumed.append(f"no position table: sincos2d at {image_size} pixels")
    preprocess = config.get("preprocess")
    if preprocess is None:
        preprocess = {"image_size": image_size, "channels": channels} | CONVENTION
        assumed.append(ASSUMED)
    names = config.get("class_names")
    return Described(
        family=style,
        model=full_model(options),
        preprocess=preprocess,
        leaves=_leaves(options | {"pre_logits_dim": options.get("pre_logits_dim"),
                                  "num_classes": options.get("num_classes", 0)},
                       style, block, prefix),
        unused=((r"(txt|t|b)(/.*|$)", "the text tower"), (r"opt/.*", "optimizer state")),
        assumed=tuple(assumed),
        class_names=tuple(names) if names else None,
        loss_type=config.get("loss_type"),
        extra={"block": block, "prefix": prefix},
    )  # fmt: skip


def plan(e: Exported) -> ExportPlan:
    """vision_transformer's names where the class token has a position, else big_vision's.

    Raises:
      InputError: an option that neither code has.
    """
    if e.model["target"] == conv_layouts.BIT:
        model = hf_conv.full(e.model, e.params)
        return ExportPlan(
            family="bit", leaves=conv_layouts.google_bit_leaves(model), params=e.params, sizes={},
            weights="model.npz", files={}, usage=USAGE,
        )  # fmt: skip
    if e.model["target"] != VIT:
        raise InputError(f"--format=npz cannot express {e.model['target']}")
    old = e.origin.get("extra", {}) if e.origin.get("format") == NAME else {}
    wanted = FIXED | {
        "patch_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True,
        "qkv_bias": True, "key_bias": True,
    }  # fmt: skip
    model, params, changed = widen(e.model, e.params, wanted, e.preprocess.image_size)
    model["cls_token"] = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    problems = unfit(model, FIXED, FREE)
    if model["stem"] == "conv":
        problems.append("model.stem='conv'")
    has_cls, pool = model["cls_token"], model["pool"]
    if pool == "cls_gap" or has_cls != (pool == "cls"):
        problems.append(f"model.pool={pool!r} with cls_token={has_cls}")
    if model["positions"] not in ("learned", "sincos2d"):
        problems.append(f"model.positions={model['positions']!r}")
    if has_cls and model["position_prefix"] == "all":
        problems.append("model.position_prefix='all'")
    if problems:
        raise InputError(
            f"--format=npz cannot express {' and '.join(problems)}; nothing was written"
        )
    style = "big_vision"
    if has_cls and model["position_prefix"] == "cls" and model["positions"] == "learned":
        style = "vision_transformer"
    mean, std = unit_normalisation(e.preprocess)
    notes = [f"model.{name} was rewritten as {style} has it" for name in changed]
    if not all(abs(value - 0.5) < 1e-6 for value in (*mean, *std)):
        notes.append(f"Google's code feeds values in [-1, 1]; this model wants {mean}, {std}")
    return ExportPlan(
        family=style,
        leaves=_leaves(model, style, old.get("block", BLOCK), old.get("prefix", "")),
        params=params,
        sizes=axis_sizes(model, e.preprocess.channels),
        weights="model.npz",
        files={},
        usage=USAGE,
        notes=tuple(notes),
    )
