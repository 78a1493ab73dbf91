"""`vitjax export`: a checkpoint to the format that another program reads."""

import argparse
import logging

from vitjax import cli, inference
from vitjax.errors import InputError
from vitjax.interop.write import DTYPES, FORMATS, OUTPUTS, export
from vitjax.progress import logging_to

log = logging.getLogger("vitjax")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax export",
        description=__doc__,
        epilog="example: vitjax export --checkpoint=runs/quickstart --format=hf --out=exported",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a run, a step, or weights in any format"
    )
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "--out", required=True, help="a new folder, or a file with the format's suffix"
    )
    parser.add_argument("--step", type=int, help="of a run; the newest where not given")
    parser.add_argument("--dtype", help=f"of the weights: {', '.join(DTYPES)}; as they were read")
    parser.add_argument("--output", help=f"of onnx and stablehlo: {', '.join(OUTPUTS)}")
    parser.add_argument("--image-size", type=int, help="resample positions to this size, in pixels")
    arguments, assignments = cli.parse(parser, argv)
    if assignments:
        raise InputError("vitjax export takes no --config options")
    with logging_to(None):
        vision = inference.load(
            arguments.checkpoint,
            step=arguments.step,
            image_size=arguments.image_size,
            defer=True,
        )
        notes = export(
            vision, arguments.out, arguments.format, dtype=arguments.dtype, output=arguments.output
        )
        for note in notes:
            log.info("%s", note)
        log.info("written: %s", arguments.out)
    return 0
