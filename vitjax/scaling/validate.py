"""Validation before belief: fit on small scales, score on larger ones, beside naive baselines."""

import dataclasses
import itertools

import numpy as np
from scipy import stats

from vitjax.scaling.form_fit import FormFit, fit_parts
from vitjax.scaling.points import Points

MAX_CUTS = 5
MIN_SHARE = 0.6  # of the different x, that a cut leaves to fit on
MIN_HELD_OUT = 0.1  # of the different x, that a cut holds out
MIN_SCALES = 7  # different x, below which an order cannot be told from chance
MAX_CHANCE = 2e-4  # that shuffled data fall as steadily; 7 scales in order have 1/5040
EXACT = 8
MIN_SKILL = 0.7  # the hold-out error over a naive one's, below which a law has earned belief
LAST_VALUE, MEAN_VALUE = "last_value", "mean_value"


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """Cuts of the points by scale: each fits below and is scored above.

    Attributes:
      masks: [R, N], True where a cut fits.
      ratios: [R], how far the largest x lies above the largest fitted one.
    """

    points: Points
    masks: np.ndarray
    ratios: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """ln of x over the largest fitted x, [R, N]; positive where held out."""
        tops = np.array([self.points.x[mask].max() for mask in self.masks])
        return np.log(self.points.x[None] / tops[:, None])

    def errors(self, log_predicted: np.ndarray) -> np.ndarray:
        """Predicted less true ln y, [R, N]; NaN where fitted."""
        return np.where(self.masks, np.nan, log_predicted - np.log(self.points.y))

    def score(self, log_predicted: np.ndarray) -> float:
        """Root mean square of the held-out errors of ln y: over the points of a cut, then the
        geometric mean over the cuts, so that each counts alike however hard it is."""
        squares = np.nanmean(self.errors(log_predicted) ** 2, 1)
        return float(np.exp(0.5 * np.log(np.maximum(squares, 1e-16)).mean()))

    def last_value(self) -> np.ndarray:
        """The naive prediction, [R, N]: y stays what it was at the largest fitted x."""
        y = np.log(self.points.y)
        at_top = [y[m & (self.points.x == self.points.x[m].max())].mean() for m in self.masks]
        return np.repeat(np.array(at_top)[:, None], len(y), 1)

    def mean_value(self) -> np.ndarray:
        """The prediction without any trend, [R, N]: the geometric mean of the fitted y."""
        y = np.log(self.points.y)
        return np.repeat(np.array([y[m].mean() for m in self.masks])[:, None], len(y), 1)

    def naive(self) -> dict[str, np.ndarray]:
        """What a law must beat."""
        return {LAST_VALUE: self.last_value(), MEAN_VALUE: self.mean_value()}


def make_hold_out(points: Points, min_scales: int) -> HoldOut | None:
    """Cuts that leave at least `min_scales` different x to fit on; None if there are none.

    With many scales, at most MAX_CUTS cuts, evenly spaced in ln x, hold out 10 to 40% of the x.
    """
    distinct = np.unique(points.x)
    fewest = max(min_scales, int(np.ceil(MIN_SHARE * len(distinct))))
    if fewest >= len(distinct):
        return None
    held_out = min(int(np.ceil(MIN_HELD_OUT * len(distinct))), len(distinct) - fewest)
    tops = distinct[fewest - 1 : len(distinct) - held_out]  # the largest x that a cut may fit
    wanted = np.exp(np.linspace(np.log(tops[0]), np.log(tops[-1]), MAX_CUTS))
    chosen = sorted({int(np.abs(np.log(tops / w)).argmin()) for w in wanted}, reverse=True)
    masks = np.stack([points.x <= tops[i] for i in chosen])
    ratios = np.array([points.x.max() / tops[i] for i in chosen])
    return HoldOut(points, masks, ratios)


def predictions(fit: FormFit, hold_out: HoldOut) -> np.ndarray:
    """ln y at all points by a form fitted to each cut, [R, N]."""
    return fit.log_predict(fit.points.x, fit_parts(fit, hold_out.masks))


def chance_of_order(points: Points) -> float:
    """The probability that shuffled y would fall with x as steadily, by Spearman's rank
    correlation of the means at each x: exact for up to EXACT scales, else by Student's t."""
    distinct, inverse = np.unique(points.x, return_inverse=True)
    return chance_of_fall(distinct, np.bincount(inverse, np.log(points.y)) / np.bincount(inverse))


def chance_of_fall(x: np.ndarray, y: np.ndarray) -> float:
    """The probability that shuffled y [N] would fall with x [N] as steadily, by ranks."""
    n, order, ranks = len(x), stats.rankdata(x), stats.rankdata(y)
    if np.ptp(ranks) == 0 or np.ptp(order) == 0:
        return 1.0
    if n <= EXACT:
        # The correlation rises with the sum of the products of the ranks.
        shuffled = np.array(list(itertools.permutations(ranks))) @ order
        return float(np.mean(shuffled <= ranks @ order))
    rho = np.corrcoef(order, ranks)[0, 1]
    t = rho * np.sqrt((n - 2) / max(1 - rho**2, 1e-12))
    return float(stats.t.cdf(t, n - 2))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a law may be extrapolated.

    Attributes:
      reach: how many times beyond the largest x the hold-out supports; 0 if it does not.
      reason: in words.
      scale: what the reach is counted in.
    """

    reach: float
    reason: str
    scale: str = "x"

    @property
    def is_supported(self) -> bool:
        return self.reach > 0

    def __str__(self) -> str:
        if self.is_supported:
            return f"supported up to {self.reach:.1f}x the largest {self.scale}: {self.reason}"
        return f"not supported: {self.reason}"


def judge(hold_out: HoldOut | None, predicted: np.ndarray | None, points: Points) -> Verdict:
    """Says how far a law predicted unseen larger scales, and better than doing nothing.

    The reach is the largest distance of a cut up to which all held-out points together are
    predicted with an error of at most MIN_SKILL of each naive one's.
    """
    if points.num_scales < MIN_SCALES:
        return Verdict(0.0, f"{points.num_scales} different x are too few; {MIN_SCALES} needed")
    chance = chance_of_order(points)
    if chance > MAX_CHANCE:
        return Verdict(
            0.0, f"y does not fall steadily with x (chance does as well in {chance:.2g})"
        )
    if hold_out is None or predicted is None:
        return Verdict(0.0, "too few different x to hold any out")
    errors = hold_out.errors(predicted)
    naive = {name: hold_out.errors(log) for name, log in hold_out.naive().items()}
    ours, told = 0.0, ""
    for ratio in sorted(hold_out.ratios, reverse=True):
        inside = np.isfinite(errors) & (hold_out.distances <= np.log(ratio) * (1 + 1e-9))
        ours = np.sqrt(np.mean(errors[inside] ** 2))
        each = {name: np.sqrt(np.mean(e[inside] ** 2)) for name, e in naive.items()}
        best = min(each, key=lambda name: each[name])
        told = f"{best.replace('_', ' ')} to {each[best]:.2%}"
        if ours <= MIN_SKILL * each[best]:
            return Verdict(
                float(ratio), f"held-out x up to so far are predicted to {ours:.2%}, by the {told}"
            )
    return Verdict(0.0, f"held-out larger x are predicted to {ours:.2%}, by the {told}")
