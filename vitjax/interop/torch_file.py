"""Torch's pickles, of which only tensors are read."""

import argparse
import contextlib
import pickletools
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from vitjax.interop.weight_file import DTYPES, AnyArray, Malformed, StoredArray


def read_torch(path: Path, size: int, key: str | None) -> dict[str, StoredArray]:
    try:
        import torch
    except ImportError as error:
        raise Malformed(
            "a torch file, and torch is not installed: `pip install torch`, or convert the file "
            "to safetensors where you have it"
        ) from error
    with path.open("rb") as file:
        mmap = file.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on old formats
            # Many training scripts store their options; a Namespace holds values, runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        named = re.search(r"nsupported (?:GLOBAL|global: GLOBAL|class) ([\w.]+)", str(error))
        code = named[1] if named else _first_global(path)
        if code is None:
            raise Malformed(f"a damaged pickle: {str(error).splitlines()[-1][:200]}") from error
        raise Malformed(
            f"it asks to run code ({code}) and is refused; where you trust it, load it with torch "
            "and save its state dict, tensors only"
        ) from error
    found = dict(_state_dicts(tree, "", 2)) if isinstance(tree, dict) else {}
    listed = ", ".join(f"{name!r} ({len(tensors)} tensors)" for name, tensors in found.items())
    if not found or (key is not None and key not in found):
        raise Malformed(f"no state dict {key or ''!r}; it holds {listed or 'none'}")
    if key is None and len(found) > 1:
        raise Malformed(f"several state dicts: {listed}; choose with --key=NAME")
    arrays = {}
    for name, tensor in found[next(iter(found)) if key is None else key].items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise Malformed(f"tensor {name!r}: dtype {dtype}; allowed: {', '.join(DTYPES)}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise Malformed(f"tensor {name!r} is {tensor.layout} on {tensor.device}; not dense")
        if tensor.nbytes > size:  # a view that repeats its elements
            raise Malformed(f"tensor {name!r} claims {tensor.nbytes} bytes in a file of {size}")
        arrays[name] = StoredArray(tuple(tensor.shape), DTYPES[dtype], partial(_fill_torch, tensor))
    return arrays


def _first_global(path: Path) -> str | None:
    """What a bare pickle of a protocol that torch does not read would call first."""
    strings = ["", ""]
    with path.open("rb") as file, contextlib.suppress(ValueError):
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if operation.name == "STACK_GLOBAL":
                return ".".join(strings)
            if isinstance(argument, str):
                strings = [strings[1], argument]
    return None


def _state_dicts(tree: dict, path: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    tensors = {k: v for k, v in tree.items() if hasattr(v, "untyped_storage")}
    if tensors and all(isinstance(k, str) for k in tensors):
        yield path, tensors
    for key, value in tree.items() if depth else ():
        if isinstance(key, str) and isinstance(value, dict):
            yield from _state_dicts(value, f"{path}/{key}" if path else key, depth - 1)


def _fill_torch(tensor: Any, out: AnyArray) -> None:
    import torch

    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy(force=True).view(DTYPES["bfloat16"])
    else:
        array = tensor.numpy(force=True)
    np.copyto(out, array)
