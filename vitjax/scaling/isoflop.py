"""IsoFLOP curves: at each budget a parabola of the loss in ln N, and a line through the optima.

Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 2. It is biased where the sizes are not
centred on the optimum or alpha differs from beta (Open-Athena 2026): report it beside the
parametric law, not instead of it.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.scaling.plain import plain
from vitjax.scaling.points import check_positive, num_levels
from vitjax.scaling.resample import draw_weights, group_codes, percentile_interval

MIN_SIZES = 3  # of a parabola
FAR_OUTSIDE = float(np.log(1.5))  # a parabola says little of what lies further out
APART = 3.0  # tolerances that the centres of two budgets are apart


@dataclasses.dataclass(frozen=True)
class Budget:
    """The parabola of one budget.

    Attributes:
      flops: the median of its runs. rows: of the input.
      optimum, optimum_interval: N*, and its central 90% over the resamples.
      loss: at the optimum, by the parabola. examples: D there.
      flags: why it should be read with care.
      is_used: whether the line goes through it: its optimum lies not further than FAR_OUTSIDE
        beyond the sampled sizes, or fewer than two budgets have one that does not.
    """

    flops: float
    rows: tuple[int, ...]
    num_sizes: int
    coefficients: tuple[float, float, float]  # of (ln N)^2, ln N, 1
    optimum: float
    optimum_interval: tuple[float, float] | None
    loss: float
    examples: float
    flags: tuple[str, ...]
    is_used: bool = True


@dataclasses.dataclass(frozen=True)
class IsoflopLaw:
    """N* = scale x C^exponent, D* = data_scale x C^data_exponent.

    Attributes:
      samples: ln scale, exponent, ln data_scale, data_exponent by resample, [R, 4].
      unused_rows: runs near no budget, or of a budget with too few sizes.
    """

    budgets: tuple[Budget, ...]
    exponent: float
    scale: float
    data_exponent: float
    data_scale: float
    samples: Float[np.ndarray, "resamples 4"]
    unused_rows: tuple[int, ...]
    flags: tuple[str, ...]
    tolerance: float
    seed: int

    def _check_samples(self) -> None:
        if not len(self.samples):
            raise InputError("the law was fitted with resamples=0; intervals need, say, 1000")

    def exponent_interval(self, level: float = 0.9) -> tuple[float, float]:
        self._check_samples()
        low, high = percentile_interval(self.samples[:, 1], level)
        return float(low), float(high)

    def predict(self, flops: ArrayLike) -> np.ndarray:
        """N* at budgets of any shape."""
        return np.asarray(self.scale * np.asarray(flops, np.float64) ** self.exponent)

    def predict_examples(self, flops: ArrayLike) -> np.ndarray:
        """D* at budgets of any shape."""
        return np.asarray(self.data_scale * np.asarray(flops, np.float64) ** self.data_exponent)

    def interval(self, flops: ArrayLike, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Of N*, by the bootstrap."""
        self._check_samples()
        logs = np.log(np.asarray(flops, np.float64))
        column = (-1, *(1,) * logs.ndim)
        intercept, slope = (self.samples[:, i].reshape(column) for i in (0, 1))
        with np.errstate(over="ignore"):  # a resample whose line is nearly upright
            return percentile_interval(np.exp(intercept + slope * logs[None]), level)

    def to_dict(self, level: float = 0.9) -> dict[str, Any]:
        has_samples = len(self.samples) > 0
        content = {
            "law": "N* = scale C^exponent, D* = data_scale C^data_exponent",
            "exponent": self.exponent,
            "exponent_interval": self.exponent_interval(level) if has_samples else None,
            "level": level,
            "scale": self.scale,
            "data_exponent": self.data_exponent,
            "data_scale": self.data_scale,
            "budgets": [dataclasses.asdict(b) for b in self.budgets],
            "unused_rows": list(self.unused_rows),
            "flags": list(self.flags),
            "tolerance": self.tolerance,
            "resamples": len(self.samples),
            "seed": self.seed,
        }
        return plain(content)


def find_budgets(
    log_flops: Float[np.ndarray, " runs"], log_sizes: Float[np.ndarray, " runs"], tolerance: float
) -> list[np.ndarray]:
    """The rows of each budget, by rising FLOPs.

    The window of +-tolerance in ln C with the most sizes is a budget; then the next among the runs
    that are left, until no window has MIN_SIZES, or a quarter of the first budget's: runs between
    the budgets are no budget. One nearer than APART tolerances to a denser one is its stragglers,
    and unused.
    """
    left = np.ones(len(log_flops), bool)
    enough = MIN_SIZES
    found: list[np.ndarray] = []
    while left.any():
        starts = np.flatnonzero(left)
        windows = [
            left & (log_flops >= log_flops[i]) & (log_flops <= log_flops[i] + 2 * tolerance)
            for i in starts
        ]
        sizes = [num_levels(log_sizes[inside]) for inside in windows]
        if max(sizes) < enough:
            break
        enough = max(enough, max(sizes) / 4)
        rows = np.flatnonzero(windows[int(np.argmax(sizes))])
        left[rows] = False
        centre = np.median(log_flops[rows])
        if all(abs(centre - np.median(log_flops[r])) > APART * tolerance for r in found):
            found.append(rows)
    return sorted(found, key=lambda rows: float(np.median(log_flops[rows])))


def _parabolas(
    sizes: np.ndarray, loss: np.ndarray, weights: np.ndarray
) -> Float[np.ndarray, "resamples 3"]:
    """Weighted least squares of the loss on (n^2, n, 1), for each row of weights."""
    columns = np.stack([sizes**2, sizes, np.ones_like(sizes)], 1)
    gram = np.einsum("rk,ki,kj->rij", weights, columns, columns)
    right = np.einsum("rk,ki,k->ri", weights, columns, loss)
    return np.linalg.solve(gram, right[..., None])[..., 0]


def _lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of y [R, K] on x [K], leaving out what is not finite: intercepts, slopes."""
    known = np.isfinite(y)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    x, y = np.where(known, x[None], 0.0), np.where(known, y, 0.0)
    x_mean, y_mean = x.sum(1, keepdims=True) / count, y.sum(1, keepdims=True) / count
    x_left = np.where(known, x - x_mean, 0.0)
    spread = (x_left**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 0, (x_left * (y - y_mean)).sum(1) / spread, np.nan)
    return y_mean[:, 0] - slope * x_mean[:, 0], slope


def _flags(sizes: np.ndarray, curvature: float, optimum: float, num_sizes: int) -> tuple[str, ...]:
    flags = []
    if curvature <= 0:
        flags.append("curvature not positive: no optimum, not used in the line")
    elif not sizes.min() < optimum < sizes.max():
        side = "smallest" if optimum <= sizes.min() else "largest"
        flags.append(f"optimum outside the sampled sizes, beyond the {side}")
    if num_sizes == MIN_SIZES:
        flags.append("3 sizes: the parabola goes through them, nothing is left to check it")
    return tuple(flags)


def _check_budgets(
    budgets: list[np.ndarray], log_flops: np.ndarray, log_sizes: np.ndarray, tolerance: float
) -> None:
    if num_levels(log_sizes) == 1:
        raise InputError(
            f"all {len(log_sizes)} runs have a single size, N={np.exp(log_sizes[0]):.4g}: each "
            f"budget needs at least {MIN_SIZES} sizes"
        )
    if len(budgets) >= 2:
        return
    within = f"(budgets are runs within {tolerance:g} of ln C, {MIN_SIZES} sizes or more)"
    if len(budgets) == 1:
        flops = np.exp(np.median(log_flops[budgets[0]]))
        raise InputError(
            f"a single budget, C={flops:.4g}, has enough sizes {within}; the line N* ~ C^a needs "
            "at least 2, better 4 at least 3 times apart: add runs at another budget"
        )
    raise InputError(
        f"no budget among {len(log_flops)} runs has {MIN_SIZES} sizes {within}: add sizes at the "
        "same FLOPs, or widen the tolerance"
    )


def fit_isoflop(
    flops: ArrayLike,
    num_params: ArrayLike,
    loss: ArrayLike,
    *,
    num_examples: ArrayLike | None = None,
    flops_per_param_example: float = 6.0,
    budgets: ArrayLike | None = None,
    groups: Any = None,
    tolerance: float = 0.15,
    resamples: int = 1000,
    seed: int = 0,
) -> IsoflopLaw:
    """Fits a parabola to each budget and N* ~ C^a through the optima.

    Args:
      flops, num_params, loss: C, N and L of each run.
      num_examples: D of each run: D* is then read from the runs (ln D linear in ln N within a
        budget). Without it D* = C / (flops_per_param_example N*): 6 for tokens, 6 x tokens an
        image for images.
      budgets: the FLOPs that were aimed at, where they are known; found in the runs otherwise.
      tolerance: half the width of a budget in ln C.
      groups: a label a run; runs of one trunk share it, and are drawn together.
      resamples: of the bootstrap (random weights by group); 0 for none.

    Raises:
      InputError: columns that are not positive or differ in length; a single size; a single budget
        with enough sizes, or none; fewer than two budgets with an optimum.
    """
    columns = check_positive(flops=flops, num_params=num_params, loss=loss)
    c, n = np.log(columns["flops"]), np.log(columns["num_params"])
    y = columns["loss"]
    if tolerance <= 0:
        raise InputError(f"tolerance={tolerance:g} must be above 0; 0.15 is usual")
    if not flops_per_param_example > 0:
        raise InputError(f"flops_per_param_example={flops_per_param_example:g} must be above 0")
    codes = group_codes(groups, len(y))
    if num_examples is None:
        d = c - n - np.log(flops_per_param_example)
    else:
        given = check_positive(flops=flops, num_examples=num_examples)
        d = np.log(given["num_examples"])
    if budgets is None:
        found = find_budgets(c, n, tolerance)
    else:
        aims = np.sort(np.log(check_positive(budgets=budgets)["budgets"]))
        found = [np.flatnonzero(np.abs(c - aim) <= tolerance) for aim in aims]
        found = [rows for rows in found if num_levels(n[rows]) >= MIN_SIZES]
    _check_budgets(found, c, n, tolerance)

    # The first row is the data themselves.
    weights = np.concatenate([np.ones((1, len(y))), draw_weights(codes, resamples, seed)])
    centre = n.mean()
    described, optima, examples = [], [], []
    middles = np.array([np.median(c[rows]) for rows in found])
    for rows, middle in zip(found, middles, strict=True):
        sizes = n[rows] - centre
        curves = _parabolas(sizes, y[rows], weights[:, rows])
        with np.errstate(divide="ignore", invalid="ignore"):
            best = np.where(curves[:, 0] > 0, -curves[:, 1] / curves[:, 0] / 2, np.nan)
        slope, level = np.polyfit(sizes, d[rows], 1)
        optima.append(best + centre)
        examples.append(level + slope * best)
        p = curves[0]
        inside = np.exp(best[1:][np.isfinite(best[1:])] + centre)
        ends = percentile_interval(inside, 0.9) if len(inside) else None
        num_sizes = num_levels(n[rows])
        described.append(
            Budget(
                flops=float(np.exp(middle)),
                rows=tuple(rows.tolist()),
                num_sizes=num_sizes,
                coefficients=(
                    float(p[0]),
                    float(p[1] - 2 * p[0] * centre),
                    float(p[2] - p[1] * centre + p[0] * centre**2),
                ),
                optimum=float(np.exp(optima[-1][0])),
                optimum_interval=None if ends is None else (float(ends[0]), float(ends[1])),
                loss=float(np.polyval(p, best[0])),
                examples=float(np.exp(examples[-1][0])),
                flags=_flags(sizes, float(p[0]), float(best[0]), num_sizes),
            )
        )
    has_optimum = np.array([b.coefficients[0] > 0 for b in described])
    is_outside = np.array([any("outside" in flag for flag in b.flags) for b in described])
    ends = [(n[rows].min(), n[rows].max()) for rows in found]
    beyond = [
        max(low - np.log(b.optimum), np.log(b.optimum) - high)
        for b, (low, high) in zip(described, ends, strict=True)
    ]
    is_used = has_optimum & ~(np.array(beyond) > FAR_OUTSIDE)
    if is_used.sum() < 2:  # better than nothing, and flagged
        is_used = has_optimum
    described = [
        dataclasses.replace(b, is_used=bool(chosen))
        for b, chosen in zip(described, is_used, strict=True)
    ]
    used = [budget for budget in described if budget.is_used]
    if len(used) < 2:
        listed = "; ".join(f"C={b.flops:.4g}: {', '.join(b.flags)}" for b in described)
        raise InputError(f"fewer than 2 budgets have an optimum, so there is no line: {listed}")
    size_line = np.stack(_lines(middles[is_used], np.stack(optima, 1)[:, is_used]), 1)
    data_line = np.stack(_lines(middles[is_used], np.stack(examples, 1)[:, is_used]), 1)
    lines = np.concatenate([size_line, data_line], 1)
    samples = lines[1:][np.isfinite(lines[1:]).all(1)]
    flags = []
    if len(used) == 2:
        flags.append("2 budgets: the line goes through both, nothing is left to check it")
    if is_outside.any():
        flags.append(
            f"{is_outside.sum()} of {len(described)} optima lie outside the sampled sizes; "
            f"{(is_outside & is_used).sum()} of them are used in the line"
        )
    if len(samples) < 0.9 * resamples:
        flags.append(f"{resamples - len(samples)} of {resamples} resamples had no line")
    assigned = np.concatenate(found)
    return IsoflopLaw(
        budgets=tuple(described),
        exponent=float(lines[0, 1]),
        scale=float(np.exp(lines[0, 0])),
        data_exponent=float(lines[0, 3]),
        data_scale=float(np.exp(lines[0, 2])),
        samples=samples,
        unused_rows=tuple(np.setdiff1d(np.arange(len(y)), assigned).tolist()),
        flags=tuple(flags),
        tolerance=float(tolerance),
        seed=seed,
    )
