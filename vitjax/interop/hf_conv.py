"""Hugging Face folders of convolutional networks: BiT and ConvNeXt."""

from typing import Any

from vitjax.interop.contents import Described, Source, number
from vitjax.interop.conv_layouts import ARCHITECTURES, hf_leaves, read_config, write_config
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.processors import HALF, IMAGENET, from_processor, to_processor

MODEL_TYPES = ("bit", "convnext")


def describe(source: Source) -> Described:
    """The network that a folder holds.

    Raises:
      InputError: a setting that has no counterpart here.
    """
    where, config = f"{source.path} (config.json)", source.config
    model = read_config(config, source.shapes, where)
    channels = int(number(config, "num_channels", where, 3))
    size = int(number(config, "image_size", where, 224))
    assumed = []
    if source.processor:
        beside = f"{source.path} (preprocessor_config.json)"
        preprocess = from_processor(source.processor, size, channels, beside)
    else:
        means = HALF if config["model_type"] == "bit" else IMAGENET
        preprocess = {"image_size": size, "channels": channels, "crop_fraction": 0.875} | means
        assumed.append("no preprocessor_config.json: mean and std are those of the releases")
    return Described(
        family=config["model_type"],
        model=model,
        preprocess=preprocess,
        leaves=hf_leaves(model, source.shapes),
        assumed=tuple(assumed),
        extra={"config": dict(config)},
    )


def plan(e: Exported, head: dict[str, Any]) -> ExportPlan:
    """Every BiT and ConvNeXt of ours can be written.

    Args:
      head: the config's part about classes.
    """
    model = full(e.model, e.params)
    model_type, *architectures = ARCHITECTURES[model["target"]]
    architecture = architectures[bool(model["num_classes"])]
    same = e.origin.get("family") == model_type
    config = dict(e.origin.get("extra", {}).get("config", {})) if same else {}
    config |= write_config(model) | head
    config |= {
        "model_type": model_type,
        "architectures": [architecture],
        "num_channels": e.preprocess.channels,
    }
    if model_type == "convnext":
        config["image_size"] = e.preprocess.image_size
    return ExportPlan(
        family=model_type,
        leaves=hf_leaves(model),
        params=e.params,
        sizes={},
        weights="model.safetensors",
        files={"config.json": config, "preprocessor_config.json": to_processor(e.preprocess)},
        metadata={"format": "pt"},
        usage="import transformers\n\n"
        f"model = transformers.{architecture}.from_pretrained('FOLDER')",
    )


def full(model: Any, params: Any) -> dict[str, Any]:
    """The block with its numbers in place of names, as the arrays have them."""
    found = dict(model)
    stages = sorted({p.split("/")[0] for p in params if p.startswith("stage")})
    found["blocks"] = tuple(
        len({p.split("/")[1] for p in params if p.startswith(f"{stage}/unit")}) for stage in stages
    )
    last = "conv3" if "bit" in found["target"] else "down"
    found["widths"] = tuple(params[f"{stage}/unit1/{last}/kernel"].shape[-1] for stage in stages)
    if "bit" in found["target"]:
        found["root_width"] = params["root/kernel"].shape[-1]
        found.setdefault("groups", 32)
    else:
        found["patch_size"] = params["stem/kernel"].shape[0]
        found["layer_scale"] = found.get("layer_scale", 1e-6)
        found.setdefault("activation", "gelu")
        found.setdefault("eps", 1e-6)
    return found
