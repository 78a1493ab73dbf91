"""CAMELYON16 and CAMELYON17 as tables of slides, from the layouts in which they are published."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.slides.table import SlideTable, class_numbers, find_slides, read_rows

NODE_CLASSES = ("negative", "itc", "micro", "macro")
STAGES = ("pN0", "pN0(i+)", "pN1mi", "pN1", "pN2")
CENTRES = range(5)
PATIENTS_PER_CENTRE = 20  # of the hundred whose labels were published first, in order
LABEL_FILES = ("stages.csv", "stage_labels.csv")
DUPLICATE = "test_049"


def carve(slide_ids: Sequence[str], labels: Sequence[str], fraction: float) -> set[str]:
    """Slides of a validation split: the same fraction of every class, whatever the order.

    They are those whose ids have the lowest hashes, so that they stay the same as slides are added.
    """
    if not 0 < fraction < 1:
        raise InputError(f"val_fraction must be between 0 and 1, got {fraction}")
    chosen: set[str] = set()
    for label in sorted(set(labels)):
        names = [name for name, found in zip(slide_ids, labels, strict=True) if found == label]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen.update(names[: round(fraction * len(names))])
    return chosen


def _annotations(root: Path, slide_ids: Sequence[str]) -> np.ndarray:
    """The annotation file of each slide, "" where there is none."""
    found = {
        os.path.splitext(name)[0]: os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(".xml")
    }
    return np.array([found.get(name, "") for name in slide_ids])


def camelyon16(root: str | Path, *, val_fraction: float = 0.2) -> SlideTable:
    """CAMELYON16: is there a metastasis in the slide of a lymph node?

    Reads `training/normal/normal_001.tif`, `training/tumor/tumor_001.tif`,
    `testing/images/test_001.tif` and `testing/reference.csv` (no header: id, Tumor or Normal, ...),
    and finds unpacked XML annotations at any depth (column "annotation"). The official test set is
    "test"; validation slides are carved from the training set. The data name no patients: a slide
    is a group.

    Raises:
      InputError: folders or the reference are missing, or name a label that there is not.

    Source: Ehteshami Bejnordi et al. 2017 (JAMA 318, 2199).
    """
    root = Path(root)
    rows: list[tuple[str, str, str, str]] = []  # id, path, label, split
    for label in ("normal", "tumor"):
        folder = root / "training" / label
        if not folder.is_dir():
            raise InputError(f"{root} has no training/{label}: is it CAMELYON16's folder?")
        rows += [(name, path, label, "train") for name, path in find_slides(folder).items()]
    notes = ["CAMELYON16 names no patients: a slide is taken for one."]
    reference, images = root / "testing" / "reference.csv", root / "testing" / "images"
    if images.is_dir():
        if not reference.is_file():
            raise InputError(f"{reference} is missing, which has the labels of the test slides")
        labels = _reference(reference)
        for name, path in find_slides(images).items():
            if name == DUPLICATE:
                notes.append(f"{DUPLICATE} is left out: it is a duplicate of another test slide.")
            elif name not in labels:
                raise InputError(f"{reference} has no row for {name}")
            else:
                rows.append((name, path, labels[name], "test"))
        notes.append("The lesions of test_114 are not annotated exhaustively.")
    else:
        notes.append("There are no test slides here.")
    trained = [row for row in rows if row[3] == "train"]
    if not trained:
        raise InputError(f"no slide in {root / 'training'}")
    val = carve([row[0] for row in trained], [row[2] for row in trained], val_fraction)
    ids = tuple(row[0] for row in rows)
    classes, numbers = class_numbers([row[2] for row in rows], ("normal", "tumor"), str(root))
    return SlideTable(
        name="CAMELYON16",
        slide_ids=ids,
        paths=tuple(row[1] for row in rows),
        classes=classes,
        labels=numbers,
        splits=np.array(["val" if row[0] in val else row[3] for row in rows]),
        groups=np.array(ids),
        group_kind="slide",
        columns={"annotation": _annotations(root, ids)},
        notes=tuple(notes),
    )


def _reference(path: Path) -> dict[str, str]:
    """The label of each test slide."""
    labels: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        cells = [cell.strip() for cell in line.split(",")]
        if not any(cells):
            continue
        label = cells[1].lower() if len(cells) > 1 else ""
        if label not in ("tumor", "normal"):
            raise InputError(f"{path}, line {number}: label {label!r}; allowed: Tumor, Normal")
        labels[os.path.splitext(cells[0])[0].lower()] = label
    return labels


def camelyon17(
    root: str | Path, *, val_centre: int = 1, test_centre: int = 2, is_binary: bool = False
) -> SlideTable:
    """CAMELYON17: which metastases are in the slide of a lymph node?

    Reads `patient_000_node_0.tif` at any depth, and `stages.csv` (or `stage_labels.csv`): columns
    patient and stage, rows of slides (negative, itc, micro, macro) among those of patients
    (`patient_000.zip`, pN0 and so on; column "stage"). Splits are by centre, the shift that
    matters: patients are put together from the nodes of different people. The centre is that of a
    folder `center_0`, else the patient's number by 20 (the first hundred); of others it is unknown,
    and their split is "". Centres 1 and 2 are validation and test as in WILDS.

    Args:
      is_binary: negative or not, instead of four classes.

    Raises:
      InputError: no slides or labels, or no such centre.

    Source: Bandi et al. 2019 (IEEE TMI 38, 550); Koh et al. 2021 (WILDS, arXiv 2012.07421).
    """
    root = Path(root)
    for name, centre in (("val_centre", val_centre), ("test_centre", test_centre)):
        if centre not in CENTRES:
            raise InputError(f"{name} must be 0 to 4, got {centre}")
    if val_centre == test_centre:
        raise InputError(f"val_centre and test_centre are both {val_centre}")
    found = {
        name: path
        for name, path in find_slides(root).items()
        if re.fullmatch(r"patient_\d{3}_node_\d", name)
    }
    if not found:
        raise InputError(f"{root} has no patient_000_node_0.tif at any depth")
    table = next((p for name in LABEL_FILES for p in sorted(root.rglob(name))), None)
    if table is None:
        raise InputError(f"{root} has no {' or '.join(LABEL_FILES)} at any depth")
    named = {
        os.path.splitext(r["patient"])[0]: r["stage"]
        for r in read_rows(table, ("patient", "stage"))
    }
    ids = sorted(found)
    stages = [named.get(name[: len("patient_000")], "") for name in ids]
    for stage in stages:
        if stage and stage not in STAGES:
            raise InputError(f"{table}: unknown stage {stage!r}; {suggest(stage, STAGES)}")
    four = [named.get(name, "") for name in ids]
    classes, labels = class_numbers(four, NODE_CLASSES, str(table))
    if is_binary:
        classes, labels = ("negative", "metastasis"), np.minimum(labels, 1)
    centres = [_centre(name, found[name]) for name in ids]
    homes = {str(val_centre): "val", str(test_centre): "test", "": ""}
    return SlideTable(
        name="CAMELYON17",
        slide_ids=tuple(ids),
        paths=tuple(found[name] for name in ids),
        classes=classes,
        labels=labels,
        splits=np.array([homes.get(c, "train") for c in centres]),
        groups=np.array([name[: len("patient_000")] for name in ids]),
        group_kind="patient",
        columns={
            "annotation": _annotations(root, ids),
            "centre": np.array(centres),
            "node_class": np.array(four),
            "stage": np.array(stages),
        },
        notes=(
            "A patient of CAMELYON17 is put together from nodes of several people: intervals over "
            "patients are too narrow; the test set is a centre that was not trained on.",
        ),
    )


def _centre(name: str, path: str) -> str:
    if stated := re.search(r"cent(?:er|re)_(\d)", os.path.dirname(path)):
        return stated[1]
    patient = int(name.split("_")[1])
    centre = patient // PATIENTS_PER_CENTRE
    return str(centre) if centre in CENTRES else ""
