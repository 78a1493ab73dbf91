"""HAM10000: 10,015 dermatoscopic images of 7,470 lesions, seven diagnoses."""

import os

import numpy as np

from vitjax.errors import InputError
from vitjax.medical.cohort import Cohort, Files, LabelSet
from vitjax.medical.readers.splits import carve
from vitjax.medical.readers.tables import (
    numbers,
    read_table,
    refuse,
    refuse_repeated,
    words,
)

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
NEEDED = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images")
TABLES = ("HAM10000_metadata.csv", "HAM10000_metadata")
SEXES = {"male": "male", "female": "female", "unknown": "", "": ""}


def ham10000(
    root: str, val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0
) -> Cohort:
    """HAM10000, as it is unpacked.

    Layout: `ROOT/HAM10000_metadata[.csv]`, with or without a column dataset, and the images in
    `ROOT/HAM10000_images_part_1/` and `_part_2/`.

    Labels: dx, one of seven. Splits: none are official; val and test are lesions.
    Groups: lesions. Metric: balanced accuracy is that of ISIC 2018, whose training set this is.
    Licence: CC BY-NC 4.0. Source: Tschandl et al. 2018, Scientific Data 5:180161.

    Args:
      val_fraction, test_fraction: of the images.
    """
    paths = [os.path.join(root, name) for name in TABLES]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise InputError(f"no such file: {paths[0]}")
    table = read_table(path, NEEDED)
    ids = table["image_id"]
    refuse_repeated(path, "image_id", ids)
    places = {}
    for folder in FOLDERS:
        inner = os.path.join(root, folder)
        if os.path.isdir(inner):
            places |= {n.rpartition(".")[0]: os.path.join(inner, n) for n in os.listdir(inner)}
    if not places:
        raise InputError(f"{root} has none of the folders {', '.join(FOLDERS)}")
    refuse(
        path, (f"no image {name!r} in {', '.join(FOLDERS)}" for name in ids if name not in places)
    )
    refuse(
        path,
        (f"row {row}: lesion_id is blank" for row, x in enumerate(table["lesion_id"], 1) if not x),
    )
    codes = {name: str(number) for number, name in enumerate(CLASSES)}
    labels = words(path, "dx", table["dx"], codes).astype(np.float32)
    groups = np.array(table["lesion_id"])
    shares = {
        "train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction
    }  # fmt: skip
    columns = {
        "age": numbers(path, "age", table["age"]),
        "sex": words(path, "sex", table["sex"], SEXES),
        "site": np.array(["" if x == "unknown" else x for x in table["localization"]]),
        "confirmed_by": np.array(table["dx_type"]),
    }
    if "dataset" in table:
        columns["centre"] = np.array(table["dataset"])
    return Cohort(
        name="ham10000",
        images=Files([places[name] for name in ids]),
        ids=ids,
        label_sets=(LabelSet("diagnosis", "single", CLASSES),),
        labels={"diagnosis": labels},
        splits=carve(groups, labels, shares, seed),
        groups=groups,
        group_kind="lesion",
        columns=columns,
        policy="dermatology",
        channels=3,
        notes=(
            "HAM10000 is within ISIC 2019, and DermaMNIST is made of it: never train on one and "
            "test on another.",
            "The test set is a part of the lesions, not that of ISIC 2018.",
        ),
        licence="CC BY-NC 4.0",
        files=(path,),
    )
