"""ISIC 2019: 25,331 dermatoscopic images of eight diagnoses; in the test set a ninth, unknown."""

import os

import numpy as np

from vitjax.medical.cohort import Cohort, Files, LabelSet
from vitjax.medical.readers.splits import carve
from vitjax.medical.readers.tables import (
    Table,
    check_files,
    numbers,
    read_table,
    refuse,
    refuse_repeated,
    words,
)

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ZERO_WEIGHT = "ISIC_0035068"  # the official scorer gives it no weight
NAME = "ISIC_2019_Training"
SEXES = {"male": "male", "female": "female", "": ""}


def isic2019(
    root: str,
    test_labels: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Cohort:
    """ISIC 2019, as it is unpacked.

    Layout: `ROOT/ISIC_2019_Training_GroundTruth.csv`, `ROOT/ISIC_2019_Training_Metadata.csv`,
    `ROOT/ISIC_2019_Training_Input/ISIC_0000000.jpg`; some ids end in `_downsampled`. With a table
    of test labels also `ROOT/ISIC_2019_Test_Input` and `ROOT/ISIC_2019_Test_Metadata.csv`.

    Labels: one of nine; UNK, "none of the others", has no image in train.
    Splits: none are official without test labels: val and test are lesions of the training set.
    Groups: lesions; an image whose lesion is not told is a group of its own.
    Metric: balanced multiclass accuracy, as the challenge's scorer computes it.
    Licence: CC BY-NC 4.0.
    Source: Combalia et al. 2019, arXiv 1908.02288; isic-challenge-scoring.

    Args:
      test_labels: a ground truth of the test set, in the layout of that of train.
      val_fraction, test_fraction: of the training images; the latter counts without test_labels.
    """
    parts = [_part(root, NAME, os.path.join(root, f"{NAME}_GroundTruth.csv"))]
    if test_labels is not None:
        parts.append(_part(root, "ISIC_2019_Test", test_labels))
    table = {
        name: [cell for part in parts for cell in part.get(name, [""] * len(part["image"]))]
        for name in ("image", "path", *CLASSES, "age_approx", "anatom_site_general", "lesion_id",
                     "sex")
    }  # fmt: skip
    refuse_repeated(root, "image", table["image"])
    labels = _labels(root, table)
    groups = np.array(
        [f"lesion:{lesion}" if lesion else f"image:{name.removesuffix('_downsampled')}"
         for lesion, name in zip(table["lesion_id"], table["image"], strict=True)]
    )  # fmt: skip
    splits = np.full(len(labels), "test", "U5")
    count = len(parts[0]["image"])
    shares = {"val": val_fraction, "test": test_fraction if test_labels is None else 0.0}
    shares = {"train": 1 - sum(shares.values()), **shares}
    splits[:count] = carve(groups[:count], labels[:count], shares, seed)
    check_files(root, table["path"])
    return Cohort(
        name="isic2019",
        images=Files(table["path"]),
        ids=table["image"],
        label_sets=(LabelSet("diagnosis", "single", CLASSES),),
        labels={"diagnosis": labels},
        splits=splits,
        groups=groups,
        group_kind="lesion",
        columns={
            "age": numbers(root, "age_approx", table["age_approx"]),
            "sex": words(root, "sex", table["sex"], SEXES),
            "site": np.array(table["anatom_site_general"]),
        },
        policy="dermatology",
        official="vitjax.medical.official:isic2019",
        channels=3,
        notes=_notes(table, test_labels is not None, count),
        licence="CC BY-NC 4.0",
        files=tuple(path for part in parts for path in part["files"]),
    )


def _part(root: str, name: str, truth: str) -> Table:
    """A ground truth with what the metadata say of its images."""
    table = read_table(truth, ("image", *CLASSES))
    path = os.path.join(root, f"{name}_Metadata.csv")
    wanted = ("image", "age_approx", "anatom_site_general", "sex")
    is_train = name == NAME
    metadata = read_table(path, (*wanted, "lesion_id") if is_train else wanted)
    refuse_repeated(path, "image", metadata["image"])
    places = {image: row for row, image in enumerate(metadata["image"])}
    missing = [image for image in table["image"] if image not in places]
    refuse(path, (f"no row for the image {image!r} of {truth}" for image in missing))
    rows = [places[image] for image in table["image"]]
    for column in (*wanted[1:], "lesion_id"):
        if column in metadata:
            table[column] = [metadata[column][row] for row in rows]
    folder = os.path.join(root, f"{name}_Input")
    table["path"] = [os.path.join(folder, f"{image}.jpg") for image in table["image"]]
    table["files"] = [truth, path]
    return table


def _labels(path: str, table: Table) -> np.ndarray:
    """The number of the one class that is 1."""
    hot = np.stack([numbers(path, name, table[name], (0.0, 1.0)) for name in CLASSES], 1)
    refuse(
        path,
        (
            f"image {table['image'][row]!r} has {np.nansum(hot[row]):g} classes, not one"
            for row in np.flatnonzero(np.nansum(hot, 1) != 1)
        ),
    )
    return np.nan_to_num(hot).argmax(1).astype(np.float32)


def _notes(table: Table, has_test: bool, count: int) -> tuple[str, ...]:
    blank = sum(not lesion for lesion in table["lesion_id"][:count])
    notes = [
        f"{blank} of {count} training images have no lesion_id: each is a group of its own.",
        "HAM10000, BCN_20000 and MSK are within ISIC 2019: never train on one and test on another.",
    ]
    if has_test:
        notes.append(
            "The test set holds UNK, which train has not: who never predicts it scores 8/9 at most."
        )
        if ZERO_WEIGHT in table["image"]:
            notes.append(f"The official scorer gives the image {ZERO_WEIGHT} no weight.")
    else:
        notes.append("Test is a part of the training set's lesions, not the challenge's test set.")
    return tuple(notes)
