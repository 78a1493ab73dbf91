"""Starts for E + A/N^alpha + B/D^beta: at given exponents the rest is a linear problem."""

import itertools

import numpy as np
from jaxtyping import Float

EXPONENTS = np.geomspace(0.03, 2.0, 16)  # of the grid, along each side
SMALLEST = 1e-3  # a coefficient of zero has no logarithm: it starts at this share of the loss


def nonnegative_least_squares(
    gram: Float[np.ndarray, "*batch c c"], right: Float[np.ndarray, "*batch c"]
) -> tuple[Float[np.ndarray, "*batch c"], Float[np.ndarray, "*batch"]]:
    """Minimises x G x - 2 r x over x >= 0, exactly: each set of free coefficients is tried.

    Returns:
      The coefficients, and the value: the sum of squared errors less that of the data.
    """
    best, lowest = np.zeros(right.shape), np.zeros(right.shape[:-1])
    terms = range(right.shape[-1])
    for subset in itertools.chain(*(itertools.combinations(terms, k + 1) for k in terms)):
        part = gram[..., subset, :][..., :, subset]
        # Columns may be parallel, such as a term that does not fall and the floor.
        ridge = 1e-12 * np.trace(part, axis1=-2, axis2=-1)[..., None, None] * np.eye(len(subset))
        found = np.linalg.solve(part + ridge, right[..., subset, None])[..., 0]
        value = np.einsum("...i,...ij,...j->...", found, part, found)
        value -= 2 * np.einsum("...i,...i->...", found, right[..., subset])
        is_better = np.all(found >= 0, axis=-1) & (value < lowest)
        lowest = np.where(is_better, value, lowest)
        whole = np.zeros(right.shape)
        whole[..., subset] = found
        best = np.where(is_better[..., None], whole, best)
    return best, lowest


def projected_starts(
    n: Float[np.ndarray, " runs"],
    d: Float[np.ndarray, " runs"],
    v: Float[np.ndarray, " runs"],
    weights: Float[np.ndarray, "problems runs"],
    is_tied: bool,
    count: int | None = None,
) -> Float[np.ndarray, "problems count 5"]:
    """The cells of a grid over (alpha, beta), the best first, for each weighting of the runs.

    The squared error is relative, which to first order is the squared logarithmic one.

    Args:
      n, d, v: logarithms of sizes, examples and losses, each less its mean.
      is_tied: only cells with alpha = beta.
      count: how many of the best cells; all by default.

    Returns:
      ln E, ln A, ln B of the centred problem, ln alpha, ln beta.

    Source: variable projection, Golub and Pereyra 1973; with non-negative least squares for
    scaling laws, Open-Athena 2026 (the two-dimensional problem has a condition number near 10).
    """
    first, second = np.meshgrid(EXPONENTS, EXPONENTS, indexing="ij")
    cells = np.stack([first.ravel(), second.ravel()], 1)
    if is_tied:
        cells = cells[cells[:, 0] == cells[:, 1]]
    columns = (
        np.stack(
            [
                np.ones((len(cells), len(n))),
                np.exp(-np.multiply.outer(cells[:, 0], n)),
                np.exp(-np.multiply.outer(cells[:, 1], d)),
            ],
            1,
        )
        * np.exp(-v)[None, None]
    )  # [cells, 3, runs]
    products = columns[:, :, None] * columns[:, None]
    gram = np.einsum("pr,cijr->pcij", weights, products, optimize=True)
    right = np.einsum("pr,cir->pci", weights, columns, optimize=True)
    coefficients, value = nonnegative_least_squares(gram, right)
    order = np.argsort(value, axis=1, kind="stable")[:, :count]
    logs = np.log(np.maximum(np.take_along_axis(coefficients, order[..., None], 1), SMALLEST))
    return np.concatenate([logs, np.log(cells)[order]], -1)
