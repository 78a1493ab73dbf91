"""Sources of image files: a folder with a subfolder for each class, or a zip of one."""

import os
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from vitjax.data.images import EXTENSIONS
from vitjax.data.sources import choose_classes
from vitjax.errors import InputError, suggest


class ImageFolder:
    """`root/[split/]class/.../image.jpg`; classes are the sorted folder names.

    Args:
      root: the folder.
      split: a subfolder of it, or None.
    """

    def __init__(self, root: str, split: str | None = None):
        base = Path(root, split) if split else Path(root)
        if not base.is_dir():
            there = (
                [p.name for p in Path(root).iterdir() if p.is_dir()] if Path(root).is_dir() else []
            )
            hint = f"; {suggest(split, sorted(there))}" if split and there else ""
            raise InputError(f"no such folder: {base}{hint}")
        found: list[tuple[str, str]] = []
        for folder in sorted(p for p in base.iterdir() if p.is_dir() and p.name[0] != "."):
            for directory, subfolders, files in os.walk(folder):
                subfolders.sort()
                for name in sorted(files):
                    if name.lower().endswith(EXTENSIONS):
                        found.append((folder.name, os.path.join(directory, name)))
        self.class_names = choose_classes({name for name, _ in found}, str(base))
        self.num_classes = len(self.class_names)
        index = {name: i for i, name in enumerate(self.class_names)}
        self._files = [(path, index[name]) for name, path in found]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self._files[index]
        return {"image": Path(path).read_bytes(), "label": label, "id": path}


class ZipFolder:
    """A zip of an image folder, read in place: `[split/]class/.../image.jpg`.

    Args:
      path: the zip file.
      split: a folder in it, or None.
    """

    def __init__(self, path: str, split: str | None = None):
        if not Path(path).is_file():
            raise InputError(f"no such file: {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(archive.namelist())
        except zipfile.BadZipFile as error:
            raise InputError(f"cannot read {path} as a zip file: {error}") from error
        start = len(PurePosixPath(split).parts) if split else 0
        found = []
        for name in names:
            parts = PurePosixPath(name).parts
            is_inside = not split or PurePosixPath(*parts[:start]) == PurePosixPath(split)
            if is_inside and len(parts) > start + 1 and name.lower().endswith(EXTENSIONS):
                found.append((parts[start], name))
        if split and not found:
            tops = sorted({PurePosixPath(n).parts[0] for n in names if "/" in n})
            raise InputError(f"no images under {split!r} in {path}; {suggest(split, tops)}")
        self.class_names = choose_classes({name for name, _ in found}, path)
        self.num_classes = len(self.class_names)
        index = {name: i for i, name in enumerate(self.class_names)}
        self._files = [(name, index[folder]) for folder, name in found]
        self._path = path
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, label = self._files[index]
        if not hasattr(self._local, "archive"):  # one handle a thread: a handle has one position
            self._local.archive = zipfile.ZipFile(self._path)
        return {
            "image": self._local.archive.read(name),
            "label": label,
            "id": f"{self._path}/{name}",
        }


def open_folder(path: str, split: str | None = None) -> ImageFolder | ZipFolder:
    """An image folder, or a zip of one, by what the path is."""
    if not path:
        raise InputError("the path of the images is not set: give --config.data.root=FOLDER_OR_ZIP")
    return ImageFolder(path, split) if Path(path).is_dir() else ZipFolder(path, split)
