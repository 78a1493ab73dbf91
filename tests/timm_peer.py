"""What timm and OpenCLIP compute, for the tests to compare with.

Tests call `run_peer`, which runs this file in a process of its own: timm needs torchvision, beside
which transformers does not load everywhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def run_peer(mode, cases, images, needs="timm"):
    """Runs a mode of this file; skips where its library is not on $VITJAX_TIMM_PATH or our path.

    Args:
      mode: "make" saves random models of timm and their outputs, "load" the outputs of what vitjax
        wrote, "facts" what timm's own architectures are made of, "openclip" is "make" for CLIP.
      cases: dicts with "folder" and what the mode reads; outputs go to the folder's name + .npz.
      images: a path to an .npz.
    """
    import pytest

    pytest.importorskip("torch", reason="needs torch")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.environ.get("VITJAX_TIMM_PATH", "")
    find = f"import importlib.util as u; assert u.find_spec({needs!r})"
    has = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True)
    if has.returncode:
        pytest.skip(f"needs {needs}, or VITJAX_TIMM_PATH, a folder that holds it")
    done = subprocess.run(
        [sys.executable, __file__, mode, json.dumps(cases), str(images)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def randomised(model):
    import torch

    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def outputs(blocks, images, function):
    """What the function gives, by name, and the output of every block, for each size of images."""
    import torch

    found = {}
    for size, array in images.items():
        seen = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.numpy()))
            for block in blocks
        ]
        with torch.no_grad():
            made = function(torch.from_numpy(array.transpose(0, 3, 1, 2).copy()))
        for hook in hooks:
            hook.remove()
        made |= {f"block{i}": block for i, block in enumerate(seen)}
        found |= {f"{size}/{name}": np.asarray(value) for name, value in made.items()}
    return found


def timm_outputs(model, images):
    def function(x):
        tokens = model.forward_features(x)
        return {"tokens": tokens, "logits": model.forward_head(tokens)}

    return outputs(model.blocks, images, function)


def make(cases, images):
    import timm
    from timm.models import save_for_hf

    for case in cases:
        arguments = case["arguments"]
        model = randomised(timm.create_model(case["architecture"], **arguments))
        save_for_hf(model, case["folder"], model_args=arguments, safe_serialization=True)
        chosen = images if arguments.get("dynamic_img_size") else {"native": images["native"]}
        np.savez(f"{case['folder']}.npz", **timm_outputs(model, chosen))


def load(cases, images):
    import timm

    for case in cases:
        model = timm.create_model(f"local-dir:{case['folder']}", pretrained=True).eval()
        np.savez(f"{case['folder']}.npz", **timm_outputs(model, {"native": images["native"]}))
        data = timm.data.resolve_model_data_config(model)
        Path(f"{case['folder']}.json").write_text(json.dumps(data))


def facts(cases, images):
    """Of architectures as they are, without numbers: cases name them, a .json is written."""
    import timm

    for case in cases:
        model = timm.create_model(case["architecture"], device="meta")
        activation = getattr(getattr(model.blocks[0], "mlp", None), "act", None)
        norms = [m for m in model.modules() if "Norm" in type(m).__name__ and hasattr(m, "eps")]
        about = {
            "shapes": {name: list(x.shape) for name, x in model.state_dict().items()},
            "pretrained_cfg": {"input_size": model.pretrained_cfg["input_size"]},
            "num_heads": getattr(model.blocks[0].attn, "num_heads", None),
            "activation": type(activation).__name__,
            "eps": sorted({norm.eps for norm in norms}),
            "global_pool": model.global_pool,
        }
        Path(f"{case['folder']}.json").write_text(json.dumps(about))


def openclip(cases, images):
    import open_clip
    import timm
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    create = timm.create_model
    timm.create_model = lambda name, **options: create(
        name, embed_dim=128, depth=2, num_heads=2, img_size=20, patch_size=4, **options
    )  # OpenCLIP passes no sizes on
    for case in cases:
        folder, config = Path(case["folder"]), case["config"]
        is_custom = "timm_model_name" in config["vision_cfg"]
        kind = open_clip.model.CustomTextCLIP if is_custom else open_clip.model.CLIP
        model = randomised(kind(**config))
        about = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resize_mode": "squash"}
        open_clip.model.set_model_preprocess_cfg(model, about)
        folder.mkdir()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        save_config_for_hf(model, folder / "open_clip_config.json", config)
        tower = model.visual
        blocks = tower.trunk.blocks if is_custom else tower.transformer.resblocks
        found = outputs(
            blocks, {"native": images["native"]}, lambda x, tower=tower: {"embedding": tower(x)}
        )
        np.savez(f"{folder}.npz", **found)


if __name__ == "__main__":
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision without the compiled operators for this torch. timm uses none of them, but
        # torchvision's Python wants two to be declared.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    mode, json_cases, npz = sys.argv[1:]
    {"make": make, "load": load, "facts": facts, "openclip": openclip}[mode](
        json.loads(json_cases), dict(np.load(npz))
    )
