"""MedMNIST v2 and MedMNIST+: small images of many kinds, 2-D and 3-D, all sizes.

Source: Yang et al. 2023 (Scientific Data 10:41); tasks and names of classes are those of the
package medmnist.
"""

import dataclasses
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from vitjax.errors import InputError, suggest
from vitjax.medical.cohort import SPLITS, Cohort, LabelSet
from vitjax.medical.readers.arrays import Stacked, VolumeSlices, slice_places

BINARY, SINGLE = "binary-class", "multi-class"
MULTI, ORDINAL = "multi-label, binary-class", "ordinal-regression"
KINDS = {BINARY: "single", SINGLE: "single", MULTI: "multi", ORDINAL: "ordinal"}
ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver",
    "lung-left", "lung-right", "pancreas", "spleen",
)  # fmt: skip
ORGANS_3D = (
    "liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart",
    "lung-right", "lung-left", "spleen", "pancreas",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the file does not say of itself."""

    task: str
    classes: tuple[str, ...]
    channels: int = 1
    policy: str | None = None
    note: str = ""
    is_3d: bool = False


FLAGS = {
    "pathmnist": Kind(
        SINGLE,
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
         "normal colon mucosa", "cancer-associated stroma",
         "colorectal adenocarcinoma epithelium"), 3, "histology",
        "The test images come from another centre than those of train and val.",
    ),
    "chestmnist": Kind(
        MULTI,
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia",
         "pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
        1, "chest_xray",
        "Most labels are absent: to call everything absent scores an accuracy of about 0.947.",
    ),
    "dermamnist": Kind(
        SINGLE,
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
         "benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi",
         "vascular lesions"), 3, "dermatology",
        "The official split parts images of one lesion (HAM10000): scores are too high; "
        "DermaMNIST-C and -E are corrected.",
    ),
    "octmnist": Kind(
        SINGLE, ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    ),
    "pneumoniamnist": Kind(BINARY, ("normal", "pneumonia"), 1, "chest_xray"),
    "retinamnist": Kind(ORDINAL, ("0", "1", "2", "3", "4"), 3),
    "breastmnist": Kind(
        BINARY, ("malignant", "normal, benign"), 1, None,
        "Class 0 is malignant: the positive class, 1, is the healthy one, so sensitivity is of "
        "normal and benign.",
    ),
    "bloodmnist": Kind(
        SINGLE,
        ("basophil", "eosinophil", "erythroblast",
         "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte",
         "monocyte", "neutrophil", "platelet"), 3,
    ),
    "tissuemnist": Kind(
        SINGLE,
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule",
         "Glomerular endothelial cells", "Interstitial endothelial cells", "Leukocytes",
         "Podocytes", "Proximal Tubule Segments", "Thick Ascending Limb"),
    ),
    "organamnist": Kind(SINGLE, ORGANS, 1, "ct"),
    "organcmnist": Kind(SINGLE, ORGANS, 1, "ct"),
    "organsmnist": Kind(SINGLE, ORGANS, 1, "ct"),
    "organmnist3d": Kind(SINGLE, ORGANS_3D, 1, "ct", is_3d=True),
    "nodulemnist3d": Kind(BINARY, ("benign", "malignant"), 1, "ct", is_3d=True),
    "adrenalmnist3d": Kind(BINARY, ("normal", "hyperplasia"), is_3d=True),
    "fracturemnist3d": Kind(
        SINGLE,
        ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"), 1, "ct",
        is_3d=True,
    ),
    "vesselmnist3d": Kind(BINARY, ("vessel", "aneurysm"), is_3d=True),
    "synapsemnist3d": Kind(BINARY, ("inhibitory synapse", "excitatory synapse"), is_3d=True),
}  # fmt: skip


def medmnist(path: str, flag: str | None = None, slices: str | int = "all") -> Cohort:
    """Any set of MedMNIST, of any size, from its npz file; nothing is downloaded.

    Layout: `FLAG[_SIZE].npz` with `{train,val,test}_images`, uint8 `[N, Y, X]`, `[N, Y, X, 3]` or
    `[N, Z, Y, X]`, and `{train,val,test}_labels`, `[N, 1]`, or `[N, 14]` of ChestMNIST. All of it
    is read into memory.

    Labels: one class; ChestMNIST 14 findings; RetinaMNIST five grades that have an order.
    Splits: the official ones. Groups: each image, for patients are not told; of 3-D sets a
    volume, whose slices are rows and whose score is their mean.
    Metric: the official AUC and ACC.
    Licence: CC BY 4.0; DermaMNIST CC BY-NC 4.0.
    Source: zenodo.org/records/10519652.

    Args:
      path: the file.
      flag: which set it is, such as "pneumoniamnist"; by default as its name says.
      slices: of a volume: "all", "middle", or how many, evenly spaced.
    """
    flag = flag or re.sub(r"_(28|64|128|224)$", "", Path(path).stem.lower())
    if flag not in FLAGS:
        raise InputError(f"{path}: no set of MedMNIST is called {flag!r}; {suggest(flag, FLAGS)}")
    kind = FLAGS[flag]
    images, labels = _read(path, flag, kind)
    sizes = [len(array) for array in labels]
    splits, names = np.repeat(SPLITS, sizes), np.concatenate([np.arange(n) for n in sizes])
    ids = [f"{split}_{number}" for split, number in zip(splits.tolist(), names, strict=True)]
    label_set = LabelSet("class", KINDS[kind.task], kind.classes)
    if kind.task == MULTI:
        label_set = dataclasses.replace(label_set, name="findings")
    numbers = np.concatenate(labels).astype(np.float32)
    numbers = numbers if kind.task == MULTI else numbers[:, 0]
    stacked, units = Stacked(images), None
    rows = np.arange(len(ids))
    if kind.is_3d:
        places = slice_places(images[0].shape[1], slices)
        stacked = VolumeSlices(stacked, places)
        rows = rows.repeat(len(places))
        units = np.array(ids)[rows]
        ids = [f"{ids[r]}_{p}" for r, p in zip(rows, np.tile(places, len(ids)), strict=True)]
    unknown = "Patients are not told: images of one patient may be in two splits."
    return Cohort(
        name=flag,
        images=stacked,
        ids=ids,
        label_sets=(label_set,),
        labels={label_set.name: numbers[rows]},
        splits=splits[rows],
        groups=np.array(ids) if units is None else units,
        group_kind="volume" if kind.is_3d else "image",
        units=units,
        unit_kind="volume" if kind.is_3d else "image",
        policy=kind.policy,
        official="vitjax.medical.official:medmnist",
        task=kind.task,
        channels=kind.channels,
        notes=tuple(note for note in (unknown, kind.note) if note),
        licence="CC BY-NC 4.0" if flag == "dermamnist" else "CC BY 4.0",
        files=(path,),
    )


def _read(path: str, flag: str, kind: Kind) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images and labels of train, val and test, checked against what the set is."""
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    images, labels = [], []
    try:
        with np.load(path, allow_pickle=False) as file:
            for split in SPLITS:
                for what, arrays in (("images", images), ("labels", labels)):
                    key = f"{split}_{what}"
                    if key not in file.files:
                        raise InputError(f"{path} has no array {key!r}; {suggest(key, file.files)}")
                    arrays.append(file[key])
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path} as npz: {error}") from error
    dims = 4 if kind.is_3d or kind.channels == 3 else 3
    columns = len(kind.classes) if kind.task == MULTI else 1
    largest = 1 if kind.task == MULTI else len(kind.classes) - 1
    for split, pixels, numbers in zip(SPLITS, images, labels, strict=True):
        is_image = pixels.dtype == np.uint8 and pixels.ndim == dims
        is_image = is_image and (kind.channels == 1 or pixels.shape[-1] == 3)
        if not is_image:
            raise InputError(
                f"{path}: {split}_images are {pixels.dtype} {pixels.shape}; {flag} has uint8 of "
                f"{dims} dimensions and {kind.channels} channels"
            )
        if numbers.shape != (len(pixels), columns):
            raise InputError(
                f"{path}: {split}_labels are {numbers.shape}, not {(len(pixels), columns)}"
            )
        if len(numbers) and (numbers.min() < 0 or numbers.max() > largest):
            raise InputError(
                f"{path}: {split}_labels hold {numbers.min()} to {numbers.max()}; "
                f"{flag} has 0 to {largest}"
            )
    return images, labels
