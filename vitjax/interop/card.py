"""The model card that is written beside every export."""

from collections.abc import Sequence
from typing import Any

from vitjax import __version__
from vitjax.data.preprocess import Preprocess
from vitjax.interop.export_plan import Exported
from vitjax.models.functional import Model

# The options that a reader wants to see first; the others follow where they are not the default.
FIRST = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "pool", "positions", "activation")


def _input(p: Preprocess) -> list[str]:
    size = p.image_size
    how = f"resized to {size} x {size} without keeping the aspect ratio"
    if p.resize == "shorter_side":
        side = round(size / p.crop_fraction)
        how = f"shorter side resized to {side}, centre crop of {size} x {size}"
    elif p.resize == "pad":
        how = f"longer side resized to {size}, the rest of {size} x {size} black"
    low, high = p.value_range
    return [
        f"- {p.channels} channel{'s' if p.channels > 1 else ''}, {how} ({p.interpolation}, "
        "antialiased)",
        f"- values from {low:g} to {high:g}, then mean {list(p.mean)}, std {list(p.std)}",
    ]


def model_card(
    e: Exported, model: Model, *, format: str, family: str, usage: str, notes: Sequence[str],
    defaults: dict[str, Any],
) -> str:  # fmt: skip
    """Markdown: what the model is, what it wants to see, how it is loaded.

    Args:
      defaults: of the model's options, which are not listed.
    """
    options = {k: v for k, v in e.model.items() if k != "target"}
    shown = {k: options[k] for k in FIRST if k in options}
    shown |= {k: v for k, v in options.items() if k not in shown and v != defaults.get(k)}
    gflop = model.flops_per_image / 1e9
    lines = [
        f"# {family}",
        "",
        f"Written by vitjax {__version__} as {format}: {model.num_params:,} parameters, "
        f"{gflop:.3g} GFLOP an image (2 x MAC, forward).",
        "",
        "## Input",
        "",
        *_input(e.preprocess),
        "",
        "## Model",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in shown.items()),
    ]
    if e.class_names:
        count = len(e.class_names)
        names = ", ".join(e.class_names[:10]) + (", ..." if count > 10 else "")
        lines += ["", "## Classes", "", f"{count}: {names}", ""]
        lines += [f"Trained with a {e.loss_type} loss."] if e.loss_type else []
    lines += ["", "## Loading", "", "```python", usage, "```"]
    if e.origin:
        lines += ["", "## Origin", "", f"- weights: {e.origin['file']} ({e.origin['format']}, "
                  f"{e.origin['family']}); its licence applies"]  # fmt: skip
    lines += ["", "## Notes", "", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"
