"""BCCD: 364 fields of blood cells; which of three kinds of cells are there?"""

import io
import os
import threading
import zipfile
from xml.etree import ElementTree

import numpy as np

from vitjax.errors import InputError, UnreadableImage
from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.readers.tables import refuse

CELLS = ("RBC", "WBC", "Platelets")
SPLITS = ("train", "val", "test")


class Members:
    """Files of a folder or of a zip archive by their names within."""

    def __init__(self, path: str):
        self.path, self._zip, self._lock = path, None, threading.Lock()
        if os.path.isfile(path):
            try:
                with open(path, "rb") as file:  # in memory: no place in a file to share
                    self._zip = zipfile.ZipFile(io.BytesIO(file.read()))
            except zipfile.BadZipFile as error:
                raise InputError(f"cannot read {path} as a zip archive: {error}") from error
        elif not os.path.isdir(path):
            raise InputError(f"no such file or folder: {path}")
        self.names = set(self._zip.namelist()) if self._zip else None

    def read(self, name: str) -> bytes:
        """Raises OSError or KeyError where there is no such member."""
        if self._zip is None:
            with open(os.path.join(self.path, *name.split("/")), "rb") as file:
                return file.read()
        with self._lock:
            return self._zip.read(name)


class Fields:
    """Images of `Members`."""

    def __init__(self, members: Members, names: list[str]):
        self.members, self.names = members, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self.members.read(self.names[index])
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UnreadableImage(f"cannot read {self.names[index]}: {error}") from error


def bccd(path: str) -> Cohort:
    """BCCD as presence of cells, from its folder or a zip archive of it.

    Layout: of Pascal VOC: `ImageSets/Main/{train,val,test}.txt`, `JPEGImages/NAME.jpg`,
    `Annotations/NAME.xml`.

    Labels: whether a red cell (RBC), a white cell (WBC), a platelet is marked.
    Splits: those of the lists. Groups: each image, for patients are not told.
    Metric: AUROC of each kind; nearly every field has red and white cells, so it says little.
    Licence: MIT. Source: github.com/Shenggan/BCCD_Dataset.
    """
    members = Members(path)
    names, splits = [], []
    for split in SPLITS:
        try:
            listed = members.read(f"ImageSets/Main/{split}.txt").decode().split()
        except (OSError, KeyError) as error:
            raise InputError(f"{path} has no ImageSets/Main/{split}.txt") from error
        names += listed
        splits += [split] * len(listed)
    problems, rows = [], []
    if len(set(names)) < len(names):
        problems.append("an image stands in two of the lists")
    for name in names:
        try:
            root = ElementTree.fromstring(members.read(f"Annotations/{name}.xml"))
        except (OSError, KeyError):
            problems.append(f"no Annotations/{name}.xml")
            continue
        except ElementTree.ParseError as error:
            problems.append(f"Annotations/{name}.xml: {error}")
            continue
        found = {text.strip() for box in root.iter("object") if (text := box.findtext("name"))}
        for other in sorted(found - set(CELLS)):
            problems.append(f"Annotations/{name}.xml: {other!r}; allowed: {', '.join(CELLS)}")
        rows.append([float(cell in found) for cell in CELLS])
    refuse(path, problems)
    labels = np.array(rows, np.float32)
    counts = ", ".join(f"{cell} {int(n)}" for cell, n in zip(CELLS, labels.sum(0), strict=True))
    return Cohort(
        name="bccd",
        images=Fields(members, [f"JPEGImages/{name}.jpg" for name in names]),
        ids=names,
        label_sets=(LabelSet("cells", "multi", CELLS),),
        labels={"cells": labels},
        splits=np.array(splits),
        groups=np.array(names),
        channels=3,
        notes=(
            "Patients are not told: images of one patient may be in two splits.",
            f"Of {len(names)} fields have the cell: {counts}.",
        ),
        licence="MIT",
        files=(path,) if os.path.isfile(path) else (),
    )
