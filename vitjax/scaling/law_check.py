"""Whether a law of size and data may be believed: fitted to small compute, scored on large."""

import numpy as np
from numpy.typing import ArrayLike

from vitjax.errors import InputError
from vitjax.scaling.parametric import fit_parametric
from vitjax.scaling.points import check_positive
from vitjax.scaling.validate import MIN_SKILL, Verdict

CUTS = (0.5, 0.6, 0.7, 0.8)  # shares of the runs, by compute, that a cut fits


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
    over all runs up to so far, is at most MIN_SKILL of the nearest run's.
    """
    columns = check_positive(num_params=num_params, num_examples=num_examples, loss=loss)
    n, d, y = (columns[k] for k in ("num_params", "num_examples", "loss"))
    compute = n * d
    order = np.sort(compute)
    ours, naive, distance, ratios = [], [], [], []
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
        naive.append(np.log(naive_law(n, d, y, mask)[~mask]) - np.log(y[~mask]))
        distance.append(np.log(compute[~mask] / compute[mask].max()))
        ratios.append(float(compute.max() / compute[mask].max()))
    if not ratios:
        return Verdict(0.0, reason)
    errors, last, far = (np.concatenate(parts) for parts in (ours, naive, distance))
    mine = theirs = 0.0
    for ratio in sorted(set(ratios), reverse=True):
        inside = far <= np.log(ratio) * (1 + 1e-9)
        mine, theirs = (float(np.sqrt(np.mean(e[inside] ** 2))) for e in (errors, last))
        if ratio > 1 and mine <= MIN_SKILL * theirs:
            return Verdict(
                ratio,
                f"held-out runs of up to so much more compute are predicted to {mine:.2%}, by the "
                f"nearest fitted run to {theirs:.2%}",
                "compute",
            )
    return Verdict(
        0.0,
        f"on held-out runs of more compute it errs by {mine:.2%}, the nearest run by {theirs:.2%}",
    )
