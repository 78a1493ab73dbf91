"""CAMELYON16: slide AUC and lesion FROC. CAMELYON17: stages of patients and their kappa."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.metrics.counts import cohen_kappa
from vitjax.medical.metrics.inputs import as_numbers, listed, same_shape
from vitjax.medical.metrics.intervals import Interval, percentile_interval
from vitjax.medical.metrics.ranking import auroc

FALSE_POSITIVE_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # a slide
NODE_CLASSES = ("negative", "itc", "micro", "macro")
STAGES = ("pN0", "pN0(i+)", "pN1mi", "pN1", "pN2")
NODES_PER_PATIENT = 5
_NODE = re.compile(r"(patient_\d+)_node_\d+")


def slide_auc(labels: Any, probabilities: Any) -> float:
    """The AUROC over slides: 1 is a slide with tumour."""
    return auroc(labels, probabilities)


@dataclasses.dataclass(frozen=True)
class SlideDetections:
    """What was found on one slide, and the lesions that are there.

    Attributes:
      probabilities, x, y: of the detections, `[D]`; x and y in pixels of level 0.
      lesions: None for a slide without; a mask `[Y, X]` of lesion numbers, 0 outside all; or a
        function of x and y, `[D]` each, that returns such numbers, `[D]`.
      lesion_ids: the numbers of all lesions; needed with a function, read off a mask.
      itc: the numbers of isolated tumour cells: neither to be found nor wrong to find.
      downsample: pixels of level 0 in one of the mask, as 32 for level 5.
    """

    probabilities: Any
    x: Any
    y: Any
    lesions: Any = None
    lesion_ids: Sequence[int] | None = None
    itc: Sequence[int] = ()
    downsample: float = 1.0


@dataclasses.dataclass(frozen=True)
class Froc:
    """A free-response curve.

    Attributes:
      score: the mean of `sensitivities`; NaN without a lesion.
      sensitivities: at FALSE_POSITIVE_RATES.
      false_positives: a slide, rising, `[T]`; sensitivity: the share of lesions found, `[T]`;
        thresholds, falling, `[T]`, from infinity on.
      num_slides, num_lesions: without isolated tumour cells.
    """

    score: float
    sensitivities: tuple[float, ...]
    false_positives: np.ndarray
    sensitivity: np.ndarray
    thresholds: np.ndarray
    num_slides: int
    num_lesions: int


def _lesions_hit(slide: SlideDetections, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, set]:
    """The lesion under each detection, 0 for none, and the numbers of all lesions."""
    if slide.lesions is None:
        return np.zeros(len(x), np.int64), set()
    if callable(slide.lesions):
        if slide.lesion_ids is None:
            raise InputError("a function for lesions needs lesion_ids, the numbers of all of them")
        ids = {int(number) for number in slide.lesion_ids}
        hit = np.asarray(slide.lesions(x, y), np.int64)
        same_shape(x=x, lesions_of_points=hit)
        unknown = set(hit.tolist()) - ids - {0}
        if unknown:
            raise InputError(f"points lie in lesions {listed(unknown)}, not in lesion_ids")
        return hit, ids
    mask = np.asarray(slide.lesions)
    columns = np.floor(x / slide.downsample).astype(np.int64)
    rows = np.floor(y / slide.downsample).astype(np.int64)
    outside = (columns < 0) | (rows < 0) | (columns >= mask.shape[1]) | (rows >= mask.shape[0])
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise InputError(
            f"a detection at x={x[first]:g}, y={y[first]:g} lies outside the mask of shape "
            f"{mask.shape} at downsample {slide.downsample:g}"
        )
    return mask[rows, columns].astype(np.int64), set(np.unique(mask).tolist()) - {0}


def _num_at_least(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(values) - np.searchsorted(np.sort(values), thresholds)


def froc(slides: Iterable[SlideDetections]) -> Froc:
    """How many lesions are found at how many false positives a slide.

    A detection outside every lesion is a false positive, each by itself; one inside an isolated
    tumour cell's region is nothing. A lesion's probability is the largest of the detections in it,
    and it counts as found at all thresholds up to that. The score is the mean sensitivity at 1/4,
    1/2, 1, 2, 4 and 8 false positives a slide, linear in between, and constant beyond the last.

    Source: the evaluation of CAMELYON16, Ehteshami Bejnordi et al. 2017. That code leaves out the
    lowest probability as a threshold, which is the zero of a missed lesion where there is one, and
    then the same; here every probability is a threshold.

    Raises:
      InputError: detections of a slide differ in length, or lie outside its mask.
    """
    return _curve(_counted(slides))


def froc_interval(
    slides: Iterable[SlideDetections], *, num: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The FROC score with a percentile interval, slides with and without lesions drawn apart.

    Raises:
      InputError: as `froc`.
    """
    counted = _counted(slides)
    strata = [
        [i for i, (_, best) in enumerate(counted) if bool(len(best)) is has_lesion]
        for has_lesion in (True, False)
    ]
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(num):
        drawn = [rows[i] for rows in strata for i in rng.integers(0, len(rows), len(rows))]
        scores.append(_curve([counted[i] for i in drawn]).score)
    return percentile_interval(_curve(counted).score, np.array(scores), level)


def _counted(slides: Iterable[SlideDetections]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each slide: the probabilities of its false positives, and the best of each lesion."""
    counted = []
    for number, slide in enumerate(slides):
        p, x, y = (as_numbers(getattr(slide, name), name) for name in ("probabilities", "x", "y"))
        same_shape(probabilities=p, x=x, y=y)
        if not np.isfinite(np.stack([p, x, y])).all():
            raise InputError(f"slide {number}: a detection is not finite")
        hit, ids = _lesions_hit(slide, x, y)
        best = [p[hit == lesion].max(initial=-np.inf) for lesion in sorted(ids - set(slide.itc))]
        counted.append((p[hit == 0], np.array(best, float)))
    if not counted:
        raise InputError("there is no slide to score")
    return counted


def _curve(counted: Sequence[tuple[np.ndarray, np.ndarray]]) -> Froc:
    false = np.concatenate([wrong for wrong, _ in counted])
    found = np.concatenate([best for _, best in counted])
    levels = np.unique(np.concatenate([false, found[np.isfinite(found)]]))[::-1]
    thresholds = np.append(np.inf, levels)
    per_slide = _num_at_least(false, thresholds) / len(counted)
    sensitivity = _num_at_least(found, thresholds) / (len(found) or np.nan)
    at = np.interp(FALSE_POSITIVE_RATES, per_slide, sensitivity)
    return Froc(
        score=float(at.mean()),
        sensitivities=tuple(at.tolist()),
        false_positives=per_slide,
        sensitivity=sensitivity,
        thresholds=thresholds,
        num_slides=len(counted),
        num_lesions=len(found),
    )


def patient_stage(node_classes: Sequence[str]) -> str:
    """The stage of a patient of CAMELYON17, from the classes of the five nodes.

    pN0: all negative. pN0(i+): isolated tumour cells (itc) at most. pN1mi: a micro-metastasis, no
    macro-metastasis. With a macro-metastasis pN1 if 1 to 3 nodes have a micro- or
    macro-metastasis, pN2 if 4 or 5 have; isolated tumour cells are no metastasis.

    Raises:
      InputError: not exactly five, or an unknown class.
    """
    if len(node_classes) != NODES_PER_PATIENT:
        raise InputError(f"a patient has {NODES_PER_PATIENT} nodes, got {len(node_classes)}")
    for name in node_classes:
        if name not in NODE_CLASSES:
            raise InputError(f"unknown node class {name!r}; {suggest(str(name), NODE_CLASSES)}")
    count = {name: list(node_classes).count(name) for name in NODE_CLASSES}
    if count["macro"]:
        return "pN2" if count["macro"] + count["micro"] > 3 else "pN1"
    if count["micro"]:
        return "pN1mi"
    return "pN0(i+)" if count["itc"] else "pN0"


def stage_patients(nodes: Mapping[str, str]) -> dict[str, str]:
    """The stage of each patient, from `{"patient_000_node_0": "negative", ...}`."""
    classes: dict[str, list[str]] = {}
    for name in sorted(nodes):
        found = _NODE.fullmatch(name)
        if not found:
            raise InputError(f"{name!r} is no node; allowed: patient_NNN_node_N")
        classes.setdefault(found[1], []).append(nodes[name])
    stages = {}
    for patient, of_nodes in classes.items():
        try:
            stages[patient] = patient_stage(of_nodes)
        except InputError as error:
            raise InputError(f"{patient}: {error}") from error
    return stages


def stage_kappa(true: Any, predicted: Any) -> float:
    """The quadratic-weighted kappa of stages, the metric of CAMELYON17.

    Args:
      true, predicted: stages in one order of patients, or both as {patient: stage}.
    """
    if isinstance(true, Mapping) != isinstance(predicted, Mapping):
        raise InputError("true and predicted must both be {patient: stage}, or both in one order")
    if isinstance(true, Mapping):
        different = sorted(set(true) ^ set(predicted))
        if different:
            raise InputError(f"patients are in only one of true, predicted: {listed(different)}")
        patients = sorted(true)
        true, predicted = ([stages[name] for name in patients] for stages in (true, predicted))
    numbers = []
    for stages in (true, predicted):
        for stage in stages:
            if stage not in STAGES:
                raise InputError(f"unknown stage {stage!r}; {suggest(str(stage), STAGES)}")
        numbers.append([STAGES.index(stage) for stage in stages])
    return cohen_kappa(numbers[0], numbers[1], len(STAGES), "quadratic")


def read_stages(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Stages of patients and classes of nodes, from a file with columns patient and stage.

    Its rows are mixed: `patient_000.zip,pN0` and `patient_000_node_0.tif,negative`.

    Returns:
      {"patient_000": "pN0"} and {"patient_000_node_0": "negative"}.

    Raises:
      InputError: another header, a name that is neither or is there twice, an unknown stage.
    """
    patients: dict[str, str] = {}
    nodes: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or [cell.strip() for cell in rows[0]] != ["patient", "stage"]:
        raise InputError(f"{path}: the header must be patient,stage")
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != 2:
            raise InputError(f"{path}: row {number} has {len(row)} cells, not 2")
        name, stage = (cell.strip() for cell in row)
        stem = re.sub(r"\.(zip|tif)$", "", name)
        is_node = bool(_NODE.fullmatch(stem))
        if not is_node and not re.fullmatch(r"patient_\d+", stem):
            raise InputError(f"{path}: row {number}: {name!r} is neither a patient nor a node")
        into, allowed = (nodes, NODE_CLASSES) if is_node else (patients, STAGES)
        if stem in into:
            raise InputError(f"{path}: row {number}: {stem} is there twice")
        if stage not in allowed:
            raise InputError(f"{path}: row {number}: {stage!r}; {suggest(stage, allowed)}")
        into[stem] = stage
    return patients, nodes
