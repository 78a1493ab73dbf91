"""Does a map depend on what the model has learned? Randomising it from the head down.

Array letters: B batch, S side of the model's input, C channels, R rows and W columns of a map.
"""

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata

from vitjax.curves import COLOURS
from vitjax.explain.explainer import Explainer
from vitjax.explain.overlay import COLOURS as MAP_COLOURS
from vitjax.parallel import path_name

HEAD = ("head", "distill_head", "pre_logits", "projection", "pool", "norm")
INSENSITIVE = 0.5  # a mean rank correlation above this, with nothing learned left
MOST_DRAWN = 9
DEEPEST = 10**6


def _stage_of(name: str, depth: int) -> list[tuple[int, int]]:
    """Where in the network a parameter is, deepest first: (stage, unit); a stack has several."""
    first, _, rest = name.partition("/")
    if first in HEAD:
        return [(DEEPEST, 0)]
    if first == "blocks":
        return [(1, i) for i in range(depth)]
    if match := re.fullmatch(r"stage(\d+)", first):
        unit = re.match(r"unit(\d+)/", rest)
        return [(int(match[1]), int(unit[1]) if unit else 0)]
    return [(0, 0)]


def _title(place: tuple[int, int], has_blocks: bool) -> str:
    if place == (DEEPEST, 0):
        return "head"
    if place == (0, 0):
        return "embedding" if has_blocks else "stem"
    if has_blocks:
        return f"block {place[1] + 1}"
    return f"stage {place[0]} " + (f"unit {place[1]}" if place[1] else "downsampling")


def _redrawn(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.normal(x.mean(), x.std(), x.shape).astype(x.dtype)


def cascade(params: Any, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """Parameters that are randomised more and more, from the head down to the embedding.

    Each array is drawn anew, from a normal distribution with its mean and deviation: the
    initialisers of the source would set our heads to zero, and with them every gradient.

    Yields:
      What was randomised last (with all before it), and the parameters.

    Source: Adebayo et al. 2018 (arXiv 1810.03292), section 3: cascading randomisation.
    """
    generator = np.random.default_rng(seed)
    arrays = {path_name(path): np.array(x) for path, x in jax.tree.leaves_with_path(params)}
    structure = jax.tree.structure(params)
    stacked = [x for name, x in arrays.items() if name.startswith("blocks/")]
    depth = len(stacked[0]) if stacked else 0
    places = {name: _stage_of(name, depth) for name in arrays}
    for place in sorted({p for found in places.values() for p in found}, reverse=True):
        for name, array in arrays.items():
            if place in places[name] and name.startswith("blocks/"):
                arrays[name] = array.copy()  # what was yielded stays as it was
                arrays[name][place[1]] = _redrawn(array[place[1]], generator)
            elif place in places[name]:
                arrays[name] = _redrawn(array, generator)
        yield _title(place, bool(stacked)), jax.tree.unflatten(structure, list(arrays.values()))


def rank_correlation(a: Float[np.ndarray, "R W"], b: Float[np.ndarray, "R W"]) -> float:
    """Spearman's, with ties at their mean rank; NaN where a map is constant."""
    ranks = [rankdata(x) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


@dataclasses.dataclass(frozen=True)
class Stage:
    """Maps of a model whose upper part is randomised, beside those of the trained one.

    Attributes:
      name: what was randomised last.
      correlations: of each image's two maps; NaN where one of them is constant.
      example: the first image's map.
    """

    name: str
    correlations: Float[np.ndarray, "B"]
    example: Float[np.ndarray, "R W"]

    @property
    def mean(self) -> float | None:
        known = self.correlations[~np.isnan(self.correlations)]
        return float(known.mean()) if known.size else None


def check(
    explainer: Explainer,
    images: UInt8[np.ndarray, "B S S C"],
    targets: Int[np.ndarray, "B"],
    maps: Float[np.ndarray, "B R W"],
    seed: int = 0,
) -> Iterator[Stage]:
    """Compares maps with those of the model as it is randomised; one stage after another."""
    for name, params in cascade(explainer.params, seed):
        others = explainer.maps(images, targets, params)
        pairs = zip(maps, others, strict=True)
        yield Stage(name, np.array([rank_correlation(a, b) for a, b in pairs]), others[0])


def num_stages(params: Any) -> int:
    """How many stages `check` will give."""
    names = {path_name(path): x for path, x in jax.tree.leaves_with_path(params)}
    depth = next((len(x) for name, x in names.items() if name.startswith("blocks/")), 0)
    return len({place for name in names for place in _stage_of(name, depth)})


def verdict(method: str, stages: Sequence[Stage]) -> str | None:
    """A warning, or None where the maps depend on what was learned."""
    last = stages[-1].mean
    if last is None:
        return f"method {method!r}: every map is constant, so the sanity check says nothing"
    if last > INSENSITIVE:
        return (
            f"method {method!r} does not depend on what the model has learned: with all "
            f"parameters randomised its maps still agree (Spearman {last:.2f} > {INSENSITIVE})"
        )
    return None


def as_table(method: str, stages: Sequence[Stage]) -> dict[str, Any]:
    """The numbers, for JSON."""
    rows = []
    for stage in stages:
        known = stage.correlations[~np.isnan(stage.correlations)]
        low, high = np.quantile(known, [0.1, 0.9]) if known.size else (None, None)
        rows.append(
            {
                "randomised_down_to": stage.name,
                "spearman_mean": stage.mean,
                "spearman_low": None if low is None else float(low),
                "spearman_high": None if high is None else float(high),
                "constant_maps": int(np.isnan(stage.correlations).sum()),
            }
        )
    warning = verdict(method, stages)
    found = {"method": method, "images": len(stages[0].correlations), "stages": rows}
    return found | {"quantiles": [0.1, 0.9], "threshold": INSENSITIVE, "warning": warning}


def draw(method: str, original: Float[np.ndarray, "R W"], stages: Sequence[Stage]) -> bytes:
    """The rank correlations down the network, and the first image's maps, as a PNG."""
    step = max(1, -(-len(stages) // (MOST_DRAWN - 1)))
    chosen = [("trained", original), *[(s.name, s.example) for s in stages[step - 1 :: step]]]
    figure = Figure(figsize=(max(5.5, 1.15 * len(chosen)), 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(chosen), height_ratios=(2.2, 1))
    axes = figure.add_subplot(grid[0, :])
    table = as_table(method, stages)["stages"]
    places = np.arange(len(stages))
    mean, low, high = (
        np.array(
            [np.nan if row[f"spearman_{k}"] is None else row[f"spearman_{k}"] for row in table]
        )
        for k in ("mean", "low", "high")
    )
    axes.fill_between(places, low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
    axes.plot(places, mean, color=COLOURS[0], marker="o", markersize=4)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.axhline(INSENSITIVE, color=COLOURS[1], linewidth=0.8, linestyle=":")
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("Spearman with the trained model's map", fontsize=8)
    shown = places[:: max(1, len(stages) // 12)]
    axes.set_xticks(shown, [stages[i].name for i in shown], fontsize=7, rotation=20)
    count = len(stages[0].correlations)
    title = f"{method}: randomised from the head down to ... (mean, 80% of {count} maps)"
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for column, (name, heat) in enumerate(chosen):
        small = figure.add_subplot(grid[1, column])
        small.imshow(heat, cmap=MAP_COLOURS, interpolation="nearest")
        small.set_title(name, fontsize=7)
        small.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
