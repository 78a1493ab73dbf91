"""Sources of image files: a folder with a subfolder for each class, or a zip of one."""

import array
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vitjax.data.images import EXTENSIONS
from vitjax.data.preparing import card
from vitjax.data.sources import choose_classes
from vitjax.data.sources.names import Names
from vitjax.data.sources.prepared import PREPARING, Prepared
from vitjax.data.sources.shards import OpenFiles
from vitjax.errors import InputError, UnreadableImage, suggest

LOCAL_HEADER = 30  # bytes before the name of a zip's entry
EXTRA = 64  # bytes after its name that are read along with it; more cost a second read
ENCRYPTED = 1


def read_file(path: str) -> bytes:
    """The bytes of one example.

    Raises:
      UnreadableImage: the file is gone or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(f"cannot read the file: {error.strerror}") from error


def is_image(name: str) -> bool:
    """By its name; hidden files, such as those that macOS adds, are none."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_in(folder: str, prefix: str) -> Iterator[str]:
    """Relative names of the images in a folder, then in its subfolders, both sorted."""
    files, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.is_symlink():
                    subfolders.append(entry.name)
            elif is_image(entry.name):
                files.append(entry.name)
    for name in sorted(files):
        yield f"{prefix}{name}"
    for name in sorted(subfolders):
        yield from _images_in(os.path.join(folder, name), f"{prefix}{name}{os.sep}")


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
        with os.scandir(base) as entries:
            folders = sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())
        self._base, self._names, self._empty = str(base), Names(), []
        counts: dict[str, int] = {}
        for folder in folders:
            before = len(self._names)
            try:
                self._names.extend(
                    _images_in(os.path.join(self._base, folder), f"{folder}{os.sep}")
                )
            except OSError as error:
                raise InputError(f"cannot list {error.filename}: {error.strerror}") from error
            if len(self._names) > before:
                counts[folder] = len(self._names) - before
            else:
                self._empty.append(folder)
        classes = choose_classes(set(counts), str(base))
        self.class_names: tuple[str, ...] | None = classes
        self.num_classes = len(classes)
        per_class = [counts[name] for name in classes]
        self._labels = np.repeat(np.arange(self.num_classes, dtype=np.int32), per_class)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self._base, self._names[index])
        return {"image": read_file(path), "label": int(self._labels[index]), "id": path}

    def all_labels(self) -> np.ndarray:
        return self._labels.astype(np.int64)

    def problems(self) -> list[str]:
        return [
            f"the class folder {os.path.join(self._base, name)} holds no images"
            for name in self._empty
        ]


class ZipFolder:
    """A zip of an image folder, read in place: `[split/]class/.../image.jpg`.

    Where each entry lies is read once; an image is then one read at its place, and its checksum is
    compared.

    Args:
      path: the zip file.
      split: a folder in it, or None.

    Source: the layout of .ZIP files (PKWARE's APPNOTE, 4.3 and 4.4).
    """

    def __init__(self, path: str, split: str | None = None):
        if not Path(path).is_file():
            raise InputError(f"no such file: {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise InputError(f"cannot read {path} as a zip file: {error}") from error
        start = len(PurePosixPath(split).parts) if split else 0
        folders: set[str] = set()
        kept: list[tuple[str, zipfile.ZipInfo]] = []
        for entry in entries:
            parts = PurePosixPath(entry.filename).parts
            is_inside = not split or PurePosixPath(*parts[:start]) == PurePosixPath(split)
            is_deep = len(parts) > start + (not entry.is_dir())
            if not (is_inside and is_deep) or parts[0] == "__MACOSX" or parts[start][0] == ".":
                continue
            folders.add(parts[start])
            if not entry.is_dir() and is_image(parts[-1]):
                kept.append((parts[start], entry))
        if split and not kept:
            tops = sorted({e.filename.split("/")[0] for e in entries if "/" in e.filename})
            raise InputError(f"no images under {split!r} in {path}; {suggest(split, tops)}")
        classes = choose_classes({name for name, _ in kept}, path)
        self.class_names: tuple[str, ...] | None = classes
        self.num_classes = len(classes)
        label_of = {name: i for i, name in enumerate(classes)}
        self._labels = np.array([label_of[name] for name, _ in kept], np.int32)
        self._names = Names(entry.filename for _, entry in kept)
        # The start, the length here and unpacked, the checksum, the method and the flags.
        columns = (array.array("q") for _ in range(6))
        self._starts, self._packed, self._sizes, self._sums, self._methods, flags = columns
        for _, entry in kept:
            self._starts.append(entry.header_offset)
            self._packed.append(entry.compress_size)
            self._sizes.append(entry.file_size)
            self._sums.append(entry.CRC)
            self._methods.append(entry.compress_type)
            flags.append(entry.flag_bits)
        self._path, self._file = path, OpenFiles([path])
        self._problems = [
            f"the class folder {name}/ of {path} holds no images"
            for name in sorted(folders - set(classes))
        ]
        for i, method in enumerate(self._methods):
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or flags[i] & ENCRYPTED:
                how = "encrypted" if flags[i] & ENCRYPTED else f"packed by method {method}"
                self._problems.append(
                    f"{path}/{self._names[i]} is {how}; allowed: stored, or deflated (method 8)"
                )
        twice = [name for name, count in Counter(self._names).items() if count > 1]
        self._problems += [f"{path} holds {name} more than once" for name in twice]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        return {
            "image": self._read(index, len(os.fsencode(name))),
            "label": int(self._labels[index]),
            "id": f"{self._path}/{name}",
        }

    def _read(self, index: int, name_length: int) -> bytes:
        start, size, method = self._starts[index], self._packed[index], self._methods[index]
        before = LOCAL_HEADER + name_length
        data = self._file.read(0, start, before + EXTRA + size, least=before + size)
        if data[:4] != b"PK\x03\x04":
            raise UnreadableImage(f"{self._path} has no entry at {start}")
        first = LOCAL_HEADER + sum(np.frombuffer(data[26:30], "<u2").tolist())
        if first + size > len(data):
            data, first = self._file.read(0, start + first, size), 0
        image = data[first : first + size]
        if method == zipfile.ZIP_DEFLATED:
            try:
                image = zlib.decompress(image, -zlib.MAX_WBITS, bufsize=self._sizes[index] or 1)
            except zlib.error as error:
                raise UnreadableImage(f"cannot unpack it: {error}") from error
        elif method != zipfile.ZIP_STORED:
            raise UnreadableImage(f"it is packed by method {method}; allowed: stored, deflated")
        if len(image) != self._sizes[index] or zlib.crc32(image) != self._sums[index]:
            raise UnreadableImage("its checksum is wrong")
        return image

    def all_labels(self) -> np.ndarray:
        return self._labels.astype(np.int64)

    def problems(self) -> list[str]:
        return list(self._problems)


def open_folder(path: str, split: str | None = None) -> ImageFolder | ZipFolder | Prepared:
    """An image folder, a zip of one, or what `vitjax data prepare` wrote, by what the path is."""
    if not path:
        raise InputError("the path of the images is not set: give --config.data.root=FOLDER_OR_ZIP")
    if Path(path, card.NAME).is_file() or Path(path, PREPARING).is_dir():
        return Prepared(path, split or "train")
    return ImageFolder(path, split) if Path(path).is_dir() else ZipFolder(path, split)
