"""The look of a report's pictures.

Colours are those of Okabe and Ito 2008, which people with any kind of colour vision tell apart;
markers differ too.
"""

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
SKY, YELLOW, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#8a8a8a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND = 0.15
Report = Mapping[str, Any]


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Names of classes are no mathematics, and may be of scripts that the font lacks."""
    style: Any = {"text.parse_math": False, "font.size": 9, "axes.titlesize": 9.5}
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def short_name(text: Any, width: int = 34) -> str:
    """A name from the data, as a label: one line, not too long, not hidden by an underscore."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    text = textwrap.shorten(text, width, placeholder="...") if " " in text else text
    text = text if len(text) <= width else text[: width - 3] + "..."
    return f" {text}" if text.startswith("_") else text


def make_axes(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for axes in all_axes.flat:
        clean(axes)
    return figure, all_axes


def clean(axes: Any) -> None:
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def make_panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """So many axes in a grid of at most so many columns; what is left over is blank."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, all_axes = make_axes(rows, columns, width * columns, height * rows)
    for axes in all_axes.flat[count:]:
        axes.set_axis_off()
    return figure, list(all_axes.flat[:count])


def numbers(interval: Any) -> tuple[float, float, float]:
    """value, low and high; NaN for what there is not."""
    if not isinstance(interval, Mapping):
        return np.nan, np.nan, np.nan
    found = [interval.get(k) for k in ("value", "low", "high")]
    value, low, high = (np.nan if v is None else float(v) for v in found)
    return value, low, high


def percent(level: Any) -> str:
    return f"{100 * float(level or 0.95):g}%"


def level(report: Report) -> str:
    settings = (report.get("settings") or {}).get("report") or {}
    return percent(settings.get("level"))
