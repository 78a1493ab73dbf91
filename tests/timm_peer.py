"""What timm computes, for the tests to compare with; run by a Python that has timm.

    python timm_peer.py make JSON IMAGES.npz     makes random models, saves them and their outputs
    python timm_peer.py load JSON IMAGES.npz     loads what vitjax wrote, saves their outputs

JSON is a list of {"folder": ..., "architecture": ..., "arguments": {...}}.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A torchvision without the compiled operators for this torch. timm uses none of them, but
    # torchvision's Python wants two to be declared.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
from timm.models import save_for_hf


def outputs(model, images):
    """Tokens, logits, and the output of every block, for each array of images."""
    found = {}
    for name, array in images.items():
        blocks = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, out, seen=blocks: seen.append(out.numpy()))
            for block in model.blocks
        ]
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(array.transpose(0, 3, 1, 2).copy()))
            logits = model.forward_head(tokens)
        for hook in hooks:
            hook.remove()
        found |= {f"{name}/tokens": tokens.numpy(), f"{name}/logits": logits.numpy()}
        found |= {f"{name}/block{i}": block for i, block in enumerate(blocks)}
    return found


def main(mode, cases, images):
    images = dict(np.load(images))
    for case in json.loads(cases):
        folder, arguments = Path(case["folder"]), case.get("arguments", {})
        if mode == "make":
            torch.manual_seed(0)
            model = timm.create_model(case["architecture"], **arguments).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        chosen = images if case.get("dynamic") else {"native": images["native"]}
        np.savez(f"{folder}.npz", **outputs(model, chosen))


if __name__ == "__main__":
    main(*sys.argv[1:])
