"""`vitjax data`: prepares data for training, shows it, and measures how fast it is read."""

import argparse
from pathlib import Path
from typing import Any

from vitjax import cli, cpu
from vitjax.config import parse_value
from vitjax.errors import InputError
from vitjax.progress import logging_to

MOST_CELLS = 100  # along a side of a picture

EXAMPLES = """example: vitjax data prepare --source=birds --split=train,test --out=birds_256 --short_side=256

  vitjax data inspect --source=birds --split=train --out=look
  vitjax data inspect --config=my_config.py --config.data.root=birds --out=look
  vitjax data bench   --config=my_config.py --config.data.root=birds --threads=1,2,4
"""  # noqa: E501


def _arguments(assignments: list[str]) -> dict[str, Any]:
    """--source.KEY=VALUE as the arguments of a source."""
    found = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--source.{key} needs a value: --source.{key}=VALUE")
        found[key] = parse_value(text)
    return found


def _numbers(text: str, name: str) -> list[int]:
    """Positive integers parted by commas."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 0 for word in words):
        raise InputError(f"--{name} must be integers parted by commas, got {text!r}")
    return [int(word) for word in words]


def _check_folder(out: str) -> Path:
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out={out} is a file; it must be a folder or new")
    return path


def prepare(arguments: argparse.Namespace, source_arguments: dict[str, Any]) -> int:
    from vitjax.data.preparing import prepare as preparing
    from vitjax.data.preparing.options import Options

    if arguments.shards != "auto" and not arguments.shards.isdecimal():
        raise InputError(f"--shards must be a number or auto, got {arguments.shards!r}")
    splits = arguments.split.split(",")
    if len(set(splits)) < len(splits):
        raise InputError(f"--split={arguments.split} names a split twice")
    if len(splits) > 1 and "split" in source_arguments:
        raise InputError("--source.split goes with one --split; prepare them one by one")
    every = [
        Options(
            source=arguments.source,
            split=split,
            arguments=source_arguments,
            short_side=arguments.short_side,
            quality=arguments.quality,
            channels=arguments.channels,
            num_shards=None if arguments.shards == "auto" else int(arguments.shards),
            num_workers=cpu.usable_cores() if arguments.workers is None else arguments.workers,
            keep_duplicates=arguments.keep_duplicates,
            max_unreadable=arguments.max_unreadable,
            licence=arguments.licence,
        )
        for split in splits
    ]
    out = _check_folder(arguments.out)
    with logging_to(None) as console:
        try:
            for options in every:
                split = preparing.prepare(options, out, console)
                text = preparing.describe(options.split, split, out)
                console.print(text, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("interrupted: start the same command again to go on")
            return 130
    return 0


def inspect(
    arguments: argparse.Namespace, source_arguments: dict[str, Any], assignments: list[str]
) -> int:
    from vitjax import config as config_lib
    from vitjax.data import inspecting
    from vitjax.data.preparing.options import open_named

    if bool(arguments.source) == bool(arguments.config):
        raise InputError("give either --source or --config")
    if not arguments.config and assignments:
        raise InputError("--config.KEY needs --config")
    if not arguments.source and (source_arguments or arguments.split):
        raise InputError("--split and --source.KEY need --source; a config names its own")
    for name in ("rows", "columns"):
        if not 1 <= getattr(arguments, name) <= MOST_CELLS:
            raise InputError(f"--{name} must be 1 to {MOST_CELLS}, got {getattr(arguments, name)}")
    to_check = None if arguments.check == "all" else _numbers(arguments.check, "check")[0]
    if to_check == 0:
        raise InputError("--check must be at least 1, or all, got 0")
    out = _check_folder(arguments.out)
    config, channels = None, 3
    if arguments.config:
        config = _config(arguments.config, assignments)
        source, title = config_lib.build(config.data.source), arguments.config
        channels = config.data.channels
    else:
        title, split = arguments.source, arguments.split or "train"
        source = open_named(arguments.source, source_arguments, split)[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out={out}: {error.strerror}") from error
    with logging_to(None) as console:
        inspecting.inspect(
            source,
            out,
            console,
            title=title,
            channels=channels,
            config=config,
            rows=arguments.rows,
            columns=arguments.columns,
            seed=arguments.seed,
            to_check=to_check,
        )
    return 0


def bench(arguments: argparse.Namespace, assignments: list[str]) -> int:
    from vitjax.data import measure

    config = _config(arguments.config, assignments)
    threads = _numbers(arguments.threads, "threads") if arguments.threads else []
    with logging_to(None) as console:
        measure.bench(
            config,
            console,
            num_batches=arguments.batches,
            threads=threads or sorted({1, measure.threads_of(config)}),
            json_path=arguments.json,
        )
    return 0


def _config(name: str, assignments: list[str]) -> Any:
    from vitjax import config as config_lib

    config = config_lib.override(config_lib.load_config(name), assignments)
    if not config.data.source.get("target"):
        raise InputError("data.source.target is not set: give the import path of a source")
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitjax data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    about = {
        "prepare": "write a source as shards that are read fast, without what cannot be read",
        "inspect": "pictures and numbers of a source, or of what a config makes of it",
        "bench": "how fast the input pipeline of a config is, and where its time goes",
    }
    made = {
        name: actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in about.items()
    }
    for name in ("prepare", "inspect"):
        made[name].add_argument(
            "--source",
            required=name == "prepare",
            help="a folder or a zip of class folders, or the import path of a source",
        )
        made[name].add_argument("--source.KEY", metavar="VALUE", help="an argument of the source")
        made[name].add_argument("--out", required=True, help="the folder to write")
        made[name].add_argument(
            "--split",
            default="train" if name == "prepare" else None,
            help="which (train); all: a folder as it is",
        )
    add = made["prepare"].add_argument
    add("--short_side", type=int, metavar="PIXELS", help="shrink larger images to this; JPEG")
    add("--quality", type=int, default=92, help="of these JPEGs (92)")
    add("--channels", type=int, default=3, help="1 or 3: as what images are compared (3)")
    add("--shards", default="auto", help="how many files (auto: of about 256 MB)")
    add("--workers", type=int, help="processes (one a core)")
    add("--licence", help="a line for the card, such as 'CC BY 4.0'")
    add("--keep_duplicates", action="store_true", help="keep images with the same pixels")
    add("--max_unreadable", type=float, default=0.05, help="stop above this share (0.05)")
    for name in ("inspect", "bench"):
        made[name].add_argument("--config", required=name == "bench", help="a config")
        made[name].add_argument("--config.KEY", metavar="VALUE", help="override any key of it")
    add = made["inspect"].add_argument
    add("--rows", type=int, default=4, help="of each picture (4)")
    add("--columns", type=int, default=8, help="of each picture (8)")
    add("--seed", type=int, default=0, help="another seed shows other examples (0)")
    add("--check", default="2000", help="how many examples are decoded and measured, or all (2000)")
    add = made["bench"].add_argument
    add("--batches", type=int, default=50, help="that are timed (50)")
    add("--threads", help="numbers of decoding threads, such as 1,2,4 (1 and the config's)")
    add("--json", help="a file for the numbers")
    return parser


def main(argv: list[str]) -> int:
    rest, source_assignments = cli.set_aside(argv, "source")
    arguments, assignments = cli.parse(_parser(), rest)
    source_arguments = _arguments(source_assignments)
    if arguments.action == "inspect":
        return inspect(arguments, source_arguments, assignments)
    if arguments.action == "bench":
        if source_assignments:
            raise InputError("--source.KEY does not go with `vitjax data bench`")
        return bench(arguments, assignments)
    if assignments:
        raise InputError("--config.KEY does not go with `vitjax data prepare`")
    return prepare(arguments, source_arguments)
