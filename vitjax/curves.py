"""curves.png: what a run has done so far, for people."""

import contextlib
import threading
from pathlib import Path

from vitjax.telemetry import read_metrics

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8d5fd3", "#c98a1b", "#555555")


def _smooth(values: list[float]) -> list[float]:
    """A bias-corrected moving average over about a fifteenth of the curve."""
    weight = 1 - 15 / max(len(values), 20)
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _draw(workdir: Path) -> None:
    """Draws metrics.jsonl as curves.png: losses, accuracies, learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and not yet asked
    from matplotlib.figure import Figure

    rows = read_metrics(workdir)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and "/" in name:
                xs, ys = series.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(value)
    panels = {
        "loss": [n for n in series if n.endswith("/loss")],
        "accuracy": [n for n in series if n.endswith("/accuracy")],
        "learning rate": [n for n in series if n == "train/learning_rate"],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for colour, name in zip(COLOURS, sorted(names, reverse=True), strict=False):
            xs, ys = series[name]
            is_noisy = name.startswith("train/") and title != "learning rate" and len(xs) > 20
            if is_noisy:
                axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
                ys = _smooth(ys)
            label = name.removesuffix(f"/{title}")
            if not name.startswith("train/"):
                label += f" (last {ys[-1]:.4g})"
            marker = "o" if len(xs) < 30 and not name.startswith("train/") else None
            axes.plot(xs, ys, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)
        if title == "loss" and all(min(series[n][1]) > 0 for n in names):
            axes.set_yscale("log")
        if title != "learning rate":
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(workdir / "curves.png", dpi=130)


class Curves:
    """Draws metrics.jsonl as curves.png, beside the training and at its end.

    A picture that cannot be written, as on a full disk, is left out.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._thread: threading.Thread | None = None

    def draw_beside(self) -> None:
        """Starts to draw in a thread, unless it still does."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._try)
            self._thread.start()

    def draw(self) -> None:
        """Draws the last picture."""
        if self._thread is not None:
            self._thread.join()
        self._try()

    def _try(self) -> None:
        with contextlib.suppress(OSError):
            _draw(self._workdir)
