"""The vision models of Hugging Face's transformers: configs and names, in our terms and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.interop.contents import choice, number
from vitjax.interop.layout import Leaf
from vitjax.interop.processors import CLIP, HALF, IMAGENET
from vitjax.interop.torch_names import Names, dense_leaves, norm_leaves

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(list(ACTIVATIONS.items()))}

_ATTENTION = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
)
_BERT = Names(
    patch="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    distill="embeddings.distillation_token",
    registers="embeddings.register_tokens",
    mask="embeddings.mask_token",
    positions="embeddings.position_embeddings",
    block="encoder.layer.{i}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    qkv=_ATTENTION,
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    norm="layernorm",
    pre_logits="pooler.dense",
)
_DINOV2 = dataclasses.replace(
    _BERT,
    norm1="norm1",
    norm2="norm2",
    up="mlp.fc1",
    down="mlp.fc2",
    gate="mlp.weights_in",
    mask_pattern="1 d -> 1 d",
    layer_scale=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_DINOV3 = Names(
    patch="embeddings.patch_embeddings",
    cls="embeddings.cls_token",
    registers="embeddings.register_tokens",
    mask="embeddings.mask_token",
    block="layer.{i}.",
    norm1="norm1",
    norm2="norm2",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    gate=("mlp.gate_proj", "mlp.up_proj"),
    layer_scale=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="norm",
)
_CLIP = Names(
    patch="embeddings.patch_embedding",
    cls="embeddings.class_embedding",
    cls_pattern="d -> 1 d",
    positions="embeddings.position_embedding.weight",
    positions_pattern="",
    pre_norm="pre_layrnorm",
    block="encoder.layers.{i}.",
    norm1="layer_norm1",
    norm2="layer_norm2",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="post_layernorm",
)


def siglip_pool(prefix: str) -> list[Leaf]:
    """The attention pool under Hugging Face's names; torch keeps its three projections in one."""
    ours, theirs = "pool", f"{prefix}head.attention.in_proj_"
    return [
        Leaf("pool/probe", f"{prefix}head.probe", "1 n d -> n d"),
        Leaf(f"{ours}/query/kernel", f"{theirs}weight", "(h k) d -> d h k", (0, 1, 3)),
        Leaf(f"{ours}/query/bias", f"{theirs}bias", "(h k) -> h k", (0, 1, 3)),
        Leaf(f"{ours}/key_value/kernel", f"{theirs}weight", "(t h k) d -> d t h k", (1, 3, 3)),
        Leaf(f"{ours}/key_value/bias", f"{theirs}bias", "(t h k) -> t h k", (1, 3, 3)),
        Leaf("pool/out/kernel", f"{prefix}head.attention.out_proj.weight", "d (h k) -> h k d"),
        Leaf("pool/out/bias", f"{prefix}head.attention.out_proj.bias"),
        *norm_leaves("pool/norm", f"{prefix}head.layernorm", True),
        *dense_leaves("pool/mlp/up", f"{prefix}head.mlp.fc1"),
        *dense_leaves("pool/mlp/down", f"{prefix}head.mlp.fc2"),
    ]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
      fixed: options that its code implies.
      free: options that its config, or the arrays in the file, decide.
      read: (config, names, options so far) -> more options.
      write: options -> more of the config.
      architectures: class without and with a classifier; "" where there is none.
      prefix: of the encoder's names in the class with a classifier.
      processor: the contract of its releases, for files that come without one.
      resampling: what its code does at another size.
    """

    names: Names
    fixed: dict[str, Any]
    free: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    architectures: tuple[str, str]
    prefix: str
    processor: dict[str, Any]
    resampling: str = "bicubic"
    head: str = "classifier"


SIZES = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "activation", "eps")
_COMMON = (*SIZES, "shape", "num_classes", "table_size")


def read_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options that every config has."""
    ints = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "patch_size": "patch_size",
    }
    found: dict[str, Any] = {ours: int(number(config, key, where)) for ours, key in ints.items()}
    if "intermediate_size" in config:
        found["mlp_dim"] = int(number(config, "intermediate_size", where))
    else:
        ratio = number(config, "mlp_ratio", where)
        found["mlp_dim"] = int(found["width"] * ratio)
    found["activation"] = choice(config.get("hidden_act"), ACTIVATIONS, "hidden_act", where)
    found["eps"] = float(number(config, "layer_norm_eps", where))
    return found


def write_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["mlp_dim"],
        "patch_size": model["patch_size"],
        "hidden_act": THEIR_ACTIVATIONS[model["activation"]],
        "layer_norm_eps": model["eps"],
    }


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _read_vit(config, names, where):
    found: dict[str, Any] = {"qkv_bias": bool(config.get("qkv_bias", True))}
    if "pooler.dense.weight" in names:
        choice(config.get("pooler_act", "tanh"), {"tanh": 0}, "pooler_act", where)
        found["pre_logits_dim"] = names["pooler.dense.weight"][0]
    return found


def _write_vit(model):
    size = model["pre_logits_dim"]
    pooler = {"pooler_output_size": size, "pooler_act": "tanh"} if size else {}
    return {"qkv_bias": model["qkv_bias"], **pooler}


def _read_dinov2(config, names, where):
    width, gated = int(number(config, "hidden_size", where)), config.get("use_swiglu_ffn", False)
    hidden = int(width * number(config, "mlp_ratio", where, 4))
    found: dict[str, Any] = {
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "layer_scale": float(config.get("layerscale_value", 1.0)),
        "mlp": "gated" if gated else "dense",
        "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        "num_registers": int(config.get("num_register_tokens", 0)),
    }
    return found | ({"activation": "silu"} if gated else {})


def _write_dinov2(model):
    width, hidden, gated = model["width"], model["mlp_dim"], model["mlp"] == "gated"
    ratio = hidden // width
    if gated:  # the file states the ratio before two thirds of it are kept
        near = round(hidden * 1.5 / width)
        ratio = near if (int(width * near * 2 / 3) + 7) // 8 * 8 == hidden else 0
    if not ratio or (not gated and ratio * width != hidden):
        raise InputError(
            f"model.mlp_dim={hidden} is no whole multiple of model.width={width}, "
            "which dinov2's config needs (mlp_ratio)"
        )
    found = {
        "qkv_bias": model["qkv_bias"],
        "layerscale_value": model["layer_scale"],
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "use_mask_token": model["mask_token"],
    }
    registers = model["num_registers"]
    return found | ({"num_register_tokens": registers} if registers else {})


def _read_dinov3(config, names, where):
    biases = [bool(config.get(f"{part}_bias", True)) for part in ("query", "key", "value")]
    if biases[0] != biases[2] or (biases[1] and not biases[0]):
        raise InputError(f"{where}: query_bias, key_bias, value_bias = {biases} is not supported")
    gated = bool(config.get("use_gated_mlp", False))
    return {
        "qkv_bias": biases[0],
        "key_bias": biases[1] or not biases[0],
        "out_bias": bool(config.get("proj_bias", True)),
        "mlp_bias": bool(config.get("mlp_bias", True)),
        "mlp": "gated" if gated else "dense",
        "layer_scale": float(config.get("layerscale_value", 1.0)),
        "num_registers": int(config.get("num_register_tokens", 0)),
        "rope_theta": float(config.get("rope_theta", 100.0)),
    }


def _write_dinov3(model):
    has_bias = model["qkv_bias"]
    return {
        "query_bias": has_bias,
        "key_bias": has_bias and model["key_bias"],
        "value_bias": has_bias,
        "proj_bias": model["out_bias"],
        "mlp_bias": model["mlp_bias"],
        "use_gated_mlp": model["mlp"] == "gated",
        "layerscale_value": model["layer_scale"],
        "num_register_tokens": model["num_registers"],
        "rope_theta": model["rope_theta"],
    }


_CLS = {"pool": "cls", "cls_token": True, "positions": "learned", "position_prefix": "cls"}
_SQUASH = {"resize": "squash", "interpolation": "bilinear"}
_CROP = {"resize": "shorter_side", "interpolation": "bicubic"}

_vit = Family(
    _BERT, _CLS, (*_COMMON, "qkv_bias", "pre_logits_dim", "mask_token"), _read_vit, _write_vit,
    ("ViTModel", "ViTForImageClassification"), "vit.", HALF | _SQUASH,
)  # fmt: skip
_dinov2_free = (*_COMMON, "qkv_bias", "layer_scale", "mlp", "mask_token", "pool")
_siglip = Family(
    _CLIP, {"cls_token": False, "positions": "learned"}, (*_COMMON, "pool"), _nothing, _nothing,
    ("SiglipVisionModel", "SiglipForImageClassification"), "vision_model.",
    HALF | {"resize": "squash", "interpolation": "bicubic"},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "vit": _vit,
    "ijepa": dataclasses.replace(
        _vit,
        fixed={"pool": "gap", "cls_token": False, "positions": "learned"},
        free=(*_COMMON, "qkv_bias"),
        architectures=("IJepaModel", "IJepaForImageClassification"),
        prefix="ijepa.",
        processor=IMAGENET | _SQUASH,
    ),
    "siglip_vision_model": _siglip,
    "dinov2": Family(
        _DINOV2,
        _CLS,
        _dinov2_free,
        _read_dinov2,
        _write_dinov2,
        ("Dinov2Model", "Dinov2ForImageClassification"),
        "dinov2.",
        IMAGENET | _CROP | {"crop_fraction": 224 / 256},
    ),
    "dinov2_with_registers": Family(
        _DINOV2,
        _CLS,
        (*_dinov2_free, "num_registers"),
        _read_dinov2,
        _write_dinov2,
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        "dinov2_with_registers.",
        IMAGENET | _CROP | {"crop_fraction": 224 / 256},
        "bicubic_antialias",
    ),
    "dinov3_vit": Family(
        _DINOV3,
        _CLS | {"positions": "rope"},
        (
            *_COMMON,
            "qkv_bias",
            "key_bias",
            "out_bias",
            "mlp_bias",
            "mlp",
            "layer_scale",
            "num_registers",
            "rope_theta",
            "mask_token",
        ),
        _read_dinov3,
        _write_dinov3,
        ("DINOv3ViTModel", ""),
        "",
        IMAGENET | _SQUASH,
    ),
    "clip_vision_model": Family(
        _CLIP,
        _CLS | {"pre_norm": True, "patch_bias": False},
        (*_COMMON, "projection_dim"),
        _nothing,
        lambda model: {"projection_dim": model["projection_dim"] or 512},
        ("CLIPVisionModel", ""),
        "vision_model.",
        CLIP | _CROP,
    ),
    "deit": dataclasses.replace(
        _vit,
        fixed=_CLS | {"distill_token": True},
        free=(*_vit.free, "distill_head"),
        architectures=("DeiTModel", "DeiTForImageClassification"),
        prefix="deit.",
        processor=IMAGENET | _CROP | {"crop_fraction": 224 / 256},
    ),
    "vit_mae": dataclasses.replace(
        _vit,
        free=(*_COMMON, "qkv_bias"),
        write=lambda model: {"qkv_bias": model["qkv_bias"]},
        architectures=("ViTMAEModel", ""),
        processor=IMAGENET | _SQUASH,
    ),
    "siglip2_vision_model": dataclasses.replace(
        _siglip,
        names=dataclasses.replace(_CLIP, patch_pattern="d p -> p d"),
        architectures=("Siglip2VisionModel", "Siglip2ForImageClassification"),
        resampling="bilinear_antialias",
    ),
}
# Models of images and text, of which the vision tower is read.
TOWERS = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}
