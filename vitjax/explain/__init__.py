"""Which parts of an image a prediction rests on: maps, how far to trust them, pictures.

explanation = vitjax.explain.explain(vitjax.load("runs/x"), images, method="relevance")
explanation.maps  # [B, rows, cols]
"""

from vitjax.explain.explainer import METHODS, Explainer, Explanation, Method, explain
from vitjax.explain.overlay import blend, draw_overlay
from vitjax.explain.placement import seen_region

__all__ = [
    "METHODS",
    "Explainer",
    "Explanation",
    "Method",
    "blend",
    "draw_overlay",
    "explain",
    "seen_region",
]
