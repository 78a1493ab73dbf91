"""vitjax: Vision Transformer pretraining from one laptop core to a pod.

Importing the package is cheap; JAX is imported by what needs it.
"""

import time
from pathlib import Path

IMPORTED_AT = time.perf_counter()
__version__ = "0.1.0"


def load(path: str | Path, **options):
    """Loads a model for inference, ours or in any format; see `vitjax.inference.load`."""
    from vitjax import inference

    return inference.load(path, **options)
