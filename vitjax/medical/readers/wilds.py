"""Camelyon17 of WILDS: patches of five centres; the centres of val and test are not in train."""

import os

import numpy as np

from vitjax.errors import InputError
from vitjax.medical.cohort import Cohort, Files, LabelSet
from vitjax.medical.readers.tables import check_files, numbers, read_table, words

VAL_CENTER, TEST_CENTER = 1, 2
NEEDED = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")


def camelyon17(root: str, in_domain_val: bool = False) -> Cohort:
    """Camelyon17-WILDS, as it is unpacked.

    Layout: `ROOT/metadata.csv` and the patches
    `ROOT/patches/patient_020_node_4/patch_patient_020_node_4_x_3328_y_21792.png`; the patient is
    a text with zeros in front.

    Labels: 1 where the centre of a patch holds tumour.
    Splits: centre 1 is val and centre 2 is test, whatever the table's column split says; of the
    other centres split 0 is train, and split 1, val within them, is used only if asked for.
    Groups: slides, which the bootstrap draws. Centres are in the column centre.
    Metric: accuracy on the centre that was not seen.
    Licence: CC0. Source: Koh et al. 2021 (WILDS, arXiv 2012.07421).

    Args:
      in_domain_val: choose the model on split 1, of the centres of train, not on centre 1, which
        is then not used.
    """
    path = os.path.join(root, "metadata.csv")
    table = read_table(path, NEEDED)
    centre = numbers(path, "center", table["center"], range(5))
    split = numbers(path, "split", table["split"], range(4))
    tumour = numbers(path, "tumor", table["tumor"], (0.0, 1.0))
    for name, column in (("center", centre), ("split", split), ("tumor", tumour)):
        if np.isnan(column).any():
            row = int(np.flatnonzero(np.isnan(column))[0]) + 1
            raise InputError(f"{path}, row {row}: {name} is blank")
    names = [
        f"patient_{patient.zfill(3)}_node_{node}/patch_patient_{patient.zfill(3)}_node_{node}"
        f"_x_{x}_y_{y}.png"
        for patient, node, x, y in zip(
            *(table[name] for name in ("patient", "node", "x_coord", "y_coord")), strict=True
        )
    ]
    splits = np.full(len(names), "train", "U5")
    splits[split == 1] = "val" if in_domain_val else ""
    splits[centre == VAL_CENTER] = "" if in_domain_val else "val"
    splits[centre == TEST_CENTER] = "test"
    paths = [os.path.join(root, "patches", *name.split("/")) for name in names]
    check_files(root, paths)
    val = "val is of the centres of train" if in_domain_val else f"val is centre {VAL_CENTER}"
    return Cohort(
        name="camelyon17_wilds",
        images=Files(paths),
        ids=[name.rpartition("/")[2].removesuffix(".png") for name in names],
        label_sets=(LabelSet("tumour", "single", ("no tumour", "tumour")),),
        labels={"tumour": tumour},
        splits=splits,
        groups=words(path, "slide", table["slide"], {s: f"slide_{s}" for s in table["slide"]}),
        group_kind="slide",
        columns={
            "centre": np.array([f"centre_{int(c)}" for c in centre]),
            "patient": np.array([f"patient_{p.zfill(3)}" for p in table["patient"]]),
        },
        policy="histology",
        channels=3,
        notes=(
            f"Test is centre {TEST_CENTER}, which is not in train; {val}.",
            "Patients are artificial mixes of real ones: only the centre is independent.",
            "Results vary much between seeds: WILDS asks for ten.",
        ),
        licence="CC0",
        files=(path,),
    )
