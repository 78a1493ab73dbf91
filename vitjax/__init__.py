"""vitjax: Vision Transformer pretraining from one laptop core to a pod.

Importing the package is cheap; JAX is imported by what needs it.
"""

from pathlib import Path

__version__ = "0.1.0"


def load(path: str | Path, *, step: int | None = None):
    """Loads a trained model for inference; see `vitjax.inference.load`."""
    from vitjax import inference

    return inference.load(path, step=step)
