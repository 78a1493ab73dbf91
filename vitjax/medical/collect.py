"""`vitjax transfer collect`: reports of several checkpoints as one table for `vitjax scaling`.

A row is a method on so many labelled images; beside its error stands what the checkpoint was
before: its size, what it had seen, and its loss. So downstream can be fitted against upstream.
"""

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

from vitjax.errors import InputError
from vitjax.telemetry import read_config

EXAMPLE = "vitjax transfer collect runs/small-breast runs/large-breast --out=transfer.csv"
COLUMNS = (
    "workdir", "checkpoint", "data", "method", "seeds", "labelled_images", "auroc", "auroc_error",
    "num_params", "flops_per_image", "upstream_examples", "upstream_loss",
)  # fmt: skip


def collect(workdirs: list[str], out: str) -> int:
    """Writes the table; returns how many rows it has.

    Raises:
      InputError: a workdir has no report.
    """
    rows = [row for workdir in workdirs for row in _rows(Path(workdir))]
    part = Path(f"{out}.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)
    os.replace(part, out)
    return len(rows)


def _rows(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "report.json"
    if not path.is_file():
        raise InputError(f"{workdir} has no report.json: is it the workdir of a vitjax transfer?")
    report = json.loads(path.read_text())
    checkpoint = report["checkpoint"]
    about = {
        "workdir": str(workdir),
        "checkpoint": checkpoint["path"],
        "data": report["data"]["name"],
        "num_params": checkpoint["num_params"],
        "flops_per_image": checkpoint["flops_per_image"],
        **upstream(Path(checkpoint["path"])),
    }
    data = report["data"]
    whole = round(data.get("trained_on", data["splits"]["train"]["images"]))
    found = [
        (m["method"], len(m["seeds"]), whole, m["test_auroc"]["value"]) for m in report["methods"]
    ]
    low = report.get("low_data") or {"curves": []}
    found += [
        (curve["method"], low["seeds"], point["images"], point["value"])
        for curve in low["curves"]
        for point in curve["points"]
    ]
    return [
        about
        | {
            "method": method,
            "seeds": seeds,
            "labelled_images": images,
            "auroc": auroc,
            "auroc_error": 1 - auroc,
        }
        for method, seeds, images, auroc in found
        if auroc is not None
    ]


def upstream(checkpoint: Path) -> dict[str, Any]:
    """What a run directory says of its training: images seen and the loss of its evaluation.

    Blank where the checkpoint is no run directory, or the run was not evaluated.
    """
    summary = checkpoint / "summary.json"
    config = read_config(checkpoint)
    if config is None or not summary.is_file():
        return {"upstream_examples": "", "upstream_loss": ""}
    said = json.loads(summary.read_text())
    losses = [said[f"eval/{name}/loss"] for name in config["evals"] if f"eval/{name}/loss" in said]
    return {
        "upstream_examples": said["step"] * config["batch_size"],
        "upstream_loss": losses[0] if losses else "",
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vitjax transfer collect",
        description="Reports of several checkpoints as one table, for vitjax scaling fit.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("workdirs", nargs="+", help="workdirs of vitjax transfer")
    parser.add_argument("--out", required=True, help="the CSV to write")
    arguments = parser.parse_args(argv)
    count = collect(arguments.workdirs, arguments.out)
    print(f"{count} rows: {arguments.out}")
    return 0
