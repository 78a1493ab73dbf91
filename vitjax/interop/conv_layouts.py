"""Convolutional networks in other formats: BiT and ConvNeXt of transformers, Google's BiT.

The tables are of `layout.Leaf`; the configs are those of transformers.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vitjax.errors import InputError
from vitjax.interop.contents import choice, number
from vitjax.interop.hf_families import ACTIVATIONS, THEIR_ACTIVATIONS
from vitjax.interop.layout import Leaf
from vitjax.interop.torch_names import dense_leaves, norm_leaves

BIT, CONVNEXT = "vitjax.models.bit:bit", "vitjax.models.convnext:convnext"
ARCHITECTURES = {
    BIT: ("bit", "BitModel", "BitForImageClassification"),
    CONVNEXT: ("convnext", "ConvNextModel", "ConvNextForImageClassification"),
}
KERNEL = "o c y x -> y x c o"


def _conv(ours: str, theirs: str, use_bias: bool = False) -> list[Leaf]:
    leaves = [Leaf(f"{ours}/kernel", f"{theirs}.weight", KERNEL)]
    return [*leaves, Leaf(f"{ours}/bias", f"{theirs}.bias")] if use_bias else leaves


def _bit_hf(model: Mapping[str, Any], prefix: str) -> list[Leaf]:
    leaves = _conv("root", f"{prefix}embedder.convolution")
    for stage, count in enumerate(model["blocks"]):
        for unit in range(count):
            ours = f"stage{stage + 1}/unit{unit + 1}"
            theirs = f"{prefix}encoder.stages.{stage}.layers.{unit}"
            for part in (1, 2, 3):
                leaves += norm_leaves(f"{ours}/norm{part}", f"{theirs}.norm{part}", True)
                leaves += _conv(f"{ours}/conv{part}", f"{theirs}.conv{part}")
            if unit == 0:
                leaves += _conv(f"{ours}/shortcut", f"{theirs}.downsample.conv")
    leaves += norm_leaves("norm", f"{prefix}norm", True)
    return leaves + (dense_leaves("head", "classifier.1") if model["num_classes"] else [])


def _convnext_hf(model: Mapping[str, Any], prefix: str) -> list[Leaf]:
    leaves = _conv("stem", f"{prefix}embeddings.patch_embeddings", True)
    leaves += norm_leaves("stem_norm", f"{prefix}embeddings.layernorm", True)
    for stage, count in enumerate(model["blocks"]):
        theirs = f"{prefix}encoder.stages.{stage}"
        if stage:
            down = f"{theirs}.downsampling_layer"
            leaves += norm_leaves(f"stage{stage + 1}/down_norm", f"{down}.0", True)
            leaves += _conv(f"stage{stage + 1}/down", f"{down}.1", True)
        for unit in range(count):
            ours, layer = f"stage{stage + 1}/unit{unit + 1}", f"{theirs}.layers.{unit}"
            leaves += _conv(f"{ours}/depthwise", f"{layer}.dwconv", True)
            leaves += norm_leaves(f"{ours}/norm", f"{layer}.layernorm", True)
            leaves += dense_leaves(f"{ours}/up", f"{layer}.pwconv1")
            leaves += dense_leaves(f"{ours}/down", f"{layer}.pwconv2")
            if model["layer_scale"] is not None:
                leaves.append(Leaf(f"{ours}/layer_scale", f"{layer}.layer_scale_parameter"))
    leaves += norm_leaves("norm", f"{prefix}layernorm", True)
    return leaves + (dense_leaves("head", "classifier") if model["num_classes"] else [])


def hf_leaves(model: Mapping[str, Any], names: Iterable[str] = ()) -> tuple[Leaf, ...]:
    """The table of a Hugging Face folder.

    Args:
      names: of the folder's arrays: they have a prefix in every class but the bare model's. To
        write, where there are none, the class with a classifier is meant wherever there is one.
    """
    outer = f"{ARCHITECTURES[model['target']][0]}."
    has_prefix = any(n.startswith(outer) for n in names) or bool(model["num_classes"])
    prefix = outer if has_prefix else ""
    make = _bit_hf if model["target"] == BIT else _convnext_hf
    return tuple(make(model, prefix))


def read_config(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """The model's block for a config of transformers.

    Raises:
      InputError: a setting that has no counterpart here.
    """
    widths: tuple[int, ...] = tuple(config.get("hidden_sizes") or ())
    blocks: tuple[int, ...] = tuple(config.get("depths") or ())
    if not widths or len(widths) != len(blocks):
        raise InputError(f"{where}: hidden_sizes={widths} and depths={blocks} do not match")
    if config["model_type"] == "convnext":
        stages = config.get("num_stages", len(blocks))
        if stages != len(blocks):
            raise InputError(f"{where}: num_stages={stages!r} does not match depths={blocks}")
        scale = float(config.get("layer_scale_init_value", 1e-6))
        head = shapes.get("classifier.weight", (0,))[0]
        return {
            "target": CONVNEXT,
            "size": None,
            "blocks": blocks,
            "widths": widths,
            "patch_size": int(number(config, "patch_size", where)),
            "activation": choice(config.get("hidden_act"), ACTIVATIONS, "hidden_act", where),
            "eps": float(number(config, "layer_norm_eps", where)),
            "layer_scale": scale if scale > 0 else None,
            "num_classes": int(head),
        }
    factor = config.get("width_factor", 1)
    for key, allowed in (
        ("layer_type", "preactivation"), ("hidden_act", "relu"), ("global_padding", None),
        ("embedding_dynamic_padding", False), ("output_stride", 32),
    ):  # fmt: skip
        if config.get(key, allowed) != allowed:
            raise InputError(f"{where}: {key}={config[key]!r} is not supported; only {allowed!r}")
    if factor != 1:
        raise InputError(f"{where}: width_factor={factor!r} is not supported; only 1")
    _check_widths(widths, f"{where}: hidden_sizes")
    return {
        "target": BIT,
        "blocks": blocks,
        "widths": widths,
        "root_width": int(number(config, "embedding_size", where)),
        "groups": int(config.get("num_groups", 32)),
        "num_classes": int(shapes.get("classifier.1.weight", (0,))[0]),
    }


def _check_widths(widths: tuple[int, ...], name: str) -> None:
    """transformers and timm round the inner channels, a quarter of these, to multiples of 8."""
    if any(width % 32 for width in widths):
        raise InputError(f"{name}={list(widths)} are not all divisible by 32, as BiT in torch has")


def write_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers for a model's block, apart from classes and channels."""
    blocks, widths = list(model["blocks"]), list(model["widths"])
    if model["target"] == BIT:
        _check_widths(tuple(widths), "model.widths")
        return {
            "depths": blocks,
            "hidden_sizes": widths,
            "embedding_size": model["root_width"],
            "num_groups": model["groups"],
            "layer_type": "preactivation",
            "hidden_act": "relu",
            "width_factor": 1,
        }
    return {
        "depths": blocks,
        "hidden_sizes": widths,
        "num_stages": len(blocks),
        "patch_size": model["patch_size"],
        "hidden_act": THEIR_ACTIVATIONS[model["activation"]],
        "layer_norm_eps": model["eps"],
        "layer_scale_init_value": model["layer_scale"] or 0.0,
    }


def timm_leaves(model: Mapping[str, Any]) -> tuple[Leaf, ...]:
    """The table of timm's `resnetv2_*_bit` and `convnext_*`."""
    is_bit = model["target"] == BIT
    leaves = _conv("root", "stem.conv") if is_bit else _conv("stem", "stem.0", True)
    leaves += [] if is_bit else norm_leaves("stem_norm", "stem.1", True)
    for stage, count in enumerate(model["blocks"]):
        if stage and not is_bit:
            ours, theirs = f"stage{stage + 1}/down", f"stages.{stage}.downsample"
            leaves += norm_leaves(f"{ours}_norm", f"{theirs}.0", True)
            leaves += _conv(ours, f"{theirs}.1", True)
        for unit in range(count):
            ours, theirs = f"stage{stage + 1}/unit{unit + 1}", f"stages.{stage}.blocks.{unit}"
            if is_bit:
                for part in (1, 2, 3):
                    leaves += norm_leaves(f"{ours}/norm{part}", f"{theirs}.norm{part}", True)
                    leaves += _conv(f"{ours}/conv{part}", f"{theirs}.conv{part}")
                leaves += _conv(f"{ours}/shortcut", f"{theirs}.downsample.conv") if not unit else []
                continue
            leaves += _conv(f"{ours}/depthwise", f"{theirs}.conv_dw", True)
            leaves += norm_leaves(f"{ours}/norm", f"{theirs}.norm", True)
            leaves += dense_leaves(f"{ours}/up", f"{theirs}.mlp.fc1")
            leaves += dense_leaves(f"{ours}/down", f"{theirs}.mlp.fc2")
            if model["layer_scale"] is not None:
                leaves.append(Leaf(f"{ours}/layer_scale", f"{theirs}.gamma"))
    leaves += norm_leaves("norm", "norm" if is_bit else "head.norm", True)
    if model["num_classes"] and is_bit:
        leaves.append(Leaf("head/kernel", "head.fc.weight", "f d 1 1 -> d f"))
        leaves.append(Leaf("head/bias", "head.fc.bias"))
    elif model["num_classes"]:
        leaves += dense_leaves("head", "head.fc")
    return tuple(leaves)


def _numberless(name: str) -> str:
    """A name of a BiT file without the number that some published files have in it."""
    return re.sub(r"standardized_conv2d_\d+/", "standardized_conv2d/", name)


def google_bit_leaves(model: Mapping[str, Any], names: Iterable[str] = ()) -> tuple[Leaf, ...]:
    """The table of Google's BiT files, which keep kernels as we do.

    Args:
      names: of the file's arrays; some files number their convolutions.
    """
    conv, norm = "standardized_conv2d/kernel", "group_norm"

    def scale_and_bias(ours: str, theirs: str) -> list[Leaf]:
        return [Leaf(f"{ours}/scale", f"{theirs}/gamma"), Leaf(f"{ours}/bias", f"{theirs}/beta")]

    leaves = [Leaf("root/kernel", f"resnet/root_block/{conv}")]
    for stage, count in enumerate(model["blocks"], 1):
        for unit in range(1, count + 1):
            ours, theirs = f"stage{stage}/unit{unit}", f"resnet/block{stage}/unit{unit:02d}"
            for part, letter in enumerate("abc", 1):
                leaves += scale_and_bias(f"{ours}/norm{part}", f"{theirs}/{letter}/{norm}")
                leaves.append(Leaf(f"{ours}/conv{part}/kernel", f"{theirs}/{letter}/{conv}"))
            if unit == 1:
                leaves.append(Leaf(f"{ours}/shortcut/kernel", f"{theirs}/a/proj/{conv}"))
    leaves += scale_and_bias("norm", f"resnet/{norm}")
    if model["num_classes"]:
        leaves.append(Leaf("head/kernel", "resnet/head/conv2d/kernel", "1 1 d f -> d f"))
        leaves.append(Leaf("head/bias", "resnet/head/conv2d/bias"))
    there = {_numberless(name): name for name in names}
    return tuple(
        dataclasses.replace(leaf, theirs=there.get(leaf.names[0], leaf.names[0])) for leaf in leaves
    )


def read_google_bit(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The model's block for Google's BiT file: all of it is in the shapes."""
    shapes = {_numberless(name): shape for name, shape in shapes.items()}
    blocks, widths = [], []
    conv = "standardized_conv2d/kernel"
    while f"resnet/block{len(blocks) + 1}/unit01/a/{conv}" in shapes:
        stage, count = len(blocks) + 1, 1
        while f"resnet/block{stage}/unit{count + 1:02d}/a/{conv}" in shapes:
            count += 1
        blocks.append(count)
        widths.append(shapes[f"resnet/block{stage}/unit01/c/{conv}"][-1])
    return {
        "target": BIT,
        "blocks": tuple(blocks),
        "widths": tuple(widths),
        "root_width": shapes[f"resnet/root_block/{conv}"][-1],
        "groups": 32,
        "num_classes": int(shapes.get("resnet/head/conv2d/bias", (0,))[0]),
    }
