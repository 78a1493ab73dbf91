"""The published families of Vision Transformers by name: which options of `vit` make them.

    config.model.update(families.options("dinov2", "B/14"))

gives a config the model of DINOv2's base release; the numbers in it stay to be read and changed.
"""

import dataclasses
from typing import Any

from vitjax.errors import InputError, suggest


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share everything but their size.

    Attributes:
      options: of `vitjax.models.vit:vit`, where they differ from its defaults.
      sizes: the sizes that were published, with what each changes.
      image_size: pixels, of the released weights where they agree.
      source: the paper or the code.
    """

    options: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    image_size: int
    source: str


def _plain(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {} for name in names}


_CLS = {"pool": "cls", "cls_token": True}
_TORCH = {"activation": "gelu", "position_resampling": "bicubic_antialias"}
_GOOGLE = {"activation": "gelu_tanh", "position_resampling": "bilinear_corners"}
_SWIGLU = {"mlp": "gated", "activation": "silu"}
_CLIP = _CLS | _TORCH | {"pre_norm": True, "patch_bias": False, "eps": 1e-5}
_DINOV2 = _CLS | _TORCH | {"mask_token": True, "layer_scale": 1e-5}
_DINOV2_SIZES = _plain("S/14", "B/14", "L/14") | {
    "g/14": {"shape": "g-opt/14", "num_heads": 24, "mlp_dim": 4096} | _SWIGLU
}

FAMILIES: dict[str, Family] = {
    "vit": Family(
        _CLS | _GOOGLE,
        _plain("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/32", "L/16", "H/14"),
        224,
        "Dosovitskiy et al. 2021 (arXiv 2010.11929); AugReg, Steiner et al. 2022 (2106.10270)",
    ),
    "big_vision": Family(
        {"pool": "gap", "positions": "sincos2d"} | _GOOGLE,
        _plain("S/16", "B/16", "L/16"),
        224,
        "Beyer et al. 2022 (arXiv 2205.01580)",
    ),
    "scaling": Family(
        {"pool": "map"} | _GOOGLE,
        _plain("S/16", "B/16", "L/16", "So150m/14", "So400m/14", "g/14", "G/14", "e/14"),
        224,
        "Zhai et al. 2022 (arXiv 2106.04560); SoViT, Alabdulmohsin et al. 2023 (2305.13035)",
    ),
    "deit": Family(
        _CLS | _TORCH | {"distill_token": True, "distill_head": True},
        _plain("Ti/16", "S/16", "B/16"),
        224,
        "Touvron et al. 2021 (arXiv 2012.12877), distilled",
    ),
    "deit3": Family(
        _CLS | _TORCH | {"position_prefix": "none", "layer_scale": 1e-4},
        {
            "S/16": {},
            "M/16": {"width": 512, "depth": 12, "mlp_dim": 2048, "num_heads": 8, "patch_size": 16},
            **_plain("B/16", "L/16", "H/14"),
        },
        224,
        "Touvron et al. 2022 (arXiv 2204.07118)",
    ),
    "mae": Family(
        _CLS | _TORCH, _plain("B/16", "L/16", "H/14"), 224, "He et al. 2022 (arXiv 2111.06377)"
    ),
    "ijepa": Family(
        {"pool": "gap"} | _TORCH, _plain("H/14", "H/16"), 224, "Assran et al. 2023 (2301.08243)"
    ),
    "siglip": Family(
        {"pool": "map"} | _GOOGLE,
        _plain("B/16", "L/16", "So400m/14"),
        224,
        "Zhai et al. 2023 (arXiv 2303.15343)",
    ),
    "siglip2": Family(
        {"pool": "map"} | _GOOGLE,
        _plain("B/32", "B/16", "L/16", "So400m/14", "So400m/16", "g-opt/16"),
        256,
        "Tschannen et al. 2025 (arXiv 2502.14786)",
    ),
    "clip": Family(
        _CLIP | {"activation": "quick_gelu"},
        {
            "B/32": {"projection_dim": 512},
            "B/16": {"projection_dim": 512},
            "L/14": {"projection_dim": 768},
        },
        224,
        "Radford et al. 2021 (arXiv 2103.00020)",
    ),
    "openclip": Family(
        _CLIP,
        {
            "B/32": {"projection_dim": 512},
            "B/16": {"projection_dim": 512},
            "L/14": {"projection_dim": 768},
            "H/14": {"projection_dim": 1024},
            "g/14": {"projection_dim": 1024},
            "G/14": {"projection_dim": 1280},
        },
        224,
        "Cherti et al. 2023 (arXiv 2212.07143)",
    ),
    "dinov2": Family(_DINOV2, _DINOV2_SIZES, 518, "Oquab et al. 2024 (arXiv 2304.07193)"),
    "dinov2_registers": Family(
        _DINOV2 | {"num_registers": 4}, _DINOV2_SIZES, 518, "Darcet et al. 2024 (2309.16588)"
    ),
    "dinov3": Family(
        _CLS
        | _TORCH
        | {
            "positions": "rope",
            "num_registers": 4,
            "mask_token": True,
            "layer_scale": 1e-5,
            "key_bias": False,
            "eps": 1e-5,
        },
        {
            "S/16": {},
            "S+/16": {"shape": "S/16"} | _SWIGLU,
            "B/16": {},
            "L/16": {},
            "H+/16": {"shape": "H/16", "num_heads": 20} | _SWIGLU,
            "7B/16": {
                "width": 4096, "depth": 40, "mlp_dim": 8192, "num_heads": 32, "patch_size": 16,
                "qkv_bias": False, "key_bias": True,
            } | _SWIGLU,
        },
        224,
        "Simeoni et al. 2025 (arXiv 2508.10104)",
    ),
    "vit_22b": Family(
        {
            "pool": "map", "parallel": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False,
        } | _GOOGLE,
        _plain("22B/14"),
        224,
        "Dehghani et al. 2023 (arXiv 2302.05442)",
    ),
}  # fmt: skip


def options(family: str, size: str) -> dict[str, Any]:
    """The options of `vitjax.models.vit:vit` for a published model, to update a config with.

    Args:
      family: a name of FAMILIES.
      size: one of its sizes, such as "B/16".

    Raises:
      InputError: there is no such family, or no such size of it.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; {suggest(family, FAMILIES)}")
    found = FAMILIES[family]
    if size not in found.sizes:
        raise InputError(f"{family} has no size {size!r}; {suggest(size, found.sizes)}")
    shape = {} if "width" in found.sizes[size] else {"shape": size}
    return found.options | shape | found.sizes[size]
