"""Rewriting a model, number for number, in the options that a format asks for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vitjax.interop.contents import DEFAULTS, RUNTIME
from vitjax.models.positions import sincos2d_positions

# A layer without a bias is one with a bias of zeros.
_BIASES = {
    "patch_bias": ("patch_embed/bias",),
    "out_bias": ("blocks/attention/out/bias",),
    "mlp_bias": ("blocks/mlp/up/bias", "blocks/mlp/down/bias"),
    "norm_bias": ("blocks/norm1/bias", "blocks/norm2/bias", "norm/bias", "pool/norm/bias"),
}


def _heads(params: Mapping[str, Any]) -> tuple[int, int, int]:
    depth, _, _, heads, dim = params["blocks/attention/qkv/kernel"].shape
    return depth, heads, dim


def _add_biases(option: str, params: dict[str, Any]) -> bool:
    for path in _BIASES[option]:
        like = path.replace("/bias", "/scale" if "norm" in path else "/kernel")
        if like not in params and not path.startswith("pool/"):
            return False
        if like not in params:
            continue
        shape = params[like].shape
        if "norm" not in path:
            shape = (shape[0], shape[-1]) if path.startswith("blocks/") else shape[-1:]
        params[path] = np.zeros(shape, np.float32)
    return True


def widen(
    model: Mapping[str, Any], params: Mapping[str, Any], wanted: Mapping[str, Any], image_size: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Gives a ViT the wanted options where that changes no result.

    Fixed positions become a table, missing rows and biases zeros, missing scales ones.

    Args:
      model: every option.
      params: the arrays, by path.
      wanted: the options that a format implies.

    Returns:
      options, arrays, and which options were changed.
    """
    model, params, changed = dict(model), dict(params), []

    def differs(option: str, value: Any, target: Any) -> bool:
        return model[option] == value and option in wanted and wanted[option] == target

    def done(option: str, value: Any) -> None:
        model[option] = value
        changed.append(option)

    width, patch = model["width"], model["patch_size"]
    if differs("positions", "sincos2d", "learned"):
        side = (model["table_size"] or image_size) // patch
        params["positions"] = sincos2d_positions(side, side, width)
        model["position_prefix"] = "none"
        done("positions", "learned")
    has_cls = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    if model["positions"] == "learned" and differs("position_prefix", "none", "cls"):
        if has_cls:
            rows = np.zeros((1 + model["distill_token"], width), np.float32)
            params["positions"] = np.concatenate([rows, np.asarray(params["positions"])])
        done("position_prefix", "cls")
    for option in _BIASES:
        can = model["mlp"] == "dense" or option != "mlp_bias"
        if can and differs(option, False, True) and _add_biases(option, params):
            done(option, True)
    depth, heads, dim = _heads(params)
    if differs("qkv_bias", False, True):
        params["blocks/attention/qkv/bias"] = np.zeros((depth, 3, heads, dim), np.float32)
        done("qkv_bias", True)
    elif model["qkv_bias"] and differs("key_bias", False, True):
        query_value = np.asarray(params.pop("blocks/attention/qv_bias"))
        zeros = np.zeros_like(query_value[:, :1])
        parts = [query_value[:, :1], zeros, query_value[:, 1:]]
        params["blocks/attention/qkv/bias"] = np.concatenate(parts, axis=1)
        done("key_bias", True)
    if differs("mask_token", True, False):  # used in pretraining alone
        del params["mask_token"]
        done("mask_token", False)
    if differs("mask_token", False, True):
        params["mask_token"] = np.zeros((1, width), np.float32)
        done("mask_token", True)
    if model["layer_scale"] is None and wanted.get("layer_scale") is not None:
        for index in (1, 2):
            params[f"blocks/layer_scale{index}"] = np.ones((depth, width), np.float32)
        done("layer_scale", 1.0)
    return model, params, changed


def unfit(model: Mapping[str, Any], fixed: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """The options of a model that a format cannot express, as "model.parallel=True".

    Args:
      fixed: what the format implies; every other option must have its default.
      free: what the format has words for.
    """
    found = []
    has_cls = model["cls_token"] or model["pool"] in ("cls", "cls_gap")
    for option, default in DEFAULTS.items():
        if option in (*free, *RUNTIME):
            continue
        wanted, value = fixed.get(option, default), model.get(option, default)
        value = tuple(value) if isinstance(value, list) else value  # from a file
        if option == "cls_token":
            wanted, value = bool(wanted), has_cls
        if option == "position_prefix" and (model["positions"] != "learned" or not has_cls):
            continue
        if option in ("stem_blocks", "stem_width") and model["stem"] != "resnet":
            continue
        if option == "rope_theta" and model["positions"] != "rope":
            continue
        if value != wanted:
            found.append(f"model.{option}={value!r}")
    return found
