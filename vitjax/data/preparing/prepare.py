"""A source of any kind to a folder of shards that a training run reads fast.

Every example is decoded once: what cannot be read is left out and listed, and so are exact
duplicates. Shards are written by processes, first into `.preparing/`, where each stays if the work
is killed; the folder's card comes last. Their bytes depend on the source and the options alone.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vitjax import config as config_lib
from vitjax import lock
from vitjax.data.counting import Count
from vitjax.data.preparing import card as card_lib
from vitjax.data.preparing import merge as merge_lib
from vitjax.data.preparing import shard as shard_lib
from vitjax.data.preparing import whole_files
from vitjax.data.preparing.encoding import encode
from vitjax.data.preparing.merge import Merged
from vitjax.data.preparing.options import LISTED, Options, open_source
from vitjax.data.preparing.pool import DONE, UNREADABLE, in_processes
from vitjax.data.preparing.shard import Task
from vitjax.data.preparing.statistics import class_name
from vitjax.data.sources import ask
from vitjax.data.sources.prepared import PREPARING, shard_paths
from vitjax.errors import InputError, UnreadableImage, suggest

log = logging.getLogger("vitjax")
SHARD_BYTES = 256 * 10**6
LEAST_EXAMPLES, SHARES = 256, 16  # small data has up to 16 shards too, for the workers
SAMPLED = 48  # images from which the size of the whole is estimated


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from preparing in it.

    Raises:
      InputError: it is a file or cannot be written, or another process prepares there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PREPARING).mkdir(exist_ok=True)
        file = lock.take(out / lock.NAME)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise InputError(f"cannot write to --out={out}: {reason}") from error
    if file is None:
        found = lock.holder(out / lock.NAME)
        who = f"process {found[0]} on {found[1]}" if found else "another process"
        raise InputError(f"{who} is preparing {out}; wait for it, or choose another --out")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (out / PREPARING).rmdir()  # if nothing is unfinished
        file.close()


def prepare(options: Options, out: Path, console: Console) -> dict[str, Any]:
    """Prepares one split into a folder, or goes on where a killed process left it.

    Returns:
      What the card says of the split.

    Raises:
      InputError: wrong options, a folder prepared otherwise, or too many unreadable images.
      SaveError: the disk is full; what is finished stays.
    """
    if out.is_dir() and not (out / PREPARING).is_dir() and card_lib.read_card(out) is None:
        others = sorted(p.name for p in out.iterdir() if p.name != lock.NAME)
        if others:
            raise InputError(f"--out={out} is not empty and was not prepared: it holds {others[0]}")
    source, block, prefix = open_source(options)
    with locked(out):
        return _Split(options, out, console, source, block, prefix).run()


class _Split:
    """The preparation of one split, with its folder locked."""

    def __init__(self, options, out: Path, console, source, block, prefix):
        self.options, self.out, self.console = options, out, console
        self.source, self.block, self.prefix = source, block, prefix
        self.card = card_lib.read_card(out) or card_lib.new_card(
            out, source.num_classes, source.class_names
        )
        self.folder = out / PREPARING / options.split
        self.began = time.monotonic()

    def run(self) -> dict[str, Any]:
        for place in (self.out, self.folder):
            for left in place.glob("*.tmp-*"):  # of a process that was killed
                left.unlink()
        options, split = self.options, self.options.split
        wanted = {"source": self.block, **options.recorded, "num_examples": len(self.source)}
        wanted = json.loads(json.dumps(wanted))
        if split in self.card["splits"]:
            self._compare(self.card["splits"][split]["plan"], wanted)
            shutil.rmtree(self.folder, ignore_errors=True)
            log.info("%s is prepared in %s: nothing to do", split, self.out)
            return self.card["splits"][split]
        renumber = self._renumber()
        num_shards = self._plan(wanted)
        starts = [len(self.source) * k // num_shards for k in range(num_shards + 1)]
        tasks = [
            Task(
                source=self.block,
                prefix=self.prefix,
                renumber=renumber,
                start=start,
                stop=stop,
                num_examples=len(self.source),
                encoding=options.encoding,
                keep_duplicates=options.keep_duplicates,
                path=str(self.folder / f"{number:05}"),
            )
            for number, (start, stop) in enumerate(itertools.pairwise(starts))
        ]
        finals = shard_paths(self.out, split, num_shards)
        self._write(tasks, finals)
        merged = merge_lib.merge([Path(f"{t.path}.npz") for t in tasks], options.keep_duplicates)
        if not merged.is_kept.any():
            raise InputError(f"no image of --source={options.source} can be read")
        self._finish(tasks, finals, merged)
        return self._publish(finals, merged, wanted)

    def _compare(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        differing = config_lib.differences(there, wanted)
        if differing:
            raise InputError(
                f"{self.options.split} in {self.out} was prepared otherwise: "
                f"{'; '.join(differing)}. Give the same options to go on, choose another --out, "
                "or remove the folder to start anew"
            )

    def _plan(self, wanted: dict[str, Any]) -> int:
        """The number of shards, by the plan that is there or a new one."""
        path = self.folder / "plan.json"
        if path.is_file():
            plan = json.loads(path.read_text())
            self._compare(plan["wanted"], wanted)
            return plan["num_shards"]
        split = self.options.split
        if any(self.out.glob(f"{split}-*-of-*.array_record")):
            raise InputError(f"--out={self.out} holds shards of {split} from elsewhere")
        num_shards = self.options.num_shards or self._estimate()
        num_shards = min(num_shards, len(self.source))
        with whole_files.saving(path):
            self.folder.mkdir(exist_ok=True)
        plan = {"wanted": wanted, "num_shards": num_shards}
        whole_files.write_bytes(path, json.dumps(plan, indent=1).encode())
        return num_shards

    def _estimate(self) -> int:
        total, count = len(self.source), min(SAMPLED, len(self.source))
        num_bytes, num_read = 0, 0
        for sample in range(count):
            try:
                image = self.source[total * sample // count]["image"]
                num_bytes += len(encode(image, self.options.encoding).data)
                num_read += 1
            except UnreadableImage:
                continue
        whole = num_bytes / max(num_read, 1) * total
        return max(round(whole / SHARD_BYTES), min(total // LEAST_EXAMPLES, SHARES), 1)

    def _renumber(self) -> tuple[int, ...] | None:
        """From the source's labels to the card's, which may have more classes.

        Raises:
          InputError: the source has classes that the card has not.
        """
        here, there = self.source.class_names, self.card["class_names"]
        if not here or not there:
            if bool(here) != bool(there) or self.source.num_classes > self.card["num_classes"]:
                raise InputError(
                    f"--source={self.options.source} has {self.source.num_classes} classes "
                    f"({'named' if here else 'unnamed'}), the splits in {self.out} "
                    f"{self.card['num_classes']} ({'named' if there else 'unnamed'})"
                )
            return None
        unknown = [name for name in here if name not in set(there)]
        if unknown:
            raise InputError(
                f"the class {unknown[0]!r} of split {self.options.split!r} is not in the splits "
                f"that {self.out} holds: prepare first the split that has all classes; "
                f"{suggest(unknown[0], there)}"
            )
        table = tuple(there.index(name) for name in here)
        return None if list(here) == there else table

    def _write(self, tasks: Sequence[Task], finals: Sequence[Path]) -> None:
        """Writes the shards that are not there yet.

        Raises:
          InputError: too many examples cannot be read.
        """
        waiting, done = [], 0
        bad: list[tuple[str, str]] = []
        for task, final in zip(tasks, finals, strict=True):
            sidecar, shard = Path(f"{task.path}.npz"), Path(f"{task.path}.array_record")
            if sidecar.is_file() and (final.is_file() or shard.is_file()):
                done += task.stop - task.start
                bad += merge_lib.Sidecar(sidecar).unreadable
            else:
                waiting.append((task,))
        if len(waiting) < len(tasks):
            log.info(
                "going on: %d of %d shards of %s are written already",
                len(tasks) - len(waiting), len(tasks), self.options.split,
            )  # fmt: skip
        allowed = self.options.max_unreadable * len(self.source)
        if waiting and len(bad) <= allowed:
            with Count(self.console, f"{self.options.split}:", len(self.source), done) as count:

                def watch(shared: Any) -> bool:
                    found = len(bad) + shared[UNREADABLE]
                    more = f"  {found:,} unreadable" if found else ""
                    count.show(done + shared[DONE] + shared[UNREADABLE], more)
                    return found > allowed

                for found in in_processes(
                    shard_lib.write_shard, waiting, self.options.num_workers, watch
                ):
                    bad += found
        if len(bad) > allowed:
            rows = [("problem", "id", "detail"), *(("unreadable", *pair) for pair in bad)]
            path = self.out / f"{self.options.split}.left_out.csv"
            whole_files.write_bytes(path, whole_files.to_csv(rows))
            listed = "".join(f"\n  {name}: {reason}" for name, reason in bad[:LISTED])
            more = f"\n  ... all in {path}" if len(bad) > LISTED else ""
            raise InputError(
                f"{len(bad)} examples cannot be read, more than {self.options.max_unreadable:.1%} "
                f"of {len(self.source)} (--max_unreadable):{listed}{more}"
            )

    def _finish(self, tasks: Sequence[Task], finals: Sequence[Path], merged: Merged) -> None:
        """Moves the shards to their place; those that hold duplicates are copied without them."""
        copies = []
        for number, (task, final) in enumerate(zip(tasks, finals, strict=True)):
            shard = Path(f"{task.path}.array_record")
            if final.is_file():
                continue
            if dropped := merged.dropped_records(number):
                copies.append((shard, final, dropped))
            else:
                with whole_files.saving(final):
                    os.replace(shard, final)
        if copies:
            in_processes(whole_files.copy_shard, copies, self.options.num_workers)

    def _publish(
        self, finals: Sequence[Path], merged: Merged, wanted: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes what belongs to the shards, the card last."""
        options, card, split = self.options, self.card, self.options.split
        index = merge_lib.index_arrays(merged, [path.stat().st_size for path in finals])
        names = card["class_names"]
        rows = merge_lib.left_out(
            merged, lambda label: class_name(label, names), options.keep_duplicates
        )
        whole_files.write_bytes(self.out / f"{split}.index.npz", whole_files.to_npz(index))
        whole_files.write_bytes(self.out / f"{split}.left_out.csv", whole_files.to_csv(rows))
        card["date"] = card_lib.today()
        card["licence"] = options.licence or card["licence"]
        card["splits"][split] = {
            "source": options.source,
            "options": options.recorded,
            "plan": wanted,
            **merge_lib.summary(merged, index, card["num_classes"]),
            "problems": list(ask(self.source, "problems") or [])[: merge_lib.LISTED],
            "date": card["date"],
            "seconds": round(time.monotonic() - self.began, 1),
        }
        text = card_lib.readme(card)
        whole_files.write_bytes(self.out / card_lib.README, os.fsencode(text))
        text = json.dumps(card, indent=1) + "\n"
        whole_files.write_bytes(self.out / card_lib.NAME, text.encode())
        shutil.rmtree(self.folder, ignore_errors=True)
        return card["splits"][split]


def describe(name: str, split: dict[str, Any], out: Path) -> str:
    """A split in two lines."""
    kept = " kept" if split["options"]["keep_duplicates"] else ""
    faults = [
        f"{split[key]['count']:,} {key}{kept if key == 'duplicates' else ''}"
        for key in ("unreadable", "duplicates", "conflicts")
        if split[key]["count"]
    ]
    listed = f"\n{', '.join(faults)}: see {out / f'{name}.left_out.csv'}" if faults else ""
    return (
        f"{name}: {split['num_examples']:,} examples in {split['num_shards']:,} shards, "
        f"{split['bytes'] / 1e6:,.1f} MB: {out}{listed}"
    )
