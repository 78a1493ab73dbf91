"""The transfer of a checkpoint to whole slides: bags of features, then pooling over each bag.

The presets are the poolings: "gated" and "attention" (Ilse et al. 2018, arXiv 1802.04712), "mean"
and "max". The report is that of images, with a slide for each.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax import inference
from vitjax.config import Config
from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.inference import VisionModel
from vitjax.medical import presets, probes
from vitjax.medical.cohort import Cohort, LabelSet
from vitjax.medical.slides import detections
from vitjax.medical.slides.bags import Tiling, extract, model_hash, read_bag
from vitjax.medical.slides.fit import MilResult, fit
from vitjax.medical.slides.heat import draw_attention
from vitjax.medical.slides.table import SlideTable
from vitjax.medical.transfer import Outcome, Transfer, check_report

log = logging.getLogger("vitjax")
POOLS = ("gated", "attention", "mean", "max")
FLOORS = ("majority",)
UNSEEN = ("Label and macro images inside slide files were not looked at: they may name a patient.",)
LEAST = 1e-12


class _NoImages:
    """In the place of images, where a row is a slide."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        raise UnreadableImage(f"slide {index} is no image")


def cohort_of(table: SlideTable) -> Cohort:
    """A table's slides as the rows of a cohort."""
    labels = np.where(table.labels < 0, np.nan, table.labels).astype(np.float32)
    official = {"CAMELYON16": "slide_auc", "CAMELYON17": "camelyon17"}.get(table.name)
    if len(table.classes) == 2 and official:
        official = "slide_auc"
    columns = {k: v for k, v in table.columns.items() if k not in ("annotation", "stage")}
    return Cohort(
        name=table.name,
        images=_NoImages(len(table)),
        ids=list(table.slide_ids),
        label_sets=(LabelSet("slide", "single", table.classes),),
        labels={"slide": labels},
        splits=table.splits,
        groups=table.groups,
        group_kind=table.group_kind,
        unit_kind="slide",
        columns={k: v for k, v in columns.items() if k != "node_class"},
        official=f"vitjax.medical.official:{official}" if official else None,
        channels=3,
        notes=table.notes + UNSEEN,
        files=table.paths,
    )


class SlideTransfer(Transfer):
    """A checkpoint, a table of slides, and a folder for what comes of them.

    Args:
      settings: with `slides`, a block such as
        {"target": "vitjax.medical.slides.camelyon:camelyon16", "root": ...}.

    Raises:
      InputError: what cannot work; nothing was read of the slides but their table.
    """

    def __init__(self, settings: Config, checkpoint: str, workdir: Path):
        self.settings, self.workdir = settings, Path(workdir)
        for name, allowed in (("presets", POOLS), ("floors", FLOORS)):
            for method in settings[name]:
                if method not in allowed:
                    raise InputError(f"{name} of slides: {suggest(method, allowed)}")
        if settings.folds:
            raise InputError(f"folds must be 0 for slides, got {settings.folds}")
        if not settings.seeds or not settings.presets:
            raise InputError("a transfer needs at least one of seeds and of presets")
        table = config_lib.build(settings.slides)
        if not isinstance(table, SlideTable):
            raise InputError(f"slides.target gives {type(table).__name__}, not a SlideTable")
        table.check_groups()
        check_report(settings, cohort_of(table))
        self._tiling = Tiling(**settings.tiling)
        self.model: VisionModel = inference.load(checkpoint, image_size=settings.image_size)
        if self.model.preprocess.channels == 1 and not settings.drop_colour:
            raise InputError(
                f"{checkpoint} takes grey images, slides are in colour; set drop_colour=True to "
                "let it see them in grey"
            )
        self.start = presets.Start(str(checkpoint), self.model.contract)
        self.inputs = None
        self._table, self._paths = table, None
        self._results: dict[tuple[str, int], MilResult] = {}
        self._use(table)

    @property
    def policy(self) -> None:
        """None: the tiles of a slide are seen once."""

    def _use(self, table: SlideTable) -> None:
        self.table, self.cohort = table, cohort_of(table)
        self.rows = {split: self.cohort.rows(split) for split in ("train", "val", "test")}
        for split, rows in self.rows.items():
            if not len(rows):
                raise InputError(f"{table.name} has no slide in split {split!r}")

    def run(self) -> dict[str, list[Outcome]]:
        """Extracts the bags that are not there yet, then makes every outcome."""
        made = extract(
            self._table, self.model, self.workdir / "bags", self._tiling,
            threads=self.settings.train.num_threads,
        )  # fmt: skip
        kept = [i for i, name in enumerate(self._table.slide_ids) if name in made]
        self._use(self._table.chosen(kept))
        self._paths = [made[name] for name in self.table.slide_ids]
        return super().run()

    def plan(self) -> list[tuple[str, int, float]]:
        names = (*self.settings.floors, *self.settings.presets)
        return [(m, seed, 1.0) for m in names for seed in self.seeds_of(m)]

    def _key(self, method: str, seed: int, labelled: float) -> str:
        facts = [
            self.table.slide_ids, self.table.labels.tolist(), self.table.splits.tolist(), method,
            model_hash(self.model), dataclasses.asdict(self._tiling),
            config_lib.plain(self.settings.mil),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _make(
        self, method: str, seed: int, labelled: float, run: Path | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        if method == "majority":
            logits, facts = probes.majority(self.cohort, self.rows["train"]).logits, {}
        else:
            result = self._fitted(method, seed)
            logits = np.log(np.maximum(result.probabilities, LEAST))
            facts = {"chosen": f"epoch {result.best_epoch}"}
        return logits[self.rows["val"]], logits[self.rows["test"]], facts

    def _fitted(self, method: str, seed: int) -> MilResult:
        if (method, seed) not in self._results:
            assert self._paths is not None
            self._results[method, seed] = fit(
                self._paths, self.table.labels, self.table.splits, classes=self.table.classes,
                pool=method, seed=seed, **self.settings.mil,
            )  # fmt: skip
        return self._results[method, seed]

    def write_checkpoint(self, outcomes: list[Outcome]) -> str | None:
        """The best seed's pooling as `workdir/mil.npz`, and pictures of its attention."""
        best = self.best_seed(outcomes)
        result = self._fitted(best.method, best.seed)
        result.model.save(self.workdir / "mil.npz")
        folder = self.workdir / "attention"
        folder.mkdir(exist_ok=True)
        assert self._paths is not None
        for row in (*self.rows["val"].tolist(), *self.rows["test"].tolist()):
            out = folder / f"{self.table.slide_ids[row]}.png"
            try:
                draw_attention(self.table.paths[row], self._paths[row], result.attention[row], out)
            except UnreadableImage as error:
                log.warning("no picture: %s", error)
        return best.name

    def froc(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """CAMELYON16's FROC of the best seed on the test slides; {} without annotations.

        Writes `detections/SLIDE.csv` of each test slide that states its resolution.
        """
        assert self._paths is not None
        if "annotation" not in self.table.columns:
            return {}
        best = self.best_seed(outcomes)
        model = self._fitted(best.method, best.seed).model
        folder = self.workdir / "detections"
        folder.mkdir(exist_ok=True)
        found, scales = {}, {}
        for row in self.rows["test"].tolist():
            name, bag = self.table.slide_ids[row], read_bag(self._paths[row])
            scales[name] = detections.microns_per_pixel(bag)
            if np.isfinite(scales[name]):
                found[name] = detections.detect(model, bag)
                detections.write(folder / f"{name}.csv", found[name])
        report = self.settings.report
        return detections.score(
            self.table, found, scales, num_bootstraps=report.num_bootstraps, level=report.level
        )

    def logits(self, outcome: Outcome, split: str) -> np.ndarray:
        if split in ("val", "test"):
            return outcome.val if split == "val" else outcome.test
        found = self._fitted(outcome.method, outcome.seed).probabilities[self.rows[split]]
        return np.log(np.maximum(found, LEAST))
