"""The score of ISIC 2019: balanced multiclass accuracy of a prediction file.

Source: the semantics of ImageMarkup/isic-challenge-scoring, in our own words.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vitjax.errors import InputError
from vitjax.medical.metrics.inputs import as_numbers, as_probabilities, as_weights, listed
from vitjax.medical.metrics.ranking import auroc, average_precision, mean_of_defined

IMAGE = "image"
WEIGHTS = ("score_weight", "validation_weight")
UNSCORED_IMAGES = ("ISIC_0035068",)
UNDECIDED = -1


def decide(probabilities: Float[np.ndarray, "N C"]) -> Int[np.ndarray, " N"]:
    """The class of the one largest probability; -1, undecided, where several are the largest."""
    largest = probabilities.max(1, keepdims=True) == probabilities
    return np.where(largest.sum(1) == 1, largest.argmax(1), UNDECIDED)


def _recalls(
    truth: np.ndarray, given: np.ndarray, weights: np.ndarray, num_categories: int
) -> Float[np.ndarray, " C"]:
    """The recall of each category; NaN for one of no weight."""
    total = np.bincount(truth, weights, num_categories)
    found = np.bincount(truth, weights * (truth == given), num_categories)
    return np.divide(found, total, out=np.full(num_categories, np.nan), where=total > 0)


def score_arrays(
    truth: Any,
    predictions: Any,
    categories: Sequence[str],
    *,
    images: Sequence[str] | None = None,
    score_weight: Any = None,
    validation_weight: Any = None,
) -> dict[str, Any]:
    """Scores predictions whose rows and columns are those of the truth.

    Args:
      truth: one-hot `[N, C]`.
      predictions: `[N, C]` in 0 to 1, compared as they are, not normalised. A row with several
        largest values is undecided, and wrong.
      categories: the names of the columns.
      images: names of the rows; with them ISIC_0035068 weighs nothing, as officially.
      score_weight, validation_weight: weights of the rows, `[N]`; ones if None.

    Returns:
      "balanced_accuracy", the score: the mean recall over the categories that weigh something (a
      category that is in the truth and never predicted counts as 0); "validation", the same by
      validation_weight; "macro_auc" over categories where it is defined; "num_images",
      "num_undecided"; "per_category": {name: {"recall", "auc", "average_precision", "weight"}}.

    Raises:
      InputError: shapes disagree, a value is outside 0 to 1, or the truth of a row that weighs
        something is no single category.
    """
    known, values = as_numbers(truth, "truth", (2,)), as_probabilities(predictions, dims=(2,))
    if known.shape != values.shape or known.shape[1] != len(categories):
        raise InputError(
            f"shapes disagree: truth {known.shape}, predictions {values.shape}, "
            f"{len(categories)} categories"
        )
    names = np.arange(len(known)) if images is None else np.asarray(images)
    if len(names) != len(known):
        raise InputError(f"{len(names)} image names for {len(known)} rows")
    scored = ~np.isin(names, UNSCORED_IMAGES)
    factors, validation = (
        as_weights(weights, len(known)) * scored for weights in (score_weight, validation_weight)
    )
    classes, given = decide(known), decide(values)
    unclear = (classes == UNDECIDED) & (factors + validation > 0)
    if unclear.any():
        raise InputError(f"the truth of {listed(names[unclear])} is no single category")
    factors, validation = (np.where(classes < 0, 0.0, w) for w in (factors, validation))
    classes = np.maximum(classes, 0)
    recalls = _recalls(classes, given, factors, len(categories))
    per_category = {
        name: {
            "recall": float(recalls[number]),
            "auc": auroc(classes == number, values[:, number], factors),
            "average_precision": average_precision(classes == number, values[:, number], factors),
            "weight": float(factors[classes == number].sum()),
        }
        for number, name in enumerate(categories)
    }
    return {
        "balanced_accuracy": mean_of_defined(recalls),
        "validation": mean_of_defined(_recalls(classes, given, validation, len(categories))),
        "macro_auc": mean_of_defined([found["auc"] for found in per_category.values()]),
        "num_images": len(known),
        "num_undecided": int((given == UNDECIDED).sum()),
        "per_category": per_category,
    }


def _read(path: str | Path) -> tuple[list[str], list[str], list[list[str]]]:
    """Column names without `image`, image names without .jpg, and the other cells as texts."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    if not rows or IMAGE not in rows[0]:
        raise InputError(f"{path}: column 'image' is missing from the header")
    header = rows[0]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: columns occur twice: {listed(repeated)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise InputError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")
    at = header.index(IMAGE)
    images = [row[at][:-4] if row[at].lower().endswith(".jpg") else row[at] for row in rows[1:]]
    seen: set[str] = set()
    twice = sorted({name for name in images if name in seen or seen.add(name)})
    if twice:
        raise InputError(f"{path}: images occur twice: {listed(twice)}")
    return header[:at] + header[at + 1 :], images, [row[:at] + row[at + 1 :] for row in rows[1:]]


def _parse(
    path: str | Path, columns: list[str], images: list[str], cells: list[list[str]]
) -> Float[np.ndarray, "N C"]:
    numbers = np.empty((len(images), len(columns)))
    for image, row, into in zip(images, cells, numbers, strict=True):
        for number, (column, cell) in enumerate(zip(columns, row, strict=True)):
            try:
                into[number] = float(cell)
            except ValueError:
                raise InputError(
                    f"{path}: {image}, column {column}: {cell!r} is no number"
                ) from None
            if np.isnan(into[number]):
                raise InputError(f"{path}: {image}, column {column}: the value is missing")
    return numbers


def _must_match(path: str | Path, what: str, allowed: Sequence[str], given: Sequence[str]) -> None:
    missing, extra = (sorted(a) for a in (set(allowed) - set(given), set(given) - set(allowed)))
    if missing:
        raise InputError(f"{path}: {what} are missing: {listed(missing)}")
    if extra:
        raise InputError(f"{path}: {what} are not in the truth: {listed(extra)}")


def _check_predictions(
    path: str | Path, columns: list[str], images: list[str], cells: list[list[str]],
    values: np.ndarray,
) -> None:  # fmt: skip
    for number, column in enumerate(columns):
        texts = [row[number] for row in cells]
        if texts and not any(set(text) - set("+-0123456789") for text in texts):
            raise InputError(
                f"{path}: column {column} holds integers only, which the official scorer refuses: "
                "write 1.0, not 1"
            )
    for row, number in np.argwhere((values < 0) | (values > 1)):
        raise InputError(
            f"{path}: {images[row]}, column {columns[number]}: {cells[row][number]} is outside "
            "0 to 1"
        )


def score(truth_csv: str | Path, prediction_csv: str | Path) -> dict[str, Any]:
    """Scores a prediction file; what it returns is what score_arrays returns.

    Args:
      truth_csv: `image`, a column for each category, and perhaps score_weight and
        validation_weight.
      prediction_csv: `image` (with or without .jpg) and the same categories, in any order.

    Raises:
      InputError: as in score_arrays; images or columns that are missing, extra or there twice;
        a cell that is blank or no float. Names them.
    """
    columns, images, cells = _read(truth_csv)
    table = _parse(truth_csv, columns, images, cells)
    categories = [name for name in columns if name not in WEIGHTS]
    given_columns, given_images, given_cells = _read(prediction_csv)
    _must_match(prediction_csv, "columns", categories, given_columns)
    _must_match(prediction_csv, "images", images, given_images)
    given = _parse(prediction_csv, given_columns, given_images, given_cells)
    _check_predictions(prediction_csv, given_columns, given_images, given_cells, given)
    row_of = {image: row for row, image in enumerate(given_images)}
    rows = [row_of[image] for image in images]
    order = [given_columns.index(name) for name in categories]
    weights = {name: table[:, columns.index(name)] if name in columns else None for name in WEIGHTS}
    return score_arrays(
        table[:, [columns.index(name) for name in categories]],
        given[rows][:, order],
        categories,
        images=images,
        **weights,
    )
