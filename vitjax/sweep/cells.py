"""One cell of a sweep: the facts of a run, and the training config that carries it out."""

import copy
import dataclasses
from typing import Any

from vitjax import config as config_lib
from vitjax.config import Config

STAGES = ("fit", "holdout")
KINDS = ("isoflop", "star", "data", "lr", "seed", "holdout")
PREEMPTED = 75  # the exit status of a process that was told to end and has saved its cell
SUBSET_SEED = NOISE_SEED = 0  # every run of a sweep sees the same subsets and the same wrong labels


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      number: from 1, in the order of the plan.
      id: the name of its run directory.
      stage: "fit", or "holdout" for runs that are trained once the prediction is frozen.
      kind: which question it answers, one of KINDS.
      arm: "main", or the recipe's name.
      trunk: id of the cell that this one branches off; its own if it runs from the start.
      group: number from 0 of the trunk with all its branches.
      budget: the nominal training FLOPs of an isoFLOP or hold-out run.
      branch_step: the step that it starts from, 0 for a trunk.
      unique_images: different images seen, and `epochs` how often on average.
      flops_per_image: forward, 2 x MAC.
      flops: of training, as if the run stood alone.
      flops_paid: of training that is really done: of a branch its cooldown alone.
      memory_gib: a device's, `hours` of what is paid, `fits`; None without a target.
    """

    number: int
    id: str
    stage: str
    kind: str
    arm: str
    trunk: str
    group: int
    seed: int
    budget: float | None
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int
    num_params: int
    num_body_params: int
    batch_size: int
    steps: int
    warmup_steps: int
    cooldown_steps: int
    branch_step: int
    images: int
    unique_images: int
    epochs: float
    flops_per_image: int
    flops: float
    flops_paid: float
    learning_rate: float
    label_noise: float
    memory_gib: float | None = None
    hours: float | None = None
    fits: bool | None = None

    @property
    def is_branch(self) -> bool:
        return self.trunk != self.id


FIELDS = tuple(field.name for field in dataclasses.fields(Cell))


def _noisy(source: Any, fraction: float) -> dict[str, Any]:
    target = "vitjax.data.sources.noise:NoisyLabels"
    return {"target": target, "source": source, "fraction": fraction, "seed": NOISE_SEED}


def training_config(sweep: Any, cell: Cell, branch_steps: tuple[int, ...] = ()) -> Config:
    """The config of a cell's run.

    Args:
      sweep: plain values, as plan.json holds them.
      branch_steps: where other cells branch off this one.
    """
    plain = copy.deepcopy(config_lib.plain(sweep["train"]))
    source = plain["data"]["source"]
    if cell.unique_images < min(cell.images, sweep["num_images"]):
        source = {
            "target": "vitjax.data.sources.subset:Subset",
            "source": source,
            "num_examples": cell.unique_images,
            "seed": SUBSET_SEED,
        }
    if cell.label_noise:
        # On the test sets too: only against the same noise is the floor of the loss known.
        source = _noisy(source, cell.label_noise)
        for block in plain["evals"].values():
            block["source"] = _noisy(block["source"], cell.label_noise)
    plain["data"]["source"] = source
    config = config_lib.from_plain(plain)
    if cell.arm != "main":
        config_lib.override(config, sweep["arms"][cell.arm]["config"], flag="sweep.arms")
    config.update(seed=cell.seed, total_steps=cell.steps, batch_size=cell.batch_size)
    config.model.update(shape=None, width=cell.width, depth=cell.depth)
    config.model.update(mlp_dim=cell.mlp_dim, num_heads=cell.num_heads)
    config.optimizer.peak_lr = cell.learning_rate
    config.optimizer.schedule = {
        "target": "vitjax.schedules:warmup_stable_decay",
        "warmup_steps": cell.warmup_steps,
        "cooldown_steps": cell.cooldown_steps,
    }
    config.checkpoint.update(keep_last=1, preempt_exit_code=PREEMPTED)
    config.checkpoint.at_steps = tuple(sorted(branch_steps))
    config.lock()
    return config


def branch_steps(cells: list[Cell], trunk: Cell) -> tuple[int, ...]:
    """The steps at which other cells branch off a trunk."""
    return tuple(sorted({c.branch_step for c in cells if c.is_branch and c.trunk == trunk.id}))
