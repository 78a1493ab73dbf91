"""CheXpert: chest radiographs of Stanford, 14 observations, some of them uncertain."""

import os
from collections.abc import Sequence

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import Cohort, Files
from vitjax.medical.readers.splits import held_out
from vitjax.medical.readers.tables import (
    Table,
    check_files,
    numbers,
    read_table,
    refuse,
    refuse_repeated,
    words,
)
from vitjax.medical.readers.uncertainty import FINDINGS, apply_policy, cells_of, check_policy

COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)
SEXES = {"Male": "Male", "Female": "Female", "Unknown": "", "": ""}
VIEWS = {"Frontal": "Frontal", "Lateral": "Lateral", "": ""}
PROJECTIONS = {"AP": "AP", "PA": "PA", "LL": "LL", "RL": "RL", "": ""}
FOLDERS = ("train", "valid", "test", "val")
LICENCE = "Stanford research use agreement: registration, non-commercial, no redistribution"


def chexpert(
    root: str,
    uncertain: str = "mixed",
    blanks: str = "zeros",
    val_fraction: float = 0.05,
    seed: int = 0,
    views: str = "all",
    scores: str | None = None,
    test_labels: str | None = None,
    official_valid: str | None = None,
    smooth_range: tuple[float, float] = (0.55, 0.85),
) -> Cohort:
    """CheXpert, of either size, as it is unpacked.

    Layout: `ROOT/train.csv`, `ROOT/valid.csv` and the images
    `ROOT/{train,valid}/patientNNNNN/studyK/viewM_{frontal,lateral}.jpg`; the released test set is
    `ROOT/test/...` with a table of its own. The table's paths begin with the name of the archive,
    which is left out.

    Labels: 14 observations, each 1, 0, -1 (uncertain) or blank (not mentioned).
    Splits: there is no official validation set to choose models by: val is a part of the patients
    of train.csv. The 200 patients of valid.csv, of radiologists' majority, are "test" by default,
    as in many papers, or "val".
    Groups: patients. A study is scored, by the maximum of its images.
    Metric: mean AUROC of Atelectasis, Cardiomegaly, Consolidation, Edema and Pleural Effusion.
    Licence: Stanford research use agreement; registration, non-commercial, no redistribution.
    Source: Irvin et al. 2019, arXiv 1901.07031.

    Args:
      root: the folder that holds train.csv.
      uncertain: what -1 becomes: "zeros", "ones", "ignore" (unknown), "multiclass" (a class of
        its own: 14 label sets of three classes), "smooth" (a number drawn for each cell),
        "selftrain" (what `scores` says) or "mixed" (1 for Edema and Atelectasis, else 0).
      blanks: "zeros", as all published results do, or "unknown".
      val_fraction: of the patients of train.csv, 0 for none.
      views: "all" or "frontal".
      scores: of "selftrain": a predictions.csv with columns id and the 14 names.
      test_labels: groundtruth.csv of the released test set, labels by study; its images are found
        in `ROOT/test`. valid.csv is then "val" unless told otherwise, and nothing is carved.
      official_valid: "test" or "val": what valid.csv is used as.
      smooth_range: what "smooth" draws from: (0.55, 0.85) is U-Ones+LSR; numbers near 0 are
        U-Zeros+LSR.
    """
    check_policy(uncertain, blanks, scores)
    if views not in ("all", "frontal"):
        raise InputError(f"views is {views!r}; {suggest(views, ('all', 'frontal'))}")
    valid_is = official_valid or ("test" if test_labels is None else "val")
    if valid_is not in ("test", "val"):
        raise InputError(f"official_valid is {valid_is!r}; {suggest(valid_is, ('test', 'val'))}")
    if valid_is == "test" and test_labels is not None:
        raise InputError("official_valid='test', but test_labels names another test set")
    tables = {name: os.path.join(root, f"{name}.csv") for name in ("train", "valid")}
    parts = [_part(path, read_table(path, COLUMNS), views) for path in tables.values()]
    if test_labels is not None:
        parts.append(_part(test_labels, _test_rows(root, test_labels), views))
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sizes = [len(part["id"]) for part in parts]
    ids = merged.pop("id").tolist()
    refuse_repeated(root, "Path", ids)
    groups, units = _patients_and_studies(root, ids)
    splits = np.repeat(["train", valid_is, "test"][: len(sizes)], sizes)
    if valid_is == "test":
        chosen = held_out(groups[: sizes[0]], val_fraction, seed)
        splits[: sizes[0]][chosen] = "val"
    paths = [os.path.join(root, *name.split("/")) for name in ids]
    check_files(root, paths)
    cells = merged.pop("cells")
    label_sets, labels = apply_policy(
        cells, FINDINGS, ids, uncertain, blanks, seed, smooth_range, scores
    )
    return Cohort(
        name="chexpert",
        images=Files(paths),
        ids=ids,
        label_sets=label_sets,
        labels=labels,
        splits=splits,
        groups=groups,
        group_kind="patient",
        units=units,
        unit_kind="study",
        aggregate="max",
        columns=merged,
        policy="chest_xray",
        official="vitjax.medical.official:chexpert",
        notes=_notes(uncertain, blanks, views, valid_is, merged["age"]),
        licence=LICENCE,
        files=(*tables.values(), *filter(None, (test_labels, scores))),
    )


def _part(path: str, table: Table, views: str) -> dict[str, np.ndarray]:
    """What a table says of its images, by the names of the cohort's columns."""
    part = {
        "id": np.array([_without_archive(name) for name in table["Path"]]),
        "sex": words(path, "Sex", table["Sex"], SEXES),
        "age": numbers(path, "Age", table["Age"]),
        "view": words(path, "Frontal/Lateral", table["Frontal/Lateral"], VIEWS),
        "ap_pa": words(path, "AP/PA", table["AP/PA"], PROJECTIONS),
        "cells": cells_of(path, table, FINDINGS),
    }
    keep = np.flatnonzero((part["view"] != "Lateral") | (views == "all"))
    return {name: values[keep] for name, values in part.items()}


def _without_archive(path: str) -> str:
    """From the first folder that is a split's: `CheXpert-v1.0-small/train/...` to `train/...`."""
    first, _, rest = path.partition("/")
    return path if first in FOLDERS else rest


def _test_rows(root: str, path: str) -> Table:
    """The images of each study in the table of the released test set."""
    labels = read_table(path)
    key = "Study" if "Study" in labels else "Path"
    known = [name for name in FINDINGS if name in labels]
    if key not in labels or not known:
        raise InputError(
            f"{path} has no column 'Study', or none of the observations; found: {', '.join(labels)}"
        )
    studies: dict[str, int] = {}
    problems = []
    for row, name in enumerate(labels[key]):
        study = _without_archive(name).removesuffix("/")
        study = study if key == "Study" else study.rpartition("/")[0]
        if key == "Study" and study in studies:
            problems.append(f"study {name!r} stands there twice")
        studies.setdefault(study, row)
    rows: Table = {name: [] for name in COLUMNS}
    for study, row in studies.items():
        folder = os.path.join(root, *study.split("/"))
        found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        images = [name for name in found if name.lower().endswith((".jpg", ".jpeg", ".png"))]
        problems += [] if images else [f"no image of the study in {folder}"]
        for name in images:
            is_lateral = "lateral" in name.lower()
            cells = {"Path": f"{study}/{name}"}
            cells["Frontal/Lateral"] = "Lateral" if is_lateral else "Frontal"
            cells |= {finding: labels[finding][row] for finding in known}
            for column, values in rows.items():
                values.append(cells.get(column, ""))
    refuse(path, problems)
    return rows


def _patients_and_studies(root: str, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = [name.split("/") for name in ids]
    refuse(
        root,
        (
            f"path {name!r} is not SPLIT/PATIENT/STUDY/IMAGE"
            for name, part in zip(ids, parts, strict=True)
            if len(part) != 4
        ),
    )
    return np.array([p[1] for p in parts]), np.array([f"{p[1]}/{p[2]}" for p in parts])


def _notes(
    uncertain: str, blanks: str, views: str, valid_is: str, ages: np.ndarray
) -> tuple[str, ...]:
    notes = [
        f"Uncertain labels: {uncertain}. Blank labels: {blanks}.",
        "Labels of train were mined from reports; those of valid and test are radiologists'.",
        f"Protocol: {views} views, a study's score is the maximum of its images'.",
    ]
    if valid_is == "test":
        notes.append(
            "The official valid set (200 patients) is the test set, as in many papers; val is a "
            "part of the patients of train."
        )
    else:
        notes.append("The official valid set chooses the model.")
    zeros = int((ages == 0).sum())
    if zeros:
        notes.append(f"Age 0 stands in {zeros} rows and is kept: it may mean unknown.")
    return tuple(notes)
