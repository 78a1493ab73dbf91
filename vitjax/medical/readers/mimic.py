"""MIMIC-CXR-JPG: chest radiographs of Boston, with CheXpert's 14 observations of each study."""

import os

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import Cohort, Files
from vitjax.medical.readers.tables import (
    Table,
    check_files,
    read_table,
    refuse,
    refuse_repeated,
    words,
)
from vitjax.medical.readers.uncertainty import FINDINGS, apply_policy, cells_of, check_policy

SPLIT_WORDS = {"train": "train", "validate": "val", "test": "test"}
LABELLERS = ("chexpert", "negbio")
FRONTAL = ("AP", "PA")


def mimic(
    root: str,
    labeller: str = "chexpert",
    uncertain: str = "mixed",
    blanks: str = "zeros",
    seed: int = 0,
    views: str = "all",
    scores: str | None = None,
    version: str = "2.0.0",
    smooth_range: tuple[float, float] = (0.55, 0.85),
) -> Cohort:
    """MIMIC-CXR-JPG, as it is unpacked.

    Layout: `ROOT/mimic-cxr-2.0.0-{metadata,split,chexpert,negbio}.csv[.gz]` and the images
    `ROOT/files/p10/p10000032/s50414267/DICOM_ID.jpg`.

    Labels: of a study, 14 observations of 1, 0, -1 (uncertain) or blank; a study without labels
    has them all unknown.
    Splits: the official ones, of images, disjoint in subjects; "validate" is val.
    Groups: subjects. A study is scored, by the maximum of its images. Metric: mean AUROC.
    Licence: PhysioNet credentialed access with its data use agreement; not to be sent to others.
    Source: Johnson et al. 2019, arXiv 1901.07042.

    Args:
      labeller: "chexpert" or "negbio": which table of labels.
      uncertain, blanks, scores, smooth_range: as in `vitjax.medical.readers.chexpert:chexpert`.
      views: "all", or "frontal" (AP and PA).
      version: in the names of the tables.
    """
    check_policy(uncertain, blanks, scores)
    if labeller not in LABELLERS:
        raise InputError(f"labeller is {labeller!r}; {suggest(labeller, LABELLERS)}")
    if views not in ("all", "frontal"):
        raise InputError(f"views is {views!r}; {suggest(views, ('all', 'frontal'))}")
    places = {name: _table(root, version, name) for name in ("split", labeller, "metadata")}
    keys = ("dicom_id", "subject_id", "study_id")
    rows = read_table(places["split"], (*keys, "split"))
    metadata = read_table(places["metadata"], ("dicom_id", "ViewPosition"))
    studies = read_table(places[labeller], ("subject_id", "study_id", *FINDINGS))
    refuse_repeated(places["split"], "dicom_id", rows["dicom_id"])
    view_of = dict(zip(metadata["dicom_id"], metadata["ViewPosition"], strict=True))
    rows["view"] = [view_of.get(name, "") for name in rows["dicom_id"]]
    if views == "frontal":
        keep = [i for i, view in enumerate(rows["view"]) if view in FRONTAL]
        if not keep:
            raise InputError(f"{places['metadata']}: no image has the ViewPosition AP or PA")
        rows = {name: [column[i] for i in keep] for name, column in rows.items()}
    cells, missing = _of_images(places[labeller], studies, rows)
    ids = rows["dicom_id"]
    paths = [
        os.path.join(root, "files", f"p{subject[:2]}", f"p{subject}", f"s{study}", f"{name}.jpg")
        for name, subject, study in zip(*(rows[key] for key in keys), strict=True)
    ]
    check_files(root, paths)
    label_sets, labels = apply_policy(
        cells, FINDINGS, ids, uncertain, blanks, seed, smooth_range, scores
    )
    labels = {name: _unknown(values, missing) for name, values in labels.items()}
    notes = [
        f"Labels by {labeller}, mined from reports, of a study; uncertain: {uncertain}; "
        f"blank: {blanks}.",
        f"Protocol: {views} views, a study's score is the maximum of its images'.",
    ]
    if missing.any():
        notes.append(f"{int(missing.sum())} images are of studies without labels: unknown.")
    return Cohort(
        name="mimic_cxr",
        images=Files(paths),
        ids=ids,
        label_sets=label_sets,
        labels=labels,
        splits=words(places["split"], "split", rows["split"], SPLIT_WORDS),
        groups=np.array(rows["subject_id"]),
        group_kind="patient",
        units=np.array(rows["study_id"]),
        unit_kind="study",
        aggregate="max",
        columns={"view": np.array(rows["view"])},
        policy="chest_xray",
        notes=tuple(notes),
        licence="PhysioNet credentialed health data licence and data use agreement",
        files=(*places.values(), *filter(None, (scores,))),
    )


def _table(root: str, version: str, name: str) -> str:
    """The path of a table, packed or not."""
    path = os.path.join(root, f"mimic-cxr-{version}-{name}.csv")
    return path if os.path.isfile(path) else f"{path}.gz"


def _of_images(path: str, studies: Table, rows: Table) -> tuple[np.ndarray, np.ndarray]:
    """The cells of each image's study, and which images have none."""
    keys = list(zip(studies["subject_id"], studies["study_id"], strict=True))
    places = {key: number for number, key in enumerate(keys)}
    if len(places) < len(keys):
        seen: set[tuple[str, str]] = set()
        refuse(
            path,
            (f"row {n}: study {k} stands there twice" for n, k in enumerate(keys, 1) if k in seen
             or seen.add(k)),
        )  # fmt: skip
    wanted = zip(rows["subject_id"], rows["study_id"], strict=True)
    found = np.array([places.get(key, -1) for key in wanted])
    if (found < 0).all():
        raise InputError(f"{path} has no study of the split's table")
    return cells_of(path, studies, FINDINGS)[found], found < 0


def _unknown(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[missing] = np.nan
    return values
