"""MNIST's idx format, plain or gzipped: Fashion-MNIST and its kin as they are distributed."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from vitjax.data.sources.arrays import Arrays
from vitjax.errors import InputError

UNSIGNED_BYTE = 8  # the only type that images and labels come in


def read_idx(path: str | Path, num_dims: int) -> np.ndarray:
    """The uint8 array of an idx file.

    Layout: two zero bytes, the type (8), the number of dimensions, each dimension as a big-endian
    uint32, then the values, last dimension fastest.

    Args:
      path: the file; gzip is recognised by its first bytes, whatever the name.
      num_dims: what the file must have: 3 for images [N, Y, X], 1 for labels [N].

    Raises:
      InputError: no such file, another magic number, or another length than the header says.

    Source: the format as described on the MNIST page (LeCun, Cortes, Burges).
    """
    if not path or not Path(path).is_file():
        raise InputError(f"no such idx file: {str(path) or '(the path is empty)'}")
    content = Path(path).read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot unpack {path}: {error}") from error
    wanted = bytes([0, 0, UNSIGNED_BYTE, num_dims])
    if content[:4] != wanted:
        raise InputError(
            f"{path} does not begin as an idx file of {num_dims} dimensions of bytes: "
            f"its magic number is 0x{content[:4].hex()}, it must be 0x{wanted.hex()}"
        )
    start = 4 + 4 * num_dims
    if len(content) < start:
        raise InputError(f"{path} ends within its header of {start} bytes")
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{path}: the header says {' x '.join(map(str, shape))} values, "
            f"the file holds {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class Idx(Arrays):
    """Images and labels of two idx files.

    Args:
      images: path of the images, such as train-images-idx3-ubyte.gz.
      labels: path of the labels.
      root: the folder that both lie in, if they are not given whole.
      class_names: one a class, in the labels' order; None for numbers.
    """

    def __init__(
        self, images: str, labels: str, root: str = "", class_names: tuple[str, ...] | None = None
    ):
        pixels = read_idx(Path(root) / images if images else "", 3)
        classes = read_idx(Path(root) / labels if labels else "", 1)
        names = tuple(class_names) if class_names else None
        if names and len(classes) and classes.max() >= len(names):
            raise InputError(f"{labels}: label {classes.max()}, but {len(names)} class_names")
        super().__init__(
            pixels, classes.astype(np.int64), name=Path(images).name, class_names=names
        )
