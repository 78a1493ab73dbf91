"""Classifiers on features that stay as they are: linear, nearest neighbours, and none at all.

Each takes features and labels of the training rows and gives logits for all rows, in the order of
a head's logits; what it may choose it chooses on the validation rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, logit, softmax

from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.scoring import mean_auroc, probabilities, to_units

PENALTIES = tuple(10.0**p for p in range(-5, 2))  # of the mean loss, on standardised features
NEIGHBOURS = (5, 10, 20, 50, 100)
TEMPERATURE = 0.07
LEAST = 1e-6
NEWTON_SIZE, NEWTON_STEPS, GRADIENT = 2048, 50, 1e-8
Features = Float[np.ndarray, "N D"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Logits of all rows, and what was chosen.

    Attributes:
      logits: `[N, K]` of the whole cohort.
      chosen: the setting that the validation rows chose.
      kernel, bias: of a linear probe, on features as they are.
    """

    logits: Float[np.ndarray, "N K"]
    chosen: str
    kernel: Float[np.ndarray, "D K"] | None = None
    bias: Float[np.ndarray, " K"] | None = None


def _targets(s: LabelSet, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each logit of a set should be, and whether it is known."""
    labels = np.asarray(labels, np.float64)
    known = np.isfinite(labels)
    if s.kind == "multi":
        return np.nan_to_num(labels), known
    at = np.nan_to_num(labels).astype(int)
    if s.kind == "single":
        return np.eye(len(s.classes))[at], np.repeat(known[:, None], len(s.classes), 1)
    above = (at[:, None] > np.arange(s.num_logits)).astype(float)
    return above, np.repeat(known[:, None], s.num_logits, 1)


def fit_linear(
    x: Features, s: LabelSet, labels: np.ndarray, penalty: float, start: np.ndarray | None = None
) -> Float[np.ndarray, "D1 K"]:
    """Logistic regression with an L2 penalty; the last row is the bias.

    The loss is the mean over known examples (of each logit, for sigmoids), plus half the penalty
    times the squared kernel. Newton's method where the Hessian is small, else L-BFGS.
    """
    targets, known = _targets(s, labels)
    keep = known.any(1)
    x, targets, known = x[keep], targets[keep], known[keep]
    share = known / np.maximum(known.sum(0), 1)
    is_binary = s.kind == "single" and len(s.classes) == 2
    columns = 1 if is_binary else targets.shape[1]
    if (s.kind == "single" and not is_binary) or columns * x.shape[1] > NEWTON_SIZE:
        return _lbfgs(x, s, targets, share, penalty, start)
    if is_binary:  # one column, halved and mirrored, has the same loss and penalty
        first = None if start is None else start[:, 1] - start[:, 0]
        found = _newton(x, targets[:, 1], share[:, 1], penalty / 2, first)
        return np.stack([-found / 2, found / 2], 1)
    starts = [None] * columns if start is None else start.T
    fitted = [_newton(x, *parts) for parts in zip(
        targets.T, share.T, [penalty] * columns, starts, strict=True)]  # fmt: skip
    return np.stack(fitted, 1)


def _newton(
    x: np.ndarray, target: np.ndarray, share: np.ndarray, penalty: float, start: np.ndarray | None
) -> Float[np.ndarray, " D1"]:
    """One sigmoid: Newton's steps, halved until the loss falls."""
    d = x.shape[1]
    w = np.zeros(d + 1) if start is None else start.copy()

    def loss(w: np.ndarray, z: np.ndarray) -> float:
        each = target * log_expit(z) + (1 - target) * log_expit(-z)
        return float(-(share * each).sum() + 0.5 * penalty * w[:-1] @ w[:-1])

    z = x @ w[:-1] + w[-1]
    value = loss(w, z)
    for _ in range(NEWTON_STEPS):
        p = expit(z)
        slope, curve = share * (p - target), share * p * (1 - p)
        grad = np.append(x.T @ slope + penalty * w[:-1], slope.sum())
        if np.abs(grad).max() < GRADIENT:
            break
        weighted = x * curve[:, None]
        hessian = np.empty((d + 1, d + 1))
        hessian[:d, :d] = x.T @ weighted
        hessian[:d, d] = hessian[d, :d] = weighted.sum(0)
        hessian[d, d] = curve.sum()
        hessian[np.arange(d), np.arange(d)] += penalty
        hessian[d, d] += 1e-12  # a label that is always the same
        step = solve(hessian, grad, assume_a="pos")
        size, z_step = 1.0, x @ step[:-1] + step[-1]
        while size > 1e-6 and loss(w - size * step, z - size * z_step) > value:
            size /= 2
        w, z = w - size * step, z - size * z_step
        value = loss(w, z)
    return w


def _lbfgs(
    x: np.ndarray,
    s: LabelSet,
    targets: np.ndarray,
    share: np.ndarray,
    penalty: float,
    start: np.ndarray | None,
) -> Float[np.ndarray, "D1 K"]:
    d, k = x.shape[1], targets.shape[1]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(d + 1, k)
        z = x @ w[:-1] + w[-1]
        if s.kind == "single":
            loss = -(share * targets * log_softmax(z, 1)).sum()
            slope = share * (softmax(z, 1) - targets)
        else:
            loss = -(share * (targets * log_expit(z) + (1 - targets) * log_expit(-z))).sum()
            slope = share * (expit(z) - targets)
        grad = np.concatenate([x.T @ slope + penalty * w[:-1], slope.sum(0, keepdims=True)])
        return loss + 0.5 * penalty * (w[:-1] ** 2).sum(), grad.ravel()

    first = np.zeros((d + 1) * k) if start is None else start.ravel()
    options = {"maxiter": 500, "maxcor": 20}
    found = minimize(value, first, jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(d + 1, k)


def linear(
    features: Features,
    cohort: Cohort,
    train: np.ndarray,
    val: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
) -> Probe:
    """Logistic regression on standardised features, its penalty chosen on the validation rows."""
    mean = np.nanmean(features[train], 0)
    scale = np.nanstd(features[train], 0) + 1e-6
    x = np.nan_to_num((features - mean) / scale)
    starts: dict[str, np.ndarray | None] = {s.name: None for s in cohort.label_sets}

    def fitted(penalty: float) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for s in cohort.label_sets:
            labels = np.asarray(cohort.labels[s.name])[train]
            starts[s.name] = fit_linear(x[train], s, labels, penalty, starts[s.name])
            parts.append(starts[s.name])
        return (w := np.concatenate(parts, 1)), x @ w[:-1] + w[-1]

    tried = {p: fitted(p) for p in sorted(penalties, reverse=True)}
    best = _best({p: logits for p, (_, logits) in tried.items()}, cohort, val)
    weights, logits = tried[best]
    kernel = weights[:-1] / scale[:, None]
    unread = ~np.isfinite(features).all(1)
    logits[unread] = np.nan
    return Probe(logits, f"penalty {best:g}", kernel, weights[-1] - mean @ kernel)


def knn(
    features: Features,
    cohort: Cohort,
    train: np.ndarray,
    val: np.ndarray,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> Probe:
    """Votes of the nearest training images by cosine, weighted by exp(similarity / 0.07).

    Exact. How many vote is chosen on the validation rows.

    Source: Wu et al. 2018 (arXiv 1805.01978), with the temperature that DINO uses (Caron et al.
    2021, arXiv 2104.14294).
    """
    x = np.nan_to_num(features.astype(np.float32))
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    options = sorted({min(k, len(train)) for k in neighbours})
    largest = options[-1]
    targets = [_targets(s, np.asarray(cohort.labels[s.name])[train]) for s in cohort.label_sets]
    found = {k: [] for k in options}
    for start in range(0, len(x), 1024):
        similar = x[start : start + 1024] @ x[train].T
        nearest = np.argpartition(-similar, largest - 1, axis=1)[:, :largest]
        order = np.argsort(-np.take_along_axis(similar, nearest, 1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)
        weights = np.exp((np.take_along_axis(similar, nearest, 1) - 1) / TEMPERATURE)
        for k in options:
            w, at = weights[:, :k, None], nearest[:, :k]
            votes = [
                ((w * known[at] * values[at]).sum(1) + LEAST * values.mean(0))
                / ((w * known[at]).sum(1) + LEAST)
                for values, known in targets
            ]
            found[k].append(np.concatenate(votes, 1))
    logits = {k: _to_logits(np.concatenate(v), cohort) for k, v in found.items()}
    best = _best(logits, cohort, val)
    logits[best][~np.isfinite(features).all(1)] = np.nan
    return Probe(logits[best], f"{best} neighbours")


def _to_logits(p: np.ndarray, cohort: Cohort) -> np.ndarray:
    """Logits that give these probabilities."""
    p, start, parts = np.clip(p, LEAST, 1 - LEAST), 0, []
    for s in cohort.label_sets:
        part = p[:, start : start + s.num_logits]
        parts.append(np.log(part) if s.kind == "single" else logit(part))
        start += s.num_logits
    return np.concatenate(parts, 1)


def majority(cohort: Cohort, train: np.ndarray) -> Probe:
    """What each label's frequency alone says: the same of every image."""
    means = []
    for s in cohort.label_sets:
        values, known = _targets(s, np.asarray(cohort.labels[s.name])[train])
        means.append((values * known).sum(0) / np.maximum(known.sum(0), 1))
    frequency = np.repeat(np.concatenate(means)[None], len(cohort), 0)
    return Probe(_to_logits(frequency, cohort), "")


def _best(logits: dict[Any, np.ndarray], cohort: Cohort, val: np.ndarray) -> Any:
    """The setting with the highest mean AUROC of the validation units; the first of equals."""

    def value(found: np.ndarray) -> float:
        scored = to_units(cohort, val, probabilities(cohort.label_sets, found[val]))
        auroc = mean_auroc(scored)
        return -1.0 if np.isnan(auroc) else auroc

    return max(logits, key=lambda setting: value(logits[setting]))


def pixels(cohort: Cohort, read: Callable[[int], np.ndarray | None], side: int = 32) -> Features:
    """Images as rows of grey or colour values, all of the first one's size, at most `side` pixels.

    Area-averaged; NaN for an image of which `read` gives None.
    """
    import cv2

    rows: list[np.ndarray | None] = []
    size: tuple[int, int] | None = None
    for index in range(len(cohort)):
        image = read(index)
        if image is not None:
            size = size or (min(side, image.shape[1]), min(side, image.shape[0]))
            if (image.shape[1], image.shape[0]) != size:
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            image = image.ravel().astype(np.float32) / 255
        rows.append(image)
    width = next((len(row) for row in rows if row is not None), 1)
    return np.stack([np.full(width, np.nan, np.float32) if r is None else r for r in rows])
