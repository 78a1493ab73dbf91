"""NIH ChestX-ray14: 112,120 frontal chest radiographs, 14 findings mined from reports."""

import os

import numpy as np

from vitjax.errors import InputError
from vitjax.medical.cohort import Cohort, Files, LabelSet
from vitjax.medical.readers.splits import held_out
from vitjax.medical.readers.tables import (
    check_files,
    numbers,
    read_table,
    refuse,
    refuse_repeated,
    words,
)

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip
NONE = "No Finding"
NEEDED = (
    "Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender",
    "View Position",
)  # fmt: skip
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def nih(
    root: str, table: str = "Data_Entry_2017_v2020.csv", val_fraction: float = 0.1, seed: int = 0
) -> Cohort:
    """ChestX-ray14, as it is unpacked.

    Layout: `ROOT/Data_Entry_2017_v2020.csv`, `ROOT/train_val_list.txt`, `ROOT/test_list.txt`, and
    the images in `ROOT/images/` or `ROOT/images_001/images/` to `images_012`. Two names in the
    header hold commas within brackets, so that a table has eleven columns.

    Labels: 14 findings, joined by "|"; "No Finding" is none of them.
    Splits: the official lists, whose patients are disjoint; val is a part of the patients of
    train_val_list.txt.
    Groups: patients. Metric: mean AUROC of the 14 findings.
    Licence: no restrictions; attribution, link and acknowledgement of the NIH Clinical Center.
    Source: Wang et al. 2017, arXiv 1705.02315.

    Args:
      table: its name in root.
      val_fraction: of the patients of train_val_list.txt, 0 for none.
    """
    path = os.path.join(root, table)
    cells = read_table(path, NEEDED)
    ids = cells["Image Index"]
    refuse_repeated(path, "Image Index", ids)
    groups = np.array(cells["Patient ID"])
    splits = _splits(root, ids)
    outside = splits == ""
    in_train = np.flatnonzero(splits == "train")
    splits[in_train[held_out(groups[in_train], val_fraction, seed)]] = "val"
    paths = _paths(root, ids)
    notes = ["Labels were mined from reports, about 90% of them right by the publisher's account."]
    if outside.any():
        notes.append(f"{int(outside.sum())} images stand in neither official list: not used.")
    return Cohort(
        name="nih_chestxray14",
        images=Files(paths),
        ids=ids,
        label_sets=(LabelSet("findings", "multi", FINDINGS),),
        labels={"findings": _labels(path, cells["Finding Labels"])},
        splits=splits,
        groups=groups,
        group_kind="patient",
        columns={
            "sex": words(
                path, "Patient Gender", cells["Patient Gender"],
                {"M": "Male", "F": "Female", "": ""},
            ),
            "age": _ages(path, cells["Patient Age"]),
            "view": words(
                path, "View Position", cells["View Position"], {"PA": "PA", "AP": "AP", "": ""}
            ),
        },
        policy="chest_xray",
        notes=tuple(notes),
        licence="no restrictions; attribution and link to the NIH Clinical Center",
        files=(path, *(os.path.join(root, name) for name in LISTS.values())),
    )  # fmt: skip


def _labels(path: str, texts: list[str]) -> np.ndarray:
    """`[N, 14]` of "Mass|Nodule"; each different text is looked at once."""
    places = {name: number for number, name in enumerate(FINDINGS)}
    vectors: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    for text in set(texts):
        vector = np.zeros(len(FINDINGS), np.float32)
        parts = text.split("|")
        for part in parts:
            if part in places:
                vector[places[part]] = 1
            elif part != NONE or len(parts) > 1:
                problems[text] = f"{part!r} in {text!r}"
        vectors[text] = vector
    refuse(
        path,
        (
            f"row {row}: {problems[text]} is no finding; allowed, joined by '|': "
            f"{', '.join(FINDINGS)}; or {NONE} alone"
            for row, text in enumerate(texts, 1)
            if text in problems
        ),
    )
    return np.stack([vectors[text] for text in texts])


def _ages(path: str, texts: list[str]) -> np.ndarray:
    """Years; the first version of the table writes 058Y, 011M and 003D."""
    units = {"Y": 1.0, "M": 12.0, "D": 365.25}
    parsed = {}
    for text in set(texts):
        unit = units.get(text[-1:], 0)
        parsed[text] = str(float(text[:-1]) / unit) if unit and text[:-1].isdigit() else text
    return numbers(path, "Patient Age", [parsed[text] for text in texts])


def _splits(root: str, ids: list[str]) -> np.ndarray:
    lists = {}
    for split, name in LISTS.items():
        try:
            with open(os.path.join(root, name), encoding="utf-8") as file:
                lists[split] = set(file.read().split())
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    known = set(ids)
    refuse(
        root,
        [f"{name!r} stands in both lists" for name in sorted(lists["train"] & lists["test"])]
        + [
            f"{name!r} of {LISTS[split]} has no row in the table"
            for split, names in lists.items()
            for name in sorted(names - known)
        ],
    )
    of_each = dict.fromkeys(lists["train"], "train") | dict.fromkeys(lists["test"], "test")
    return np.array([of_each.get(name, "") for name in ids], "U5")


def _paths(root: str, ids: list[str]) -> list[str]:
    """Where each image lies: all in `images`, or over twelve folders, which are listed once."""
    flat = os.path.join(root, "images")
    if os.path.isdir(flat):
        paths = [os.path.join(flat, name) for name in ids]
        check_files(root, paths)
        return paths
    places: dict[str, str] = {}
    for folder in sorted(os.listdir(root)):
        inner = os.path.join(root, folder, "images")
        if folder.startswith("images_") and os.path.isdir(inner):
            places |= {name: os.path.join(inner, name) for name in os.listdir(inner)}
    if not places:
        raise InputError(f"{root} has neither images/ nor images_001/images/ and the like")
    refuse(root, (f"no such image: {name}" for name in ids if name not in places))
    return [places[name] for name in ids]
