"""Scaling laws: fit them, test them on larger scales than they were fitted to, decide with them.

from vitjax import scaling

fit = scaling.fit_curve(x, y)  # how a loss falls with one scale
law = scaling.fit_parametric(num_params, num_examples, loss)  # E + A/N^alpha + B/D^beta
law = scaling.fit_isoflop(flops, num_params, loss)  # the best size of each budget
law = scaling.fit_shape(shape, num_examples, loss)  # the best width, depth or MLP width
"""

import importlib
from typing import Any

_PLACES = {
    "fit_curve": "curve",
    "fit_isoflop": "isoflop",
    "fit_parametric": "parametric",
    "fit_shape": "shape_law",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vitjax.scaling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vitjax.scaling.{_PLACES[name]}"), name)
