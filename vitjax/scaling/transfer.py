"""Transfer scaling: a downstream error as a law of the upstream loss.

Over upstream size and examples the error takes the same laws as a loss: `fit_parametric`.
"""

from typing import Any

from vitjax.scaling.curve import CurveFit, fit_curve
from vitjax.scaling.points import check_positive


def fit_downstream(upstream_loss: Any, error: Any, **options: Any) -> CurveFit:
    """How a downstream error falls with the upstream loss.

    The law is fitted over 1 / upstream_loss, so that larger x is a better model, and a hold-out is
    made of the best models: ask the fit for x = 1 / loss.

    Args:
      upstream_loss, error: of each model, [N]; an accuracy goes in as 1 - accuracy.
      options: of `fit_curve`.

    Source: Gadre et al. 2024 (arXiv 2403.08540) relate the two by one curve for all sizes; the
    forms here are those of `fit_curve`, chosen by hold-out.
    """
    loss = check_positive(upstream_loss=upstream_loss)["upstream_loss"]
    return fit_curve(1 / loss, error, **options)
