"""Writing a model in another format: decided whole, then written, nothing half done."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.interop import google, hf, onnx, plain, stablehlo, timm
from vitjax.interop.card import model_card
from vitjax.interop.contents import DEFAULTS
from vitjax.interop.export_plan import Exported, ExportPlan
from vitjax.interop.files import write_npz, write_safetensors
from vitjax.interop.layout import named_leaves, tensors

if TYPE_CHECKING:
    from vitjax.inference import VisionModel

WEIGHTS: dict[str, ModuleType] = {m.NAME: m for m in (google, timm, hf, plain)}
PROGRAMS = {"onnx": ".onnx", "stablehlo": ".stablehlo"}
FILES = {"npz": ".npz", "safetensors": ".safetensors"} | PROGRAMS
FORMATS = (*WEIGHTS, *PROGRAMS)
USAGE = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FILE")
(output,) = session.run(None, {"images": images})""",
    "stablehlo": """import pathlib

import jax

call = jax.export.deserialize(pathlib.Path("FILE").read_bytes()).call
output = call(images)""",
}
DTYPES = ("float32", "bfloat16", "float16")
OUTPUTS = ("logits", "embedding", "tokens")


def _target(path: Path, format: str) -> tuple[Path, str | None]:
    """The folder to write to, and the file's name where the user gives one.

    Raises:
      InputError: it is there already, or cannot be.
    """
    suffix = FILES.get(format)
    if suffix and path.suffix == suffix:
        if path.exists():
            raise InputError(f"{path} exists already; move it away, or choose another name")
        if not path.absolute().parent.is_dir():
            raise InputError(f"the folder of {path} does not exist")
        return path.parent, path.name
    if suffix and path.suffix and not path.is_dir():
        raise InputError(f"--out={path} must end in {suffix} for --format={format}, or be a folder")
    if path.is_file():
        raise InputError(f"{path} is a file; --format={format} writes a folder")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; nothing was written")
    return path, None


def _save_weights(vision: "VisionModel", e: Exported, plan: ExportPlan, file: Path, dtype: str):
    entries = [(t.name, t.shape, t.dtype, t.produce)
               for t in tensors(plan.leaves, plan.params, plan.sizes, dtype)]  # fmt: skip
    if file.suffix == ".npz":
        contract = {
            "vitjax": 1,
            "preprocess": vision.contract["preprocess"],
            "class_names": e.class_names,
            "loss_type": e.loss_type,
        }
        write_npz(file, entries)
        file.with_suffix(".json").write_text(json.dumps(contract, indent=2))
    else:
        write_safetensors(file, entries, dict(plan.metadata))
    for name, content in plan.files.items():
        (file.parent / name).write_text(json.dumps(content, indent=2) + "\n")


def export(
    vision: "VisionModel",
    path: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    output: str | None = None,
) -> list[str]:
    """Writes a model, and a model card beside it.

    Args:
      path: a new or empty folder, or a file with the format's suffix.
      format: "npz", "timm", "hf", "safetensors", "onnx" or "stablehlo".
      dtype: of the weights; None means that of the file they came from, else float32.
      output: of a program (onnx, stablehlo): "logits", "embedding" or "tokens"; None means
        logits where the model has a head, else the embedding.

    Returns:
      What was rewritten on the way, in words.

    Raises:
      InputError: the format cannot express the model, or the path cannot be written to.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}; {suggest(format, FORMATS)}")
    if dtype not in (None, *DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; {suggest(str(dtype), DTYPES)}")
    e = Exported(
        model=vision.config,
        params=named_leaves(vision.params),
        preprocess=vision.preprocess,
        class_names=vision.class_names,
        loss_type=vision.loss_type,
        contract=vision.contract,
        origin=vision.contract.get("origin") or {},
    )
    if format in WEIGHTS and output is not None:
        raise InputError(f"--output is for {', '.join(PROGRAMS)}; {format} holds the whole model")
    known = "tokens" if output == "tokens" else "embedding" if output == "embedding" else "logits"
    if output not in (None, *OUTPUTS) or (output == "logits" and not e.model.get("num_classes")):
        raise InputError(f"this model has no output {output!r}; {suggest(str(output), OUTPUTS)}")
    plan = WEIGHTS[format].plan(e) if format in WEIGHTS else None
    folder, name = _target(Path(path), format)
    if plan is None:
        chosen = known if output or e.model.get("num_classes") else "embedding"
        write = onnx.write_onnx if format == "onnx" else stablehlo.write_stablehlo
        file = folder / (name or f"model{PROGRAMS[format]}")
        side, channels = vision.preprocess.image_size, vision.preprocess.channels
        function = vision.program(chosen)
        existed = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write(file, function, _as(vision.params, dtype), (side, side, channels))
        except InputError:
            if not existed:
                folder.rmdir()
            raise
        notes: Sequence[str] = (f"float32 images [batch, {side}, {side}, {channels}], normalised "
                                f"as above, to {chosen}",)  # fmt: skip
        family, usage = format, USAGE[format]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / (name or plan.weights)
        kept = "float32" if format == plain.NAME else e.origin.get("dtype", "float32")
        _save_weights(vision, e, plan, file, dtype or kept)
        notes, family, usage = plan.notes, plan.family, plan.usage
    card = file.with_suffix(".md") if name else folder / "README.md"
    usage = usage.replace("FOLDER", str(path)).replace("FILE", file.name)
    card.write_text(model_card(
        e, vision.model, format=format, family=family, usage=usage, notes=notes, defaults=DEFAULTS
    ))  # fmt: skip
    return list(notes)


def _as(params: Any, dtype: str | None) -> Any:
    import jax

    return params if dtype is None else jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
