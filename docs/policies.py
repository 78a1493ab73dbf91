"""Draws docs/policies.png: python docs/policies.py

Each row is a policy of vitjax.data.policies: a photograph from scikit-learn, then six draws.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from vitjax.data.policies import POLICIES, Policy

SIZE, DRAWS = 160, 6
GREY = ("chest_xray", "ct", "ultrasound")


def main() -> None:
    shown = {}
    for name in ("china.jpg", "flower.jpg"):
        image = Image.fromarray(load_sample_image(name))
        left = (image.width - image.height) // 2
        square = image.crop((left, 0, left + image.height, image.height)).resize((SIZE, SIZE))
        shown[name] = np.asarray(square, np.float32) / 255
    figure = Figure(figsize=(1.25 * (DRAWS + 1), 1.42 * len(POLICIES)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(POLICIES), DRAWS + 1)
    for row, name in zip(axes, POLICIES, strict=True):
        raw = shown["flower.jpg" if name in ("dermatology", "histology") else "china.jpg"]
        if name in GREY:
            raw = raw.mean(-1, keepdims=True)
        batch = {"images": jnp.stack([raw] * DRAWS), "labels": jnp.zeros(DRAWS, jnp.int32)}
        drawn = jax.jit(Policy(name))(jax.random.key(3), batch)["images"]
        for axis, image in zip(row, [raw, *np.asarray(drawn)], strict=True):
            colours = "gray" if image.shape[2] == 1 else None
            axis.imshow(image.squeeze(), cmap=colours, vmin=0, vmax=1)
            axis.set_axis_off()
        row[0].set_title(name, fontsize=9, loc="left")
    figure.savefig(Path(__file__).parent / "policies.png", dpi=90)


if __name__ == "__main__":
    main()
