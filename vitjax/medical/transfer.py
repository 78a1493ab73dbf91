"""The transfer of one checkpoint to one cohort: every preset and floor, every seed, resumable.

Each (method, seed, labelled) is an outcome: the logits of the validation and the test images, kept
in `outcomes/` once they are there. Training runs are ordinary runs in `runs/`.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vitjax import config as config_lib
from vitjax import inference
from vitjax.checkpoints import steps, store
from vitjax.config import Config
from vitjax.data.images import decode
from vitjax.errors import InputError, UnreadableImage, suggest
from vitjax.experiment import make_model
from vitjax.inference import VisionModel
from vitjax.medical import features, official, presets, probes
from vitjax.medical.cohort import Cohort, CohortSource
from vitjax.medical.scoring import Scored, mean_auroc, probabilities, to_units
from vitjax.medical.sources import encode_inputs, open_cohort, part_of
from vitjax.precision import make_precision
from vitjax.train import train

log = logging.getLogger("vitjax")
PROBES = ("knn", "linear", "pixels", "majority")
METHODS = (*PROBES, *presets.TRAINED)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run of a method gave.

    Attributes:
      method, seed, labelled: which run.
      val, test: logits of the images of these splits; NaN where an image cannot be read.
      facts: seconds, and what else is known of it.
      run: the run directory, for methods that train.
    """

    method: str
    seed: int
    labelled: float
    val: Float[np.ndarray, "V K"]
    test: Float[np.ndarray, "T K"]
    facts: dict[str, Any]
    run: Path | None = None

    @property
    def name(self) -> str:
        return outcome_name(self.method, self.seed, self.labelled)


def outcome_name(method: str, seed: int, labelled: float) -> str:
    return f"{method}-seed{seed}" + (f"-labelled{labelled:g}" if labelled != 1 else "")


class Transfer:
    """A checkpoint, a cohort, and a folder for what comes of them.

    Args:
      settings: see `settings.transfer_config`.
      checkpoint: what `vitjax.load` reads.
      workdir: made if missing.

    Raises:
      InputError: the data, the checkpoint or the settings cannot work; nothing was trained.
    """

    def __init__(self, settings: Config, checkpoint: str, workdir: Path):
        self.settings, self.workdir = settings, Path(workdir)
        asked = {"presets": settings.presets, "floors": settings.floors}
        if settings.low_data.labelled:
            asked["low_data.methods"] = settings.low_data.methods
        for name, methods in asked.items():
            for method in methods:
                if method not in METHODS and not presets.is_trained(method):
                    raise InputError(f"{name}: {suggest(method, METHODS)}")
        if not settings.seeds or not settings.presets:
            raise InputError("a transfer needs at least one of seeds and of presets")
        self.cohort: Cohort = open_cohort(
            settings.cohort, settings.val_fraction, settings.test_fraction, settings.folds
        )
        check_report(settings, self.cohort)
        self.model = inference.load(checkpoint, image_size=settings.image_size)
        is_grey = self.cohort.channels == 3 and self.model.preprocess.channels == 1
        if is_grey and not settings.drop_colour:
            raise InputError(
                f"{checkpoint} takes grey images (preprocess.channels=1), {self.cohort.name} is in "
                "colour; set drop_colour=True to let it see them in grey"
            )
        self.start = presets.Start(str(checkpoint), self.model.contract)
        self.inputs = None
        if settings.inputs:
            self.inputs = encode_inputs(self.cohort, settings.inputs)[0]
        self.rows = {split: self.cohort.rows(split) for split in ("train", "val", "test")}
        presets.check_fits(settings, self.cohort, self.start)
        self._features: Float[np.ndarray, "N D"] | None = None
        self._pixels: Float[np.ndarray, "N D"] | None = None

    @property
    def policy(self) -> str | None:
        """The augmentation of training, by its name."""
        return presets.policy_of(self.settings, self.cohort)

    @property
    def is_first(self) -> bool:
        return jax.process_index() == 0

    def plan(self) -> list[tuple[str, int, float]]:
        """Every outcome that the report needs, in the order in which they are made."""
        s = self.settings
        cells = [(m, seed, 1.0) for m in (*s.floors, *s.presets) for seed in self.seeds_of(m)]
        low = s.low_data
        cells += [
            (method, seed, float(labelled))
            for labelled in low.labelled
            for method in low.methods
            for seed in low.seeds
        ]
        return list(dict.fromkeys(cells))

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds of a method on all labels; of one without chance the first alone, unless each
        seed has its own folds."""
        is_fixed = method in PROBES and self.cohort.folds is None
        return tuple(self.settings.seeds)[: 1 if is_fixed else None]

    def outcome(self, method: str, seed: int, labelled: float = 1.0) -> Outcome:
        """The outcome of a cell, from its file if it is there."""
        key = self._key(method, seed, labelled)
        path = self.workdir / "outcomes" / f"{outcome_name(method, seed, labelled)}.npz"
        run = self.workdir / "runs" / outcome_name(method, seed, labelled)
        run = run if presets.is_trained(method) else None
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                if facts["key"] == key:
                    return Outcome(method, seed, labelled, file["val"], file["test"], facts, run)
                raise InputError(
                    f"{path} is of other settings, data or weights; take another --workdir, or "
                    "remove it"
                )
        start = time.perf_counter()
        val, test, facts = self._make(method, seed, labelled, run)
        facts |= {"seconds": round(time.perf_counter() - start, 2), "key": key}
        if self.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, val=val, test=test, facts=json.dumps(facts))
            part.replace(path)
        return Outcome(method, seed, labelled, val, test, facts, run)

    def _make(
        self, method: str, seed: int, labelled: float, run: Path | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Logits of the validation and the test images, and facts."""
        if run is not None:
            return self._train(method, seed, labelled, run)
        logits, facts = self._probe(method, seed, labelled)
        return logits[self.cohort.rows("val", seed)], logits[self.rows["test"]], facts

    def _key(self, method: str, seed: int, labelled: float) -> str:
        """A hash of all that an outcome depends on."""
        parts: list[Any] = [features.data_key(self.cohort), self._weights, method, labelled]
        if presets.is_trained(method):
            config = presets.run_config(
                self.settings, self.cohort, self.start, method, seed, labelled
            )
            config.init.checkpoint = None  # the weights count, not where they lie
            config.mesh, config.data.num_threads = None, None
            parts.append(config_lib.plain(config))
        elif self.cohort.folds is not None:
            parts.append([self.settings.folds, seed])
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def _weights(self) -> str:
        if not hasattr(self, "_weights_key"):
            self._weights_key = features.weights_key(self.model)
        return self._weights_key

    def _probe(self, method: str, seed: int, labelled: float) -> tuple[np.ndarray, dict[str, Any]]:
        train = part_of(self.cohort, self.cohort.rows("train", seed), labelled, seed)
        if method == "majority":
            return probes.majority(self.cohort, train).logits, {}
        seen = self.pixels() if method == "pixels" else self.features()
        fit = probes.knn if method == "knn" else probes.linear
        start = time.process_time()
        found = fit(seen, self.cohort, train, self.cohort.rows("val", seed))
        facts = {"chosen": found.chosen, "cpu_seconds": round(time.process_time() - start, 2)}
        return found.logits, facts | {"num_trained": len(train)}

    def features(self) -> Float[np.ndarray, "N D"]:
        """Of all images; computed once."""
        if self._features is None:
            self._features = features.cached_features(
                self.model, self.cohort, self.workdir / "cache",
                num_threads=self.settings.train.num_threads,
            )  # fmt: skip
        return self._features

    def pixels(self) -> Float[np.ndarray, "N D"]:
        """Of all images, at most 32 x 32; NaN where one cannot be read."""
        if self._pixels is None:

            def read(index: int) -> np.ndarray | None:
                try:
                    return decode(self.cohort.images[index], self.cohort.channels)
                except UnreadableImage:
                    return None

            self._pixels = probes.pixels(self.cohort, read)
        return self._pixels

    def _train(
        self, method: str, seed: int, labelled: float, run: Path
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        start = self.start
        if presets.base_of(method) == "lp_ft":
            start = dataclasses.replace(start, checkpoint=str(self._with_probe(seed, labelled)))
        config = presets.run_config(self.settings, self.cohort, start, method, seed, labelled)
        train(config, run)
        step = best_step(run)
        model = inference.load(run, step=step)
        val = self.cohort.rows("val", seed)
        found = self.outputs(model, np.concatenate([val, self.rows["test"]]))["logits"]
        facts = {
            "best_step": step,
            "num_trained": len(
                part_of(self.cohort, self.cohort.rows("train", seed), labelled, seed)
            ),
            "num_params": model.num_params,
            "flops_per_image": model.model.flops_per_image,
        }
        return found[: len(val)], found[len(val) :], facts

    def _with_probe(self, seed: int, labelled: float) -> Path:
        """The checkpoint with the linear probe as its head."""
        key = self._key("linear", seed, labelled)[:16]  # folds, data and weights may have changed
        folder = self.workdir / "cache" / f"probe-seed{seed}-labelled{labelled:g}-{key}"
        if (folder / "done").is_file():
            return folder / "model"
        rows = part_of(self.cohort, self.cohort.rows("train", seed), labelled, seed)
        found = probes.linear(self.features(), self.cohort, rows, self.cohort.rows("val", seed))
        assert found.kernel is not None and found.bias is not None
        contract = dict(self.model.contract)
        contract["model"] = dict(contract["model"]) | {"num_classes": len(found.bias)}
        precision = make_precision(**contract["precision"])
        made = make_model(contract["model"], self.model.preprocess, precision)
        head = {"kernel": found.kernel.astype(np.float32), "bias": found.bias.astype(np.float32)}
        params = {k: v for k, v in self.model.params.items() if k != "distill_head"}
        source = CohortSource(self.cohort)
        contract |= {"class_names": source.class_names, "loss_type": loss_type(self.cohort)}
        probed = VisionModel(made, params | {"head": head}, contract)
        if self.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            probed.save(folder / "model")
            (folder / "done").touch()
        return folder / "model"

    def outputs(self, model: VisionModel, rows: np.ndarray, **options: Any) -> dict[str, Any]:
        """`features.outputs` of rows of the cohort."""
        sees_inputs = bool(model.config.get("input_sizes"))
        return features.outputs(
            model, self.cohort, rows, inputs=self.inputs if sees_inputs else None,
            num_threads=self.settings.train.num_threads, show=False, **options,
        )  # fmt: skip

    def fitted(self, outcome: Outcome) -> VisionModel | None:
        """The model of an outcome, with its head; None where there is none (knn, pixels)."""
        if outcome.run is not None:
            return inference.load(outcome.run, step=best_step(outcome.run))
        if outcome.method != "linear":
            return None
        return inference.load(self._with_probe(outcome.seed, outcome.labelled))

    def write_checkpoint(self, outcomes: list[Outcome]) -> str | None:
        """The best seed by validation as `workdir/checkpoint`, updates merged; its name.

        None where there is no model to write (knn, pixels).
        """
        best = self.best_seed(outcomes)
        model = self.fitted(best)
        if model is None:
            return None
        target = self.workdir / "checkpoint"
        if self.is_first:
            shutil.rmtree(target, ignore_errors=True)
            model.contract["class_names"] = CohortSource(self.cohort).class_names
            model.save(target)
        return best.name

    def best_seed(self, outcomes: list[Outcome]) -> Outcome:
        """The outcome with the highest validation AUROC."""
        return max(outcomes, key=lambda o: (mean_auroc(self.scored(o, "val")), -o.seed))

    def logits(self, outcome: Outcome, split: str) -> Float[np.ndarray, "R K"]:
        """An outcome's logits of any split."""
        if split in ("val", "test"):
            return outcome.val if split == "val" else outcome.test
        if outcome.run is None:
            found, _ = self._probe(outcome.method, outcome.seed, outcome.labelled)
            return found[self.cohort.rows(split, outcome.seed)]
        model = self.fitted(outcome)
        assert model is not None
        return self.outputs(model, self.cohort.rows(split, outcome.seed))["logits"]

    def scored(self, outcome: Outcome, split: str, temperature: Any = None) -> Scored:
        """The units of a split with an outcome's probabilities."""
        logits = outcome.val if split == "val" else outcome.test
        logits = logits if temperature is None else logits / temperature
        rows = self.cohort.rows(split, outcome.seed)
        return to_units(self.cohort, rows, probabilities(self.cohort.label_sets, logits))

    def run(self) -> dict[str, list[Outcome]]:
        """Makes every outcome; those on all labels by method."""
        cells, found = self.plan(), {}
        for number, (method, seed, labelled) in enumerate(cells, 1):
            part = "" if labelled == 1 else f", {labelled:g} labelled"
            log.info("%d of %d: %s, seed %d%s", number, len(cells), method, seed, part)
            made = self.outcome(method, seed, labelled)
            value = mean_auroc(self.scored(made, "val"))
            log.info("%s: validation AUROC %.4f, %.0f s", made.name, value, made.facts["seconds"])
            if labelled == 1 and method in (*self.settings.presets, *self.settings.floors):
                found.setdefault(method, []).append(made)
        return found


def best_step(run: Path) -> int:
    """The step of a run with the best validation AUROC, of those that are kept."""
    folder = steps.steps_folder(run)
    scores = {}
    for step in steps.whole_steps(folder):
        value = store.read_contract(folder / str(step))["metrics"].get(presets.METRIC)
        scores[step] = -1.0 if value is None or np.isnan(value) else value
    return max(scores, key=lambda step: (scores[step], -step))


def check_report(settings: Config, cohort: Cohort) -> None:
    """Raises InputError for numbers that the report could not use, before any work."""
    report = settings.report
    if report.num_bootstraps < 1:
        raise InputError(f"report.num_bootstraps must be at least 1, got {report.num_bootstraps}")
    if report.views < 1:
        raise InputError(f"report.views must be at least 1, got {report.views}")
    for name in ("level", "sensitivity_at"):
        if not 0 < report[name] < 1:
            raise InputError(f"report.{name} must be between 0 and 1, got {report[name]}")
    allowed = official.names(cohort) if report.goals else []
    for name in report.goals:
        if name not in allowed:
            known = f"; {suggest(name, allowed)}" if allowed else ", which has no metric known here"
            raise InputError(f"report.goals: {name!r} is no metric of {cohort.name}{known}")


def loss_type(cohort: Cohort) -> str:
    """What `vitjax predict` makes of the logits."""
    is_single = len(cohort.label_sets) == 1 and cohort.label_sets[0].kind == "single"
    return "softmax" if is_single else "sigmoid"
