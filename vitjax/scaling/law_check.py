"""Whether a law of size and data may be believed: fitted to small compute, scored on large."""

import numpy as np
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.scaling.parametric import fit_parametric
from vitjax.scaling.points import check_positive
from vitjax.scaling.validate import MIN_SKILL, Verdict, chance_of_fall

CUTS = (0.5, 0.6, 0.7, 0.8)  # shares of the runs, by compute, that a cut fits
MAX_CHANCE = 1e-5  # that shuffled losses fall as steadily; a law of size and data has many runs


def naive_law(
    num_params: np.ndarray, num_examples: np.ndarray, loss: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """What a table without a law says: the loss of the fitted run that is nearest in ln N and ln D,
    [N]. Beyond the fitted runs this is the last value."""
    n, d = np.log(num_params), np.log(num_examples)
    gaps = (n[:, None] - n[mask][None]) ** 2 + (d[:, None] - d[mask][None]) ** 2
    return loss[mask][gaps.argmin(1)]


def check_law(num_params: ArrayLike, num_examples: ArrayLike, loss: ArrayLike) -> Verdict:
    """Cuts the runs by N x D, fits E + A/N^alpha + B/D^beta below, scores it above.

    Supported is the law up to the largest factor in compute at which its held-out error of ln L,
    over all runs up to so far, is at most MIN_SKILL of the nearest run's and of the mean's. Losses
    that fall with N x D no more steadily than shuffled ones might support none.
    """
    columns = check_positive(num_params=num_params, num_examples=num_examples, loss=loss)
    n, d, y = (columns[k] for k in ("num_params", "num_examples", "loss"))
    compute = n * d
    chance = chance_of_fall(compute, y)
    if chance > MAX_CHANCE:
        return Verdict(
            0.0,
            f"the loss does not fall steadily with compute (chance does as well in {chance:.2g})",
        )
    order = np.sort(compute)
    ours, distance, ratios = [], [], []
    naive: dict[str, list[np.ndarray]] = {"nearest fitted run": [], "mean of the fitted runs": []}
    reason = "too few runs to hold any out"
    for share in CUTS:
        top = order[max(int(share * len(y)) - 1, 0)]
        mask = compute <= top * (1 + 1e-9)
        if mask.all():
            continue
        try:
            law = fit_parametric(n[mask], d[mask], y[mask], resamples=0)
        except InputError as error:
            reason = f"what lies below the largest runs cannot carry the law: {error}"
            continue
        ours.append(np.log(law.predict(n[~mask], d[~mask])) - np.log(y[~mask]))
        nearest = np.log(naive_law(n, d, y, mask)[~mask])
        for log, errors in zip((nearest, np.log(y[mask]).mean()), naive.values(), strict=True):
            errors.append(log - np.log(y[~mask]))
        distance.append(np.log(compute[~mask] / compute[mask].max()))
        ratios.append(float(compute.max() / compute[mask].max()))
    if not ratios:
        return Verdict(0.0, reason)
    errors, far = np.concatenate(ours), np.concatenate(distance)
    others = {name: np.concatenate(parts) for name, parts in naive.items()}
    mine, told = 0.0, ""
    for ratio in sorted(set(ratios), reverse=True):
        inside = far <= np.log(ratio) * (1 + 1e-9)
        mine = float(np.sqrt(np.mean(errors[inside] ** 2)))
        each = {name: float(np.sqrt(np.mean(e[inside] ** 2))) for name, e in others.items()}
        best = min(each, key=lambda name: each[name])
        told = f"{mine:.2%}, by the {best} to {each[best]:.2%}"
        if ratio > 1 and mine <= MIN_SKILL * each[best]:
            text = f"held-out runs of up to so much more compute are predicted to {told}"
            return Verdict(ratio, text, "compute")
    return Verdict(0.0, f"held-out runs of more compute are predicted to {told}")
