"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) and its variants."""

import dataclasses
from typing import Any

from vitjax.errors import InputError, suggest
from vitjax.models import layers
from vitjax.models.attention import KERNELS
from vitjax.models.encoder import ViT, patchify
from vitjax.models.functional import Model
from vitjax.models.lora import lora_scale
from vitjax.models.pooling import POOLS
from vitjax.models.positions import RESAMPLINGS, sincos2d_positions
from vitjax.models.shapes import Geometry, Shape, count_flops, parse_shape
from vitjax.models.stems import STEMS, check_stem
from vitjax.precision import Precision

__all__ = ["ViT", "patchify", "sincos2d_positions", "vit"]

CHOICES: dict[str, tuple] = {
    "pool": POOLS,
    "stem": STEMS,
    "positions": ("learned", "sincos2d", "rope", "none"),
    "position_prefix": ("cls", "none", "all"),
    "position_resampling": RESAMPLINGS,
    "mlp": ("dense", "gated"),
    "activation": tuple(layers.ACTIVATIONS),
    "remat": ("auto", "none", "dots", "full", "offload"),
    "attention": ("auto", *KERNELS),
}


LORA_TARGETS = ("qkv", "out", "mlp")


def _check_options(options: dict[str, Any]) -> None:
    """Raises InputError for a value or a combination that makes no model."""
    for name, allowed in CHOICES.items():
        value = options[name]
        if value not in allowed:
            raise InputError(f"unknown model.{name} {value!r}; {suggest(str(value), allowed)}")
    if not isinstance(options["scan"], bool | None):
        raise InputError(f"model.scan must be True, False or None, got {options['scan']!r}")
    for name in ("dropout_rate", "drop_path_rate"):
        if not 0 <= options[name] < 1:
            raise InputError(f"model.{name} must be in [0, 1), got {options[name]}")
    for name in ("num_classes", "num_registers"):
        if options[name] < 0:
            raise InputError(f"model.{name} must be 0 (none) or more, got {options[name]}")
    for name in ("pre_logits_dim", "projection_dim"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"model.{name} must be positive or None, got {options[name]}")
    has_cls = options["cls_token"]
    if options["pool"] in ("cls", "cls_gap") and not has_cls:
        raise InputError(f"model.pool={options['pool']!r} needs model.cls_token=True")
    if options["distill_token"] and not has_cls:
        raise InputError("model.distill_token=True needs model.cls_token=True")
    if options["distill_head"] and not (options["distill_token"] and options["num_classes"]):
        raise InputError("model.distill_head=True needs model.distill_token=True and num_classes")
    if options["pool"] == "map" and options["norm_after_pool"]:
        raise InputError(
            'model.pool="map" has norms of its own: model.norm_after_pool must be False'
        )
    if options["qk_norm_bias"] and not options["qk_norm"]:
        raise InputError("model.qk_norm_bias=True needs model.qk_norm=True")


def _check_adaptation(
    depth: int, frozen_blocks: int, lora_rank: int, lora_targets: tuple[str, ...]
) -> None:
    if not 0 <= frozen_blocks < depth:
        raise InputError(f"model.frozen_blocks must be in 0 to {depth - 1}, got {frozen_blocks}")
    if lora_rank < 0:
        raise InputError(f"model.lora_rank must be 0 (none) or more, got {lora_rank}")
    for name in lora_targets if lora_rank else ():
        if name not in LORA_TARGETS:
            raise InputError(f"unknown model.lora_targets {name!r}; {suggest(name, LORA_TARGETS)}")


def vit(
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    shape: str | None = None,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    patch_size: int | None = None,
    stem: str = "patch",
    stem_blocks: tuple[int, ...] = (3, 4, 9),
    stem_width: int = 64,
    pool: str = "gap",
    norm_after_pool: bool = False,
    positions: str = "learned",
    position_prefix: str = "cls",
    table_size: int | None = None,
    position_resampling: str = "bicubic_antialias",
    rope_theta: float = 100.0,
    cls_token: bool | None = None,
    num_registers: int = 0,
    mask_token: bool = False,
    distill_token: bool = False,
    distill_head: bool = False,
    pre_norm: bool = False,
    patch_bias: bool = True,
    qkv_bias: bool = True,
    key_bias: bool = True,
    out_bias: bool = True,
    mlp_bias: bool = True,
    norm_bias: bool = True,
    qk_norm: bool = False,
    qk_norm_bias: bool = False,
    parallel: bool = False,
    layer_scale: float | None = None,
    mlp: str = "dense",
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    pre_logits_dim: int | None = None,
    projection_dim: int | None = None,
    dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    scan: bool | None = None,
    remat: str = "auto",
    attention: str = "auto",
    head_bias: float = 0.0,
    input_sizes: tuple[int, ...] = (),
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_targets: tuple[str, ...] = ("qkv", "out"),
    frozen_blocks: int = 0,
    precision: Precision = Precision(),
) -> Model:
    """Describes a Vision Transformer by name, by numbers, or by a name with numbers changed.

    Args:
      image_size: pixels along each side, of the model's own grid; it takes other sizes too.
      num_classes: width of the linear head, which starts at zero; 0 for no head.
      shape: a name of `shapes.SHAPES` and a patch size, as "B/16".
      width, depth, mlp_dim, num_heads, patch_size: replace the named shape's numbers; all five
        are needed without a name.
      stem: what the patches are cut from: "patch" the image, "conv" the map of a few convolutions
        (Xiao et al. 2021), "resnet" that of a ResNet: with blocks (3, 4, 9) and patch size 16 it
        is the hybrid R50+ViT-B/16.
      stem_blocks, stem_width: of the ResNet: units of each stage, channels of its root.
      pool: "cls" (class token), "gap" (mean over patches), "map" (attention pooling) or "cls_gap"
        (class token and mean, side by side).
      norm_after_pool: the last norm comes after pooling (MAE's fine-tuning, BEiT).
      positions: "learned", "sincos2d" (fixed), "rope" (rotary, DINOv3) or "none".
      position_prefix: which tokens before the patches have rows in the learned table: "cls" (class
        and distillation token), "none" (DeiT III, big_vision) or "all" (registers too).
      table_size: pixels along each side for which the learned table is made; None: image_size.
      position_resampling: how a learned table is brought to another grid; see
        `positions.resize_matrix`.
      rope_theta: base of the rotary frequencies.
      cls_token: None means only where the pool needs it.
      num_registers: register tokens (Darcet et al. 2024, arXiv 2309.16588).
      mask_token: a token for masked patches (iBOT, BEiT).
      distill_token, distill_head: DeiT's second class token, and its head; logits are the mean.
      pre_norm: a norm in front of the first block (CLIP).
      qkv_bias, key_bias: of queries, keys and values; of keys where the others have one (BEiT and
        DINOv3 have none: it changes nothing but in a norm).
      patch_bias, out_bias, mlp_bias, norm_bias: of the patch embedding, of attention's last
        layer, of the MLP, and of layer norms.
      qk_norm, qk_norm_bias: layer norm on queries and keys (ViT-22B).
      parallel: attention and MLP side by side on one norm (ViT-22B).
      layer_scale: where the learned scale of each branch starts; None for none (CaiT).
      mlp: "dense", or "gated": with activation "silu" it is SwiGLU.
      activation: "gelu_tanh" (as in JAX code bases), "gelu" (exact, as in PyTorch's),
        "quick_gelu" (CLIP), "silu" or "relu".
      pre_logits_dim: a dense layer with tanh after pooling (the first ViTs' representation layer).
      projection_dim: a last linear map of the embedding, without bias (CLIP).
      drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
      scan: one scan over the blocks, or the same blocks unrolled.
      remat: "none" keeps activations, "dots" keeps matrix products, "full" keeps block inputs,
        "offload" keeps them in the host's memory (TPUs and GPUs).
      attention: what computes it, a key of `attention.KERNELS`. The weights themselves are had by
        plain products, whatever is named here.
        What is left open (None or "auto") training decides for its devices, see
        `vitjax.choices`; elsewhere it is a scan, "none" and "xla".
      head_bias: where the head's bias starts (about -log(C) for sigmoid losses).
      input_sizes: numbers of each variable that is known beside the image; see
        `inputs.InputTokens`.
      lora_rank, lora_alpha, lora_targets: low-rank updates of these layers of each block ("qkv",
        "out", "mlp"), times alpha / rank; rank 0 for none, alpha None for twice the rank.
      frozen_blocks: so many of the first blocks, and what comes before them, are not trained.

    Raises:
      InputError: for a name, number or combination that makes no model.
    """
    named, named_patch = parse_shape(shape) if shape else (None, None)
    numbers = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads}
    if named:
        numbers = {k: getattr(named, k) if v is None else v for k, v in numbers.items()}
    patch = patch_size or named_patch or 0
    missing = [k for k, v in (numbers | {"patch_size": patch}).items() if not v or v < 0]
    if missing:
        raise InputError(f"model.shape is not set, so model.{missing[0]} must be a positive number")
    remat = "none" if remat == "auto" else remat
    attention = "xla" if attention == "auto" else attention
    encoder = Shape(**{k: int(v or 0) for k, v in numbers.items()})
    _check_adaptation(encoder.depth, frozen_blocks, lora_rank, lora_targets)
    if any(size < 1 for size in input_sizes):
        raise InputError(f"model.input_sizes must be positive, got {tuple(input_sizes)}")
    has_cls = pool in ("cls", "cls_gap") if cls_token is None else cls_token
    _check_options(locals() | {"cls_token": has_cls})
    check_stem(stem, patch, encoder.width, tuple(stem_blocks))
    for size in (image_size, table_size or image_size):
        if size % patch:
            raise InputError(
                f"image size {size} is not divisible by patch size {patch}; "
                f"the nearest sizes are {size // patch * patch} and {-(-size // patch) * patch}"
            )
    if encoder.width % encoder.num_heads:
        raise InputError(f"width {encoder.width} is not divisible by num_heads {encoder.num_heads}")
    if positions == "rope" and encoder.width // encoder.num_heads % 4:
        raise InputError(
            f"rotary positions need a head width divisible by 4, got {encoder.width} / "
            f"{encoder.num_heads}"
        )
    geometry = Geometry(
        encoder, patch, image_size, channels, num_classes, pool, positions,
        qkv_bias, norm_bias, qk_norm, parallel,
        key_bias=key_bias, cls_token=has_cls, distill_token=distill_token,
        distill_head=distill_head, num_registers=num_registers,
        mask_token=mask_token, position_prefix=position_prefix,
        pre_norm=pre_norm, norm_after_pool=norm_after_pool, patch_bias=patch_bias,
        out_bias=out_bias, mlp=mlp, mlp_bias=mlp_bias, qk_norm_bias=qk_norm_bias,
        has_layer_scale=layer_scale is not None, pre_logits_dim=pre_logits_dim,
        projection_dim=projection_dim, table_size=table_size,
        stem=stem, stem_blocks=tuple(stem_blocks) if stem == "resnet" else (),
        stem_width=stem_width, input_sizes=tuple(input_sizes),
        lora_rank=lora_rank, lora_targets=tuple(lora_targets) if lora_rank else (),
    )  # fmt: skip
    arguments = {
        "geometry": geometry,
        "precision": precision,
        "activation": activation,
        "eps": eps,
        "rope_theta": rope_theta,
        "position_resampling": position_resampling,
        "layer_scale": layer_scale,
        "dropout_rate": dropout_rate,
        "drop_path_rate": drop_path_rate,
        "scan": True if scan is None else scan,
        "remat": remat,
        "attention": attention,
        "head_bias": head_bias,
        "frozen_blocks": frozen_blocks,
        "lora_scale": lora_scale(lora_rank, lora_alpha),
    }
    description = dataclasses.asdict(encoder) | {
        "patch_size": patch,
        "positions": positions,
        "pool": pool,
        "num_classes": num_classes,
        "num_tokens": geometry.num_tokens,
        "parallel": parallel,
        "remat": remat,
        "attention": attention,
        "mlp": mlp,
        "prefix_tokens": geometry.num_prefix,
    }
    return Model(ViT, tuple(arguments.items()), tuple(description.items()), count_flops(geometry))
