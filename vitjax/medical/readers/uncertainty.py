"""What becomes of a radiologist's "may be": the policies for cells of 1, 0, -1 and blank.

Source: Irvin et al. 2019 (CheXpert, arXiv 1901.07031) for zeros, ones, ignore, multiclass and
selftrain; Pham et al. 2021 (arXiv 1911.06475) for smooth; LibAUC's reader for mixed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import LabelSet
from vitjax.medical.readers.splits import draw
from vitjax.medical.readers.tables import numbers, read_table, refuse, refuse_repeated

POLICIES = ("zeros", "ones", "ignore", "multiclass", "smooth", "selftrain", "mixed")
BLANKS = ("zeros", "unknown")
MIXED_ONES = ("Edema", "Atelectasis")
CELLS = (1.0, 0.0, -1.0)
THREE = ("negative", "positive", "uncertain")
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


def check_policy(uncertain: str, blanks: str, scores: str | None) -> None:
    if uncertain not in POLICIES:
        raise InputError(f"uncertain is {uncertain!r}; {suggest(uncertain, POLICIES)}")
    if blanks not in BLANKS:
        raise InputError(f"blanks is {blanks!r}; {suggest(blanks, BLANKS)}")
    if (uncertain == "selftrain") != (scores is not None):
        raise InputError(
            "uncertain='selftrain' needs scores, the predictions.csv of a model for this data; "
            "no other policy takes it"
        )


def apply_policy(
    cells: Float[np.ndarray, "N L"],
    names: Sequence[str],
    ids: Sequence[str],
    uncertain: str,
    blanks: str,
    seed: int = 0,
    smooth_range: tuple[float, float] = (0.55, 0.85),
    scores: str | None = None,
) -> tuple[tuple[LabelSet, ...], dict[str, np.ndarray]]:
    """Label sets and labels of cells that hold 1, 0, -1 (uncertain) or NaN (blank).

    Args:
      names: of the columns.
      ids: of the rows: what smooth draws by, and where selftrain looks.
      blanks: "zeros" makes of a finding that is not mentioned one that is not there.
      smooth_range: what smooth draws from; (0.55, 0.85) smooths towards ones, and lower numbers,
        such as (0.0, 0.3), towards zeros.
      scores: a CSV file with a column id and one for each of the names, which selftrain needs.
    """
    check_policy(uncertain, blanks, scores)
    unsure = cells == -1
    values = np.where(np.isnan(cells) & (blanks == "zeros"), 0, cells).astype(np.float32)
    if uncertain == "multiclass":
        values = np.where(unsure, 2, values).astype(np.float32)
        sets = tuple(LabelSet(name, "single", THREE) for name in names)
        return sets, {name: values[:, number] for number, name in enumerate(names)}
    if uncertain in ("zeros", "ones"):
        values[unsure] = float(uncertain == "ones")
    elif uncertain == "mixed":
        ones = np.array([name in MIXED_ONES for name in names], np.float32)
        values = np.where(unsure, ones[None, :], values)
    elif uncertain == "ignore":
        values[unsure] = np.nan
    elif uncertain == "smooth":
        low, high = smooth_range
        if not 0 <= low < high <= 1:
            raise InputError(f"smooth_range must be 0 <= low < high <= 1, got {smooth_range}")
        for row, column in np.argwhere(unsure).tolist():
            share = draw(seed, f"{ids[row]}|{names[column]}")
            values[row, column] = low + share * (high - low)
    else:
        assert scores is not None
        values = _from_scores(values, unsure, names, ids, scores)
    findings = LabelSet("findings", "multi", tuple(names))
    return (findings,), {"findings": values}


def _from_scores(
    values: np.ndarray, unsure: np.ndarray, names: Sequence[str], ids: Sequence[str], path: str
) -> np.ndarray:
    """Uncertain cells as another model sees them."""
    table = read_table(path, ("id", *names))
    refuse_repeated(path, "id", table["id"])
    places = {name: number for number, name in enumerate(table["id"])}
    rows = np.flatnonzero(unsure.any(1))
    wanted = [ids[row] for row in rows.tolist()]
    refuse(path, (f"no row for the id {name!r}" for name in wanted if name not in places))
    found = np.array([places[name] for name in wanted], np.int64)
    for column, name in enumerate(names):
        guessed = numbers(path, name, table[name])[found]
        used = unsure[rows, column]
        refuse(
            path,
            (
                f"id {id_!r}: {name} is {value:g}; allowed: 0 to 1"
                for id_, value, is_used in zip(wanted, guessed, used, strict=True)
                if is_used and not 0 <= value <= 1
            ),
        )
        values[rows[used], column] = guessed[used]
    return values


def cells_of(path: str, table: Mapping[str, list[str]], names: Sequence[str]) -> np.ndarray:
    """The cells `[N, L]` of a table's columns of findings."""
    return np.stack([numbers(path, name, table[name], CELLS) for name in names], 1)
