"""`vitjax import`: weights in any format to a checkpoint of ours."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from vitjax import cli, inference
from vitjax.config import parse_value
from vitjax.errors import InputError
from vitjax.interop.read import FORMATS, open_model
from vitjax.progress import logging_to

log = logging.getLogger("vitjax")


def _options(assignments: list[str], flag: str) -> dict[str, object]:
    found = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not text:
            raise InputError(f"--{flag}.{key} needs a value: --{flag}.{key}=VALUE")
        found[key] = parse_value(text)
    return found


def _say(contract: dict[str, Any], num_params: int) -> None:
    origin = contract.get("origin") or {"format": "safetensors", "family": "vitjax"}
    log.info("%s: %s, %s parameters", origin["format"], origin["family"], f"{num_params:,}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax import",
        description=__doc__,
        epilog="example: vitjax import --source=dinov2-base --out=imported/dinov2_b14; "
        "--model.KEY=VALUE and --preprocess.KEY=VALUE give what the file does not say",
    )
    parser.add_argument("--source", required=True, help="a file or a folder of weights")
    parser.add_argument("--out", help="the checkpoint to write: a new folder")
    parser.add_argument("--format", help=f"{', '.join(FORMATS)}; recognised where not given")
    parser.add_argument("--key", help="which of several state dicts in a torch file")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="arrays to leave out"
    )
    parser.add_argument("--image-size", type=int, help="resample positions to this size in pixels")
    parser.add_argument("--patch-size", type=int, help="resize the patch embedding to this size")
    parser.add_argument("--dry-run", action="store_true", help="describe the model, write nothing")
    rest, preprocess = cli.set_aside(argv, "preprocess")
    arguments, model = cli.parse(parser, rest, flag="model")
    given = {
        "format": arguments.format,
        "key": arguments.key,
        "model": _options(model, "model"),
        "preprocess": _options(preprocess, "preprocess"),
        "ignore": arguments.ignore,
    }
    if not arguments.dry_run and not arguments.out:
        raise InputError("--out is missing: the folder to write, or --dry-run to write nothing")
    with logging_to(None):
        if arguments.dry_run:
            imported = open_model(arguments.source, **given)
            _say(imported.contract, imported.model.num_params)
            log.info("%s", json.dumps(imported.contract["preprocess"]))
            log.info("%s", imported.report)
            return 0
        out = Path(arguments.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out={out} is not an empty folder; nothing was written")
        vision = inference.load(
            arguments.source,
            image_size=arguments.image_size,
            patch_size=arguments.patch_size,
            defer=True,
            **given,
        )
        vision.save(out)
        _say(vision.contract, vision.num_params)
        log.info("%s", vision.report)
        log.info("written: %s", out)
    return 0
