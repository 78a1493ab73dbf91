"""One step on disk: the one file that talks to Orbax and TensorStore.

    N/params         the parameters
    N/ema            their moving average, where there is one
    N/extra          what the objective keeps untrained, where it keeps anything
    N/rest           step, key, optimizer state, health
    N/contract.json  model, preprocessing, class names, scores, and of every array its shape, type
                     and fingerprint
    N/finished       written last: the contract's checksum. A step without it does not count

Orbax writes the arrays of each part, in chunks. They are read through TensorStore, which is what
Orbax writes with: each shard straight into its place, so that a host needs hardly more memory than
its shards. What there is and whether it is right is said by the contract, which is checked first.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import SingleDeviceSharding

from vitjax.errors import DamagedCheckpointError, InputError
from vitjax.fingerprint import begin
from vitjax.parallel import path_name
from vitjax.state import TrainState, check_same_tree

# What fails in Orbax is raised, too; these would add a page for every array.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
PyTree = Any
Contract = dict[str, Any]
CHUNK = 4 * 2**20  # bytes of an array that are compressed and decoded at a time
CONTRACT, FINISHED, UNMARKED = "contract.json", "finished", "finished.not_yet"


def parts_of(state: TrainState) -> dict[str, PyTree]:
    """The parts of a train state that are stored."""
    rest = {"step": state.step, "key": state.key, "opt_state": state.opt_state}
    parts = {"params": state.params, "rest": rest | {"health": state.health}}
    if state.ema is not None:
        parts["ema"] = state.ema
    if jax.tree.leaves(state.extra):
        parts["extra"] = state.extra
    return parts


class Writing:
    """A step that is being written.

    Args:
      folder: where; made if missing. Every process of the run writes its own shards into it.
      parts: trees of arrays. When this returns they are copied and may be given up.

    Nothing is whole before `finish`.
    """

    def __init__(self, folder: Path, parts: Mapping[str, PyTree]):
        self._folder = folder
        self._handlers = {name: ocp.PyTreeCheckpointHandler() for name in parts}
        self._prints = {name: begin(tree) for name, tree in parts.items()}
        self._shapes = {name: _shapes(tree) for name, tree in parts.items()}
        self._futures: list[Any] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quietly())
        try:
            for name, tree in parts.items():
                place = epath.Path(folder / name)
                place.mkdir(exist_ok=True)
                item = _nested(tree)
                chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), item)
                arguments = ocp.args.PyTreeSave(item, chunked)
                save = self._handlers[name].async_save(place, args=arguments)
                self._futures += _run(save) or []
        except BaseException:
            with contextlib.suppress(Exception):
                self.wait()  # what was begun must end before the folder is removed
            raise

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong first."""
        failure: BaseException | None = None
        for future in self._futures:
            try:
                future.result()
            except Exception as error:
                failure = failure or error
        self._quiet.close()
        if failure is not None:
            raise failure

    def finish(self, contract: Contract) -> None:
        """Completes the folder with its contract. For one process, once all have waited."""
        arrays = {}
        for name, prints in self._prints.items():
            self._handlers[name].finalize(epath.Path(self._folder / name))
            values = prints.values()
            shapes = self._shapes[name]
            arrays[name] = {path: [*shapes[path], value] for path, value in values.items()}
        _write_synced(self._folder / CONTRACT, json.dumps(contract | {"arrays": arrays}, indent=1))
        _write_synced(self._folder / UNMARKED, _checksum(self._folder) + "\n")


def _run(coroutine: Any) -> Any:
    """Runs a coroutine to its end, also where a notebook runs a loop of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _nested(tree: PyTree) -> dict[str, Any]:
    """The tree with dicts for all its containers: on disk only the paths of arrays matter."""
    found: dict[str, Any] = {}
    for path, leaf in named(tree).items():
        *parents, last = path.split("/")
        node = found
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return found


def _shapes(tree: PyTree) -> dict[str, list[Any]]:
    return {path: [list(x.shape), str(x.dtype)] for path, x in named(tree).items()}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _checksum(folder: Path) -> str:
    return hashlib.sha256((folder / CONTRACT).read_bytes()).hexdigest()


def mark_finished(folder: Path) -> None:
    """Makes a step count: its marker, written before, gets its name, and is never there in part."""
    (folder / UNMARKED).replace(folder / FINISHED)


def is_finished(folder: Path) -> bool:
    """Whether a step was written to its end, as far as its marker says."""
    return (folder / FINISHED).is_file()


def read_contract(folder: Path) -> Contract:
    """What a step says of itself, checked against its marker.

    Raises:
      InputError: it may not be read.
      DamagedCheckpointError: it is not what was written.
    """
    try:
        marker = (folder / FINISHED).read_text().strip()
        text = (folder / CONTRACT).read_bytes()
    except PermissionError as error:
        raise not_allowed(error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{folder} is damaged: {error}") from error
    if hashlib.sha256(text).hexdigest() != marker:
        raise DamagedCheckpointError(
            f"{folder} is damaged: {CONTRACT} is not what {FINISHED} says that it was"
        )
    return json.loads(text)


def not_allowed(error: PermissionError) -> InputError:
    """What to say of a file that may not be read."""
    path = Path(error.filename or ".")
    owner = ""
    while path != path.parent:
        try:
            owner = f"; {path} belongs to user {path.stat().st_uid}, this is user {os.geteuid()}"
            break
        except OSError:
            path = path.parent
    return InputError(f"may not read {error.filename}{owner}; nothing was changed")


def shapes_in(contract: Contract, part: str) -> PyTree:
    """The tree of arrays that a part holds, as shapes, with nothing read."""
    leaves = contract["arrays"].get(part, {}).items()
    return _nested({p: jax.ShapeDtypeStruct(tuple(s), d) for p, (s, d, _) in leaves})


def read_part(folder: Path, contract: Contract, part: str, target: PyTree) -> PyTree:
    """Reads one part into the shapes and shardings of a target; see `verify` for what it is worth.

    Of several processes each reads its own shards, and waits for nobody.

    Raises:
      InputError: the target is of another model, or a file may not be read.
      DamagedCheckpointError: files are missing or cannot be decoded.
    """
    where = folder / part
    if part not in contract["arrays"]:
        raise InputError(f"{where}: this step has no {part}, which this config asks for")
    check_same_tree(target, shapes_in(contract, part), str(where))
    try:
        for path in (where, *where.rglob("*")):
            if path.exists() and not os.access(path, os.R_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        found = _read(where, target)
        leaves = [found[path] for path in named(target)]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)
    except PermissionError as error:
        raise not_allowed(error) from error
    except Exception as error:  # whatever a damaged file makes of Orbax and its libraries
        if "ermission denied" in str(error):
            raise InputError(f"may not read {where}: {error}; nothing was changed") from error
        reason = " ".join(str(error).split())[:300]
        raise DamagedCheckpointError(
            f"{where} is damaged: {type(error).__name__}: {reason}"
        ) from error


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that ends its tasks before it closes: of many writes the first that fails is
    raised, and the others would come back to a closed loop and each complain of that."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(_all(tasks))
        super().close()

    def call_exception_handler(self, context: Any) -> None:
        """Says nothing: the first failure is raised, and tells enough."""


async def _all(tasks: set[asyncio.Task]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


class _Loops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    old = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Loops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(old)


def _read(where: Path, wanted: PyTree) -> dict[str, jax.Array]:
    """Arrays by their paths. Each shard is read once, straight into place, one array at a time."""
    where = where.absolute()
    metadata = json.loads((where / "_METADATA").read_text())
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    found = {}
    for path, leaf in named(wanted).items():
        name = path.replace("/", ".") + "/"
        kept = {"driver": "ocdbt", "base": f"file://{where}/", "path": name}
        spec = {"driver": driver, "kvstore": kept, "fill_missing_data_reads": False}
        found[path] = _fill(ts.open(spec, open=True, read=True, context=context).result(), leaf)
    return found


def _fill(source: ts.TensorStore, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    blocks: dict[str, tuple[Any, list[jax.Device]]] = {}
    assert leaf.sharding is not None
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        blocks.setdefault(str(index), (index, []))[1].append(device)
    shards = []
    for index, devices in blocks.values():
        block = _pages(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        ts.array(block).write(source[index]).result()
        shards += [jax.device_put(block, device, may_alias=False) for device in devices]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _pages(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in pages of its own, which go back to the system with it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, int(np.prod(shape))).reshape(shape)


def verify(tree: PyTree, contract: Contract, part: str, where: Path) -> None:
    """Compares what was read with the fingerprints of what was written, one array at a time.

    Every process must call it at the same point.

    Raises:
      DamagedCheckpointError: an array is not what was saved.
    """
    found: dict[str, str] = {}
    for path, leaf in named(tree).items():
        found |= begin({path: leaf}).values()
    expected = contract["arrays"][part]
    bad = [name for name, value in found.items() if expected[name][2] != value]
    if bad:
        raise DamagedCheckpointError(
            f"{where / part} is damaged: {len(bad)} of {len(found)} arrays differ from what was "
            f"saved, first {bad[0]}"
        )


def read_verified(
    folder: Path, part: str, target: PyTree = None, contract: Contract | None = None
) -> PyTree:
    """One part of a step, checked; on one device, or with the shardings of a target."""
    folder = folder.absolute()
    contract = read_contract(folder) if contract is None else contract
    if target is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes_in(contract, part),
        )
    tree = read_part(folder, contract, part, target)
    verify(tree, contract, part, folder)
    return tree


def check_leaf_by_leaf(
    folder: Path, contract: Contract, part: str, seen: Callable[[int], None] | None = None
) -> dict[str, str]:
    """The arrays of a part that are not what was saved, each with the reason; one array is in
    memory at a time.

    Args:
      seen: called with the bytes of each array when it is done.
    """
    bad: dict[str, str] = {}
    device = SingleDeviceSharding(jax.local_devices()[0])
    for path, (shape, dtype, expected) in contract["arrays"][part].items():
        leaf = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device)
        try:
            found = _read(folder / part, {path: leaf})
            if begin(found).values() != {path: expected}:
                bad[path] = "differs from what was saved"
        except PermissionError as error:
            raise not_allowed(error) from error
        except Exception as error:  # whatever a damaged file makes of Orbax and its libraries
            bad[path] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if seen is not None:
            seen(int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize)
    return bad
