"""The ladder of presets: each turns a checkpoint and a cohort into the config of a training run.

linear and knn train nothing of the model and are in `probes`; those here are, from what moves least
to what moves most:

lp_ft      the linear probe as the head, then all of the model (Kumar et al. 2022, arXiv 2202.10054)
freeze     the upper blocks and the head
lora       low-rank updates of attention, and the head (Hu et al. 2021, arXiv 2106.09685)
full       all, with layer-wise decay (BEiT, arXiv 2106.08254; MAE, arXiv 2111.06377)
bit_hyper  all, by BiT-HyperRule: SGD, a step schedule (Kolesnikov et al. 2019, arXiv 1912.11370)
scratch    the same model, drawn afresh
vit        the same with patches of the image and no stem, drawn afresh
hybrid     the same with a convolutional stem, drawn afresh
cnn        a ResNet (BiT) of the same FLOPs, drawn afresh

With "+noise" behind it each is trained on noisy images, as "full+noise".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitjax import config as config_lib
from vitjax import experiment, warm_start
from vitjax.config import Config, base_config
from vitjax.errors import InputError, suggest
from vitjax.experiment import make_model, make_preprocess
from vitjax.medical.cohort import Cohort
from vitjax.medical.settings import IMBALANCE
from vitjax.medical.sources import TARGET, encode_inputs, part_of
from vitjax.models.functional import Model
from vitjax.precision import Precision

TRAINED = ("lp_ft", "freeze", "lora", "full", "bit_hyper", "scratch", "vit", "hybrid", "cnn")
FROM_NOTHING = ("scratch", "vit", "hybrid", "cnn")
STEM_OF = {"vit": "patch", "hybrid": "conv"}
METRIC = "eval/val/auroc"
NOISE = "+noise"
ALL_BUT_LORA = r"(?!.*lora_|head/|inputs/).*"


def base_of(method: str) -> str:
    """The method without the noise."""
    return method.removesuffix(NOISE)


def is_trained(method: str) -> bool:
    """Whether a method is a training run."""
    return base_of(method) in TRAINED


def policy_of(settings: Config, cohort: Cohort) -> str | None:
    """The name of the augmentation that training uses, or None."""
    return (cohort.policy if settings.policy == "auto" else settings.policy) or None


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      checkpoint: what `vitjax.load` reads.
      contract: what it says of itself.
    """

    checkpoint: str
    contract: Mapping[str, Any]


def run_config(
    settings: Config,
    cohort: Cohort,
    start: Start,
    method: str,
    seed: int,
    labelled: float = 1.0,
) -> Config:
    """The config of one training run.

    Args:
      settings: of the transfer.
      method: one of TRAINED, or that with NOISE behind it.
      labelled: see `sources.part_of`.

    Raises:
      InputError: no such method, or settings that contradict the checkpoint.
    """
    if not is_trained(method):
        raise InputError(f"no training run is called {method!r}; {suggest(method, TRAINED)}")
    is_noisy, method = method.endswith(NOISE), base_of(method)
    rows = part_of(cohort, cohort.rows("train", seed), labelled, seed)
    config = base_config()
    config.seed = seed
    _set_data(config, settings, cohort, start, labelled, seed, method)
    if is_noisy:
        noise = {"target": "vitjax.data.colour:GaussianNoise", "std": (0.0, settings.train.noise)}
        config.augment = (*config.augment, noise)
    _set_model(config, settings, cohort, start, method)
    _set_loss(config, settings, cohort, rows)
    _set_length(config, settings, len(rows))
    _set_optimizer(config, settings, method)
    config.mesh = settings.train.mesh
    return config


def image_size(settings: Config, start: Start) -> int:
    return settings.image_size or start.contract["preprocess"]["image_size"]


def _set_data(config, settings, cohort, start, labelled, seed, method) -> None:
    contract = dict(start.contract["preprocess"])
    contract["image_size"] = image_size(settings, start)
    for key, value in contract.items():
        config.data[key] = tuple(value) if isinstance(value, list | tuple) else value
    block = config_lib.plain(settings.cohort)
    inputs = tuple(settings.inputs) if method != "cnn" else ()
    source = {
        "target": TARGET,
        "cohort": block,
        "inputs": inputs,
        "val_fraction": settings.val_fraction,
        "test_fraction": settings.test_fraction,
    }
    source |= {"folds": settings.folds, "seed": seed} if settings.folds else {}
    config.data.source = source | {"split": "train", "labelled": labelled, "seed": seed}
    config.data.num_targets = cohort.targets.shape[1]
    config.data.num_inputs = sum(encode_inputs(cohort, inputs)[1]) if inputs else 0
    config.data.num_threads = settings.train.num_threads
    config.data.transforms = _checked_transforms(settings, cohort)
    policy = policy_of(settings, cohort)
    if policy:
        config.augment = ({"target": "vitjax.data.policies:Policy", "name": policy},)
    config.evals.val = {
        "target": "vitjax.medical.evaluator:Scores",
        "source": source | {"split": "val"},
        "batch_size": 2 * settings.train.batch_size,
    }


def _checked_transforms(settings: Config, cohort: Cohort) -> tuple:
    transforms = tuple(config_lib.plain(t) for t in settings.transforms)
    for block in transforms:
        if not block["target"].endswith(":RandomResizedCrop"):
            continue
        area = block.get("min_area", config_lib.resolve(block["target"]).min_area)
        if area < cohort.min_crop_area:
            raise InputError(
                f"transforms: RandomResizedCrop's min_area={area:g} may cut off the centre that "
                f"the labels of {cohort.name} are of; it must be {cohort.min_crop_area:.3g} or more"
            )
    return transforms


def _set_model(config, settings, cohort, start, method) -> None:
    total = sum(s.num_logits for s in cohort.label_sets)
    model = dict(start.contract["model"])
    is_vit = model["target"] == "vitjax.models.vit:vit"
    if method in ("freeze", "lora", *STEM_OF) and not is_vit:
        raise InputError(f"preset {method!r} needs a Vision Transformer, not {model['target']}")
    model |= {"num_classes": total, "head_bias": 0.0}
    if is_vit and method != "cnn":
        sizes = encode_inputs(cohort, settings.inputs)[1] if settings.inputs else ()
        model |= {"input_sizes": sizes, "drop_path_rate": settings.train.drop_path_rate}
        model |= {"frozen_blocks": 0, "distill_head": False}  # whatever the checkpoint's run had
    if method == "freeze":
        frozen, depth = (
            settings.train.frozen_blocks,
            dict(_made(model, config).description)["depth"],
        )
        model["frozen_blocks"] = depth // 2 if frozen is None else frozen
    if method == "lora":
        model["lora_rank"] = settings.train.lora_rank
        config.optimizer.freeze = (ALL_BUT_LORA,)
    model |= {"stem": STEM_OF[method]} if method in STEM_OF else {}
    if method == "cnn":
        flops = _made(model, config).flops_per_image
        model = cnn_of(flops, config.data.image_size, config.data.channels, total)
    config.model = model
    if method not in FROM_NOTHING:
        fresh = [r"head/.*"] if method != "lp_ft" else []
        if model.get("input_sizes"):
            fresh.append(r"inputs/.*")
        if method == "lora":
            fresh.append(r".*/lora_[ab]")
        config.init.checkpoint = start.checkpoint
        config.init.skip = tuple(fresh)
        config.init.drop = (r"head/.*", r"mask_token", r"distill_head/.*", r"inputs/.*")


def _made(model: Mapping[str, Any], config: Config) -> Model:
    return make_model(dict(model), make_preprocess(config), Precision())


def cnn_of(flops: int, image_size: int, channels: int, num_classes: int) -> dict[str, Any]:
    """The block of a ResNet (BiT's, with group norm) whose FLOPs are nearest.

    As many stages as the image has room for, two units each up to 64 pixels, three above; the width
    is what is chosen, in steps that the norms' groups divide.
    """
    stages = max(2, min(4, int(math.log2(max(image_size, 8) / 7))))
    units = 2 if image_size <= 64 else 3
    best: tuple[float, dict[str, Any]] | None = None
    for width in range(32, 2049, 32):
        block = {
            "target": "vitjax.models.bit:bit",
            "blocks": (units,) * stages,
            "widths": tuple(width * 2**i for i in range(stages)),
            "root_width": max(8, width // 4 // 8 * 8),
            "groups": 8,
            "num_classes": num_classes,
        }
        made = config_lib.build(block, image_size=image_size, channels=channels,
                                precision=Precision())  # fmt: skip
        distance = abs(math.log(made.flops_per_image / flops))
        if best is None or distance < best[0]:
            best = distance, block
    assert best is not None
    return best[1]


def _set_loss(config, settings, cohort: Cohort, rows: np.ndarray) -> None:
    if settings.imbalance not in IMBALANCE:
        raise InputError(f"imbalance: {suggest(str(settings.imbalance), IMBALANCE)}")
    sets = tuple(
        {"name": s.name, "kind": s.kind, "num_classes": len(s.classes)} for s in cohort.label_sets
    )
    priors, bias = _priors(cohort, rows)
    objective: dict[str, Any] = {
        "target": "vitjax.objectives.label_sets:LabelSets",
        "sets": sets,
        "label_smoothing": settings.label_smoothing,
        "head_bias": bias,
    }
    if settings.imbalance == "class_weights":
        objective["weights"] = _weights(cohort, priors)
    elif settings.imbalance == "logit_adjustment":
        objective |= {"priors": priors, "logit_adjustment": 1.0}
    elif settings.imbalance == "focal":
        objective["focal_gamma"] = settings.focal_gamma
    elif settings.imbalance == "balanced_sampling":
        config.data.sampling = "classes"
    config.objective = objective


def _priors(cohort: Cohort, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How often each logit's answer is yes in these rows, and where its bias starts."""
    priors, bias = [], []
    for s in cohort.label_sets:
        labels = np.asarray(cohort.labels[s.name], np.float64)[rows]
        if s.kind == "multi":
            found = [np.nanmean(c) if np.isfinite(c).any() else 0.5 for c in labels.T]
        elif s.kind == "single":
            known = labels[np.isfinite(labels)]
            found = [np.mean(known == i) if len(known) else 0.5 for i in range(len(s.classes))]
        else:
            known = labels[np.isfinite(labels)]
            found = [np.mean(known > i) if len(known) else 0.5 for i in range(s.num_logits)]
        found = np.clip(np.asarray(found, np.float64), 1e-3, 1 - 1e-3)
        priors += found.tolist()
        bias += [0.0] * len(found) if s.kind == "single" else np.log(found / (1 - found)).tolist()
    return tuple(priors), tuple(bias)


def _weights(cohort: Cohort, priors: tuple[float, ...]) -> tuple[float, ...]:
    """Inverse frequencies: of classes with mean one over the examples, of labels negatives for
    each positive."""
    found, start = [], 0
    for s in cohort.label_sets:
        part = np.asarray(priors[start : start + s.num_logits])
        start += s.num_logits
        found += (1 / part / len(part) if s.kind == "single" else (1 - part) / part).tolist()
    return tuple(found)


def _set_length(config, settings, num_rows: int) -> None:
    train = settings.train
    config.batch_size = min(train.batch_size, num_rows)
    steps = math.ceil(train.epochs * num_rows / config.batch_size)
    config.total_steps = int(min(max(steps, train.min_steps), train.max_steps))
    every = max(1, config.total_steps // train.evaluations)
    config.eval_every = config.checkpoint_every = every
    config.log_every = max(1, every // 2)
    config.checkpoint.update(metric=METRIC, keep_last=1, keep_best=1)
    config.early_stop.update(metric=METRIC, patience=train.patience)


def _set_optimizer(config, settings, method) -> None:
    train, optimizer = settings.train, config.optimizer
    optimizer.ema_decay = train.ema_decay
    optimizer.peak_lr = train.peak_lr[method]
    optimizer.schedule.warmup_steps = max(1, config.total_steps // 10)
    optimizer.weight_decay = train.weight_decay
    if method in ("full", "lp_ft", "freeze") and config.model.target.endswith(":vit"):
        optimizer.layer_decay = train.layer_decay
    if method == "bit_hyper":
        optimizer.algorithm = {"target": "vitjax.optim:scale_by_momentum", "momentum": 0.9}
        optimizer.peak_lr = train.peak_lr.bit_hyper * config.batch_size / 512
        optimizer.weight_decay = 0.0
        optimizer.schedule = {"target": "vitjax.schedules:bit_hyper"}


def check_fits(settings: Config, cohort: Cohort, start: Start) -> None:
    """Builds each preset's and floor's run, with nothing read or computed, so that what cannot
    work is said first."""
    if not 0 <= settings.train.noise <= 1:
        raise InputError(f"train.noise must be in 0 to 1, got {settings.train.noise}")
    low = settings.low_data.methods if settings.low_data.labelled else ()
    for method in dict.fromkeys((*settings.presets, *settings.floors, *low)):
        if is_trained(method):
            config = run_config(settings, cohort, start, method, settings.seeds[0])
            made = experiment.build(config)
            if config.init.checkpoint and base_of(method) != "lp_ft":  # whose head is made first
                warm_start.check_init(made, tell=False)
