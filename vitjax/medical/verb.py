"""`vitjax transfer`: from a checkpoint and labelled images to a report."""

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vitjax import cli, lock, processes
from vitjax import config as config_lib
from vitjax.config import Config
from vitjax.errors import InputError
from vitjax.medical import (
    collect,
    leakage,
    low_data,
    predictions,
    presets,
    privacy,
    report,
    report_page,
    robustness,
)
from vitjax.medical.cohort import Cohort
from vitjax.medical.settings import transfer_config
from vitjax.medical.slides.transfer import SlideTransfer
from vitjax.medical.transfer import Outcome, Transfer
from vitjax.progress import logging_to
from vitjax.telemetry import read_config

log = logging.getLogger("vitjax")
EXAMPLE = (
    "vitjax transfer --config=transfer/breastmnist --config.root=breastmnist.npz "
    "--checkpoint=runs/small_grey --workdir=runs/breast"
)
LISTED = 50


def guards(settings: Config, cohort: Cohort) -> dict[str, Any]:
    """What must hold before anything is trained, and what is said of the data in the report.

    Raises:
      InputError: the data seem to name persons, or a group is in two splits.
    """
    findings = privacy.require_private(cohort, tuple(settings.allow))
    for text in findings.warnings:
        log.warning("privacy: %s", text)
    leakage.check_groups(cohort)
    found: dict[str, Any] = {
        "privacy": dataclasses.asdict(findings),
        "groups": f"no {cohort.group_kind} is in two splits",
    }
    if settings.report.duplicates:
        same = leakage.duplicates(cohort)
        across = same.across()
        found["duplicates"] = {
            "counts": same.counts(),
            "exact": [list(s.ids) for s in across.exact[:LISTED]],
            "near": [[*n.ids, n.correlation] for n in across.near[:LISTED]],
            "looked_at": same.looked_at,
            "unreadable": len(same.unreadable),
        }
        for kind, counts in across.counts().items():
            for splits, count in counts.items():
                log.warning("%d %s duplicates lie in %s", count, kind, splits)
    if settings.pretraining:
        overlap = leakage.overlap(cohort, _index(Path(settings.pretraining)))
        found["overlap"] = {
            "exact": len(overlap.exact),
            "near": len(overlap.near),
            "others": overlap.others,
            "splits": overlap.splits,
        }
    return found


def _index(path: Path) -> leakage.Hashes:
    """The hashes of the images that a checkpoint was trained on: of a run's data, or an index."""
    if not path.is_dir():
        return leakage.Hashes.load(str(path))
    config = read_config(path)
    if config is None:
        raise InputError(f"pretraining={path} is no run directory: it has no config.json")
    log.info("hashing the images that %s was trained on", path)
    return leakage.hash_index(config_lib.build(config["data"]["source"]))


def transfer(settings: Config, checkpoint: str, workdir: Path) -> dict[str, Any]:
    """Trains every preset and floor, and writes checkpoint, predictions.csv and the report.

    Run again it goes on where it was; what was made is not made again.

    Returns:
      The report.

    Raises:
      InputError: the data, the checkpoint or the settings cannot work; nothing was trained.
      Preempted: a signal came; the run in work is saved.
    """
    if settings.slides.target:
        work, said = SlideTransfer(settings, checkpoint, workdir), {}
    else:
        work = Transfer(settings, checkpoint, workdir)
        said = guards(settings, work.cohort)
    workdir.mkdir(parents=True, exist_ok=True)
    if not jax.config.values.get("jax_compilation_cache_dir"):  # many runs of few programs
        jax.config.update("jax_compilation_cache_dir", str(workdir / "cache" / "compiled"))
    with lock.on_run(workdir) if work.is_first else contextlib.nullcontext() as refused:
        if refused:
            raise InputError(refused)
        found = work.run()
        made = report.make(work, found, said)
        outcomes = found[made["chosen"]]
        if isinstance(work, SlideTransfer):
            made["froc"] = report.plain(work.froc(outcomes))
        if settings.low_data.labelled and not settings.slides.target:
            made["low_data"] = report.plain(low_data.measure(work))
        if settings.robustness and not settings.slides.target:
            made["robustness"] = report.plain(_robustness(work, made["chosen"], found))
        made["checkpoint_written"] = work.write_checkpoint(outcomes)
        splits = (*(("train",) if settings.report.predict_train else ()), "val", "test")
        if work.is_first:
            predictions.write(work, outcomes, splits)
            report_page.write(made, workdir)
    return made


def _robustness(work: Transfer, chosen: str, found: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """Of the chosen preset, the same trained on noisy images, and the floors drawn afresh."""
    methods, outcomes = [chosen], dict(found)
    if presets.is_trained(chosen) and not chosen.endswith(presets.NOISE):
        noisy = chosen + presets.NOISE
        log.info("%s, for the robustness table", noisy)
        outcomes[noisy] = [work.outcome(noisy, found[chosen][0].seed)]
        methods.append(noisy)
    methods += [m for m in presets.FROM_NOTHING if m in work.settings.floors and m in found]
    return robustness.measure(work, outcomes, tuple(dict.fromkeys(methods)))


def _settings(arguments: argparse.Namespace, assignments: list[str]) -> Config:
    if (arguments.config is None) == (arguments.data is None):
        raise InputError("give --config=FILE, or --data=FOLDER_OR_CSV and no config")
    if arguments.config is not None:
        settings = config_lib.load_config(arguments.config)
    else:
        settings = transfer_config()
        settings.cohort = {"target": "vitjax.medical.readers.own:own", "path": arguments.data}
    if "presets" not in settings:
        raise InputError(f"{arguments.config} is no transfer config; see configs/transfer")
    return config_lib.override(settings, assignments)


def main(argv: list[str]) -> int:
    if argv and argv[0] == "collect":
        return collect.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="vitjax transfer",
        description="Transfers a checkpoint to labelled medical images; writes a checkpoint, "
        "predictions.csv, and report.json, .md and .html. Run again it goes on where it was.",
        epilog=f"example: {EXAMPLE}\nand then: {collect.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="a transfer config, or the name of a shipped one")
    parser.add_argument("--data", help="your own images: a folder of classes, or a CSV")
    parser.add_argument("--checkpoint", required=True, help="whatever vitjax.load reads")
    parser.add_argument("--workdir", required=True, help="where everything is written")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override any key of the config")
    arguments, assignments = cli.parse(parser, argv)
    settings = _settings(arguments, assignments)
    with processes.joined(), logging_to(None):
        made = transfer(settings, arguments.checkpoint, Path(arguments.workdir))
        best = next(m for m in made["methods"] if m["method"] == made["chosen"])
        auroc = best["test_auroc"]
        log.info(
            "%s, chosen on validation: test AUROC %.3f (%.3f to %.3f); %s",
            made["chosen"], auroc["value"], auroc["low"], auroc["high"],
            Path(arguments.workdir) / "report.html",
        )  # fmt: skip
    return 0
