"""Fits a law of one variable and says how far it can be believed: `fit_curve`."""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy import stats

from vitjax.errors import InputError
from vitjax.scaling.form_fit import HUBER, KEEP, NUM_STARTS, FormFit, fit_form
from vitjax.scaling.forms import FORMS, get_form
from vitjax.scaling.points import Points, check_positive, make_points
from vitjax.scaling.validate import (
    HoldOut,
    Verdict,
    judge,
    make_hold_out,
    predictions,
)

OUTLIERS = {"keep": KEEP, "huber": HUBER}
ILL_CONDITIONED = 1e10


@dataclasses.dataclass(frozen=True)
class Row:
    """A form on the leaderboard.

    Attributes:
      train_error, hold_out_error: root mean square of ln y.
      weight: its share in the prediction.
    """

    form: str
    train_error: float
    hold_out_error: float
    weight: float


@dataclasses.dataclass(frozen=True)
class CurveFit:
    """A law of one variable.

    With `form="auto"` the prediction is the weighted geometric mean of all forms (see
    `fit_curve`); `form` and `params` are of the one with the largest weight.

    Attributes:
      fits: every form that was fitted, by name.
      weights: their shares; 1 for a form that was asked for.
      hold_out_log: ln y at all points as predicted from each cut, [R, N]; None without a hold-out.
      leaderboard: the forms and the naive baseline, best first.
    """

    points: Points
    fits: dict[str, FormFit]
    weights: dict[str, float]
    is_auto: bool
    hold_out: HoldOut | None
    hold_out_log: np.ndarray | None
    leaderboard: tuple[Row, ...]
    verdict_details: Verdict
    resamples: int
    seed: int

    @property
    def form(self) -> str:
        return max(self.weights, key=lambda name: self.weights[name])

    @property
    def best(self) -> FormFit:
        return self.fits[self.form]

    @property
    def params(self) -> dict[str, float]:
        """Of `form`, in the data's units; its formula is `FORMS[form].formula`."""
        return self.best.params

    @property
    def verdict(self) -> str:
        """ "supported up to 8.0x ..." or "not supported: ..."."""
        return str(self.verdict_details)

    @property
    def reach(self) -> float:
        """How many times beyond the largest x the hold-out supports; 0 if it does not."""
        return self.verdict_details.reach

    @functools.cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        return self.best.resample(self.resamples, self.seed)

    @functools.cached_property
    def profiles(self) -> dict[str, tuple[float, float]]:
        """95% profile intervals of the internal parameters of `form`, inside their bounds."""
        return self.best.profile(0.95)

    @property
    def not_identified(self) -> tuple[str, ...]:
        """Internal parameters whose 95% profile interval is not closed inside their bounds; a floor
        among them cannot be told from zero, or from anything below the data."""
        fit = self.best
        names = []
        for i, name in enumerate(fit.form.names):
            (low, high), (least, most) = self.profiles[name], fit.bounds[i]
            margin = 1e-3 * (most - least)
            if low <= least + margin or high >= most - margin:
                names.append(name)
        return tuple(names)

    @property
    def bounds_hit(self) -> tuple[str, ...]:
        return self.best.bounds_hit

    @property
    def num_starts(self) -> int:
        return NUM_STARTS

    @property
    def num_agreeing(self) -> int:
        """Of the starts of `form`, how many came to the same optimum."""
        return self.best.num_agreeing

    @property
    def condition_number(self) -> float:
        return self.best.condition_number

    @functools.cached_property
    def noise(self) -> float:
        """Standard deviation of ln y around the law, widened for the degrees of freedom taken,
        which are more where neighbouring residuals go together."""
        fit = self.best
        residual = np.log(self.points.y) - self._log_mean(self.points.x)
        n, p = len(residual), fit.form.num_params
        together = 1.0
        if n > 2 * p and residual.std() > 0:
            lag = np.corrcoef(residual[1:], residual[:-1])[0, 1]
            lag = float(np.clip(lag - 2 / np.sqrt(n), 0.0, 0.9))  # only where it is not chance
            together = (1 + lag) / (1 - lag)
        free = max(n - p * together, n / 4)
        return max(float(np.sqrt((residual**2).sum() / free)), 1e-12)

    @functools.cached_property
    def seed_noise(self) -> float | None:
        """Standard deviation of ln y among points of the same x; None where none repeat."""
        _, inverse, counts = np.unique(self.points.x, return_inverse=True, return_counts=True)
        v = np.log(self.points.y)
        free = int((counts - 1).sum())
        if not free:
            return None
        means = np.bincount(inverse, v) / counts
        return float(np.sqrt(((v - means[inverse]) ** 2).sum() / free))

    def _log_mean(self, x: np.ndarray) -> np.ndarray:
        return sum(
            (w * self.fits[name].log_predict(x) for name, w in self.weights.items()),
            np.zeros(len(x)),
        )

    def predict(self, x_new: Any) -> Any:
        """y at x, in the shape of x; a number for a number."""
        x = _new_points(x_new)
        return np.exp(self._log_mean(x)).reshape(np.shape(x_new))[()]

    def samples_predict(self, x_new: Any) -> np.ndarray:
        """y at x [N] by every resample of `form`, [R, N], without the noise of a single run."""
        x = _new_points(x_new)
        fit = self.best
        shift = self._log_mean(x) - fit.log_predict(x)
        return np.exp(fit.log_predict(x, self._samples[0]) + shift)

    def interval(self, x_new: Any, level: float = 0.8, *, noise: bool = True) -> tuple[Any, Any]:
        """Where y at x lies with this probability: (low, high), each in the shape of x.

        For a form that was asked for, quantiles of the resampled laws, with the noise of a single
        run unless `noise` is False. With "auto" the form itself is in doubt: the variance of ln y
        is that of the noise, plus the largest of three views of the law's own error: the variance
        between the weighted forms, the growth with ln distance that the hold-out showed, and the
        variance of the resamples. The quantile is Student's with as many degrees of freedom as
        there were cuts. If the truth is one of the forms, such a band is wide: name the form.
        """
        if not 0 < level < 1:
            raise InputError(f"level must be in (0, 1), got {level}")
        x, shape = _new_points(x_new), np.shape(x_new)
        low, high = (1 - level) / 2, (1 + level) / 2
        laws, noises = self._samples
        sampled = self.best.log_predict(x, laws)
        if not self.is_auto:
            if noise:
                generator = np.random.default_rng(self.seed + 1)
                sampled = sampled + noises[:, None] * generator.standard_normal(sampled.shape)
            ends = np.exp(np.quantile(sampled, [low, high], axis=0))
            return ends[0].reshape(shape)[()], ends[1].reshape(shape)[()]
        mean = self._log_mean(x)
        between = sum(
            (w * (self.fits[n].log_predict(x) - mean) ** 2 for n, w in self.weights.items()),
            np.zeros(len(x)),
        )
        beyond = np.maximum(np.log(x / self.points.x.max()), 0.0)
        grown = self._growth * beyond**2
        spread = (np.quantile(sampled, 0.841, 0) - np.quantile(sampled, 0.159, 0)) / 2
        variance = np.maximum(np.maximum(between, grown), spread**2)
        variance = variance + (self.noise**2 if noise else 0.0)
        free = 1 if self.hold_out is None else len(self.hold_out.masks)
        half = stats.t.ppf(high, free) * np.sqrt(variance)
        bottom, top = (np.exp(mean + sign * half).reshape(shape)[()] for sign in (-1, 1))
        return bottom, top

    @functools.cached_property
    def _growth(self) -> float:
        """Squared error of ln y, less the noise, per squared ln distance, over the cuts."""
        if self.hold_out is None or self.hold_out_log is None:
            return 0.0
        squares = np.nanmean(self.hold_out.errors(self.hold_out_log) ** 2, 1)
        distances = np.where(self.hold_out.masks, np.nan, self.hold_out.distances)
        excess = max(squares.mean() - self.noise**2, 0.0)
        return float(excess / np.nanmean(distances**2, 1).mean())

    @property
    def param_intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of `params`, from the resamples."""
        p = self.points
        each = [self.best.form.describe(row, p.x_ref, p.y_ref) for row in self._samples[0]]
        return {
            name: tuple(float(q) for q in np.quantile([e[name] for e in each], [0.05, 0.95]))
            for name in self.params
        }  # type: ignore[return-value]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before trusting the fit."""
        lines = []
        y = self.points.y
        if len(y) >= 20 and np.all(np.diff(y) <= 0):
            lines.append(
                "y never rises: a running minimum hides the noise, and bands come out too narrow"
            )
        if self.num_agreeing < 2:
            lines.append("only one start came to this optimum; it may not be the best")
        if self.condition_number > ILL_CONDITIONED:
            lines.append(f"ill-conditioned: {self.condition_number:.1e}")
        lines += [f"{name} ended at its bound" for name in self.bounds_hit]
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything that a report needs, as plain values."""
        return {
            "form": self.form,
            "formula": self.best.form.formula,
            "source": self.best.form.source,
            "params": self.params,
            "param_intervals_90": self.param_intervals,
            "profiles_95": self.profiles,
            "weights": self.weights,
            "verdict": self.verdict,
            "reach": self.reach,
            "noise": self.noise,
            "seed_noise": self.seed_noise,
            "num_points": len(self.points),
            "num_scales": self.points.num_scales,
            "num_groups": self.points.num_groups,
            "x_range": [float(self.points.x[0]), float(self.points.x[-1])],
            "leaderboard": [dataclasses.asdict(row) for row in self.leaderboard],
            "hold_out_ratios": [] if self.hold_out is None else self.hold_out.ratios.tolist(),
            "num_starts": self.num_starts,
            "num_agreeing": self.num_agreeing,
            "bounds_hit": list(self.bounds_hit),
            "not_identified": list(self.not_identified),
            "condition_number": self.condition_number,
            "resamples": self.resamples,
            "warnings": list(self.warnings),
        }


def _new_points(x: Any) -> np.ndarray:
    return check_positive(x_new=np.asarray(x, np.float64).ravel())["x_new"]


def fit_curve(
    x: Any,
    y: Any,
    form: str = "auto",
    *,
    groups: Any = None,
    outliers: str = "keep",
    resamples: int = 200,
    seed: int = 0,
) -> CurveFit:
    """Fits how a loss or an error y falls with a scale x.

    Args:
      x, y: positive, [N]; at least four different x. An accuracy goes in as 1 - accuracy.
      form: a name of `FORMS`, or "auto": every form that the points can carry is fitted to small
        scales and scored on larger ones; predictions are their geometric mean, weighted by the
        inverse of the hold-out error (flatter than by its square, as combined forecasts are best:
        Stock and Watson 2004). Training error decides nothing.
      groups: [N], which run or trunk each point is from; points of a group are resampled together.
        Without it every point counts as a run of its own.
      outliers: "keep", or "huber": residuals beyond three times the noise count linearly. No point
        is ever dropped.
      resamples: of the bootstrap.

    Raises:
      InputError: bad rows, too few scales, an unknown form, or too few points for it.
    """
    if outliers not in OUTLIERS:
        raise InputError(f"outliers must be one of {', '.join(OUTLIERS)}, got {outliers!r}")
    if resamples < 20:
        raise InputError(f"resamples must be at least 20, got {resamples}")
    points = make_points(x, y, groups)
    delta = OUTLIERS[outliers]
    wanted = list(FORMS.values()) if form == "auto" else [get_form(form)]
    # Two scales more than parameters, or the points say nothing about the fit.
    carried = [f for f in wanted if points.num_scales >= f.num_params + 2]
    if not carried and form != "auto":
        carried = [f for f in wanted if points.num_scales > f.num_params]
    if not carried:
        needed = min(f.num_params for f in wanted) + 1
        raise InputError(
            f"form {form!r} needs at least {needed} different x, got {points.num_scales}: "
            "add scales, or choose a form with fewer parameters"
        )
    fits = {f.name: fit_form(f, points, delta=delta) for f in carried}
    # Cuts leave room for every form where there are scales enough, else for the simplest.
    most = max(f.num_params for f in carried)
    hold_out = make_hold_out(points, most + 2) or make_hold_out(points, most + 1)
    while hold_out is None and form == "auto" and len(fits) > 1:
        largest = max(fits, key=lambda name: fits[name].form.num_params)
        fits.pop(largest)
        most = max(f.form.num_params for f in fits.values())
        hold_out = make_hold_out(points, most + 1)
    cuts, scores, weights = {}, {}, dict.fromkeys(fits, 1.0 / len(fits))
    if hold_out is not None:
        cuts = {name: predictions(fit, hold_out) for name, fit in fits.items()}
        scores = {name: hold_out.score(cut) for name, cut in cuts.items()}
        inverse = {name: 1 / max(score, 1e-8) for name, score in scores.items()}
        weights = {name: value / sum(inverse.values()) for name, value in inverse.items()}
    averaged = None
    if cuts:
        averaged = sum((weights[n] * cut for n, cut in cuts.items()), np.zeros((1, len(points))))
    rows = [
        Row(n, float(np.sqrt((f.residuals**2).mean())), scores.get(n, np.nan), weights[n])
        for n, f in fits.items()
    ]
    if hold_out is not None:
        naive = hold_out.naive().items()
        rows += [Row(name, np.nan, hold_out.score(log), 0.0) for name, log in naive]
    return CurveFit(
        points=points,
        fits=fits,
        weights=weights,
        is_auto=form == "auto",
        hold_out=hold_out,
        hold_out_log=averaged,
        leaderboard=tuple(sorted(rows, key=lambda row: row.hold_out_error)),
        verdict_details=judge(hold_out, averaged, points),
        resamples=resamples,
        seed=seed,
    )
