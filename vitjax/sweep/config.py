"""A sweep's config: what is varied around one training config, and what may be spent."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitjax import config as config_lib
from vitjax.config import Config
from vitjax.errors import InputError, suggest

Sweep = Any  # an ml_collections.ConfigDict with the keys of `base_sweep`

# Keys of the training config that the sweep sets for each run.
SET_BY_SWEEP = (
    "seed", "total_steps", "batch_size", "model.shape", "model.width", "model.depth",
    "model.mlp_dim", "model.num_heads", "optimizer.peak_lr", "optimizer.schedule", "data.source",
    "checkpoint.keep_last", "checkpoint.at_steps",
)  # fmt: skip

# An arm is another recipe, run at the isoFLOP budgets beside the main one.
ARM: dict[str, Any] = {
    "label_noise": 0.0,  # this share of labels is redrawn over all classes, training and test
    "sizes": None,  # sizes per budget; None: as isoflop.sizes
    "lr_factor": 1.0,  # times the learning rate of the rule
    "config": (),  # overrides of the training config, such as "optimizer.weight_decay=0.1"
}


def base_sweep(train: Config) -> Sweep:
    """Every key that a sweep has, with its default; sweeps assign from here.

    Args:
      train: the training config of every run; shape, batch, steps, learning rate, schedule, seed
        are set by the sweep.

    FLOPs are of training: 3 x forward, 2 x MAC, with patch embedding, attention and head.
    Parameters are all of a model's, with embedding and head.
    """
    return ConfigDict(
        {
            "train": train,
            "num_images": 0,  # of the training set; must be set
            "budget": {
                "flops": None,  # of the whole sweep, hold-out included; or give hours
                "hours": None,  # of the whole target, busy with training steps alone
                "target": None,  # such as "gpu:h100:1x1x8": memory and hours of each cell
                "flops_per_second": None,  # of the whole target, as measured in training
            },
            "shapes": {
                "widths": (64, 1024),  # smallest and largest
                "width_multiple": 64,
                "depths": (2, 3, 4, 6, 8, 10, 12, 16, 20, 24),  # the one nearest to the rule:
                "width_per_depth": 40.0,
                "mlp_ratio": 4.0,
                "head_dim": 64,  # as near as whole heads allow
            },
            "isoflop": {
                "budgets": None,  # FLOPs of a run, each at least 3 times the one before; or
                "count": 4,  # this many below what the whole budget allows,
                "ratio": 4.0,  # this far apart
                "sizes": 5,  # per budget, at least 5
                "spread": 4.0,  # from guess / spread to guess * spread, geometrically
                "guess": {  # params * (FLOPs / flops) ** exponent: the optimum as guessed so far
                    "params": 1e7,
                    "flops": 1e18,
                    "exponent": 0.5,
                },
                "max_epochs": None,  # leaves out sizes that see the data more often
            },
            "star": {  # one dimension varied at a time around a centre (arXiv 2305.13035)
                "centre": None,  # (width, depth, mlp_dim)
                "widths": (),
                "depths": (),
                "mlp_dims": (),
                "images": (),  # seen by each shape: durations, cooled down from one trunk
            },
            "data": {  # at one shape
                "params": None,  # its size
                "images": (),  # data sizes: so many images, each seen once
                "repeats": (),  # the largest of `images` seen again, from 1 / repeats of them
            },
            "lr": {  # peak * (params / N) ** exponent
                "peak": 1e-3,
                "params": 1e7,
                "exponent": 0.25,
                "check_factors": (),  # such as (0.5, 1.0, 2.0), to check the rule
                "check_params": (),  # at the isoFLOP runs nearest to these sizes and to the guess
            },
            "batch": {  # size * (FLOPs of the run / flops) ** exponent, to a power of two
                "size": 128,
                "flops": None,
                "exponent": 0.0,  # 0: the same for all, so that budgets can share trunks
            },
            "seeds": {
                "every": (0,),  # of every run
                "extra": (),  # more, for the size nearest to the guess at each budget: the noise
            },
            "holdout": {  # larger runs, trained after the prediction is frozen
                "factors": (4.0, 10.0),  # times the largest fitted budget
                "sizes": 1,
                "spread": 2.0,
                "seeds": (0,),
                "share": 0.2,  # of all FLOPs; the plan says so if it takes more, or less than 10%
            },
            "trunks": {
                "cooldown_fraction": 0.2,  # of a run's steps (arXiv 2405.18392)
                "warmup_images": 0,
            },
            "arms": {},  # name: `arm(...)`
        }
    )


def arm(**changes: Any) -> dict[str, Any]:
    """One arm, by the keys of ARM.

    Raises:
      InputError: an unknown key.
    """
    for key in changes:
        if key not in ARM:
            raise InputError(f"an arm has no key {key!r}; {suggest(key, ARM)}")
    return ARM | changes


def load_sweep(name: str, assignments: Iterable[str] = ()) -> Sweep:
    """Runs `get_sweep()` of a file, or of a shipped sweep by its name, and checks the numbers.

    Args:
      name: a path, or a name such as "scaling/digits".
      assignments: "isoflop.sizes=7" and the like.

    Raises:
      InputError: no such sweep or key, or a number that cannot work.
    """
    shipped = Path(name).stem
    if (
        not Path(name).is_file()
        and (config_lib.config_folder() / f"scaling/{shipped}.py").is_file()
    ):
        name = f"scaling/{shipped}"
    sweep = config_lib.load_config(name, "get_sweep")
    config_lib.override(sweep, assignments, flag="sweep")
    check(sweep)
    return sweep


def check(sweep: Sweep) -> None:
    """Raises InputError at the first number that cannot work."""
    known = config_lib.plain(base_sweep(config_lib.base_config()))
    for key in sweep:
        if key not in known:
            raise InputError(f"unknown sweep key {key!r}; {suggest(key, known)}")
    for name, block in sweep.arms.items():
        if not isinstance(block, ConfigDict | Mapping) or set(block) != set(ARM):
            raise InputError(f"arms.{name} must be made by vitjax.sweep.config.arm(...)")
        if name == "main" or not name.isidentifier():
            raise InputError(f"arm {name!r}: choose another name of letters, digits and _")
        _check_arm(f"arms.{name}", block, sweep.train)
    if sweep.num_images < 1:
        raise InputError(
            f"num_images must be the number of training images, got {sweep.num_images}"
        )
    iso = sweep.isoflop
    if not iso.ratio >= 3:
        raise InputError(f"isoflop.ratio must be at least 3, got {iso.ratio}")
    budgets = iso.budgets or ()
    for low, high in itertools.pairwise(budgets):
        if not high >= 3 * low * (1 - 1e-9):
            raise InputError(
                f"isoflop.budgets must rise by a factor of at least 3, got {low:g} and {high:g}"
            )
    for name, block in [("isoflop", iso), *((f"arms.{n}", b) for n, b in sweep.arms.items())]:
        if block["sizes"] is not None and block["sizes"] < 5 and (name == "isoflop"):
            raise InputError(f"{name}.sizes must be at least 5, got {block['sizes']}")
        if block["sizes"] is not None and block["sizes"] < 1:
            raise InputError(f"{name}.sizes must be at least 1, got {block['sizes']}")
    positive = {
        "isoflop.count": iso.count, "isoflop.spread": iso.spread - 1,
        "isoflop.guess.params": iso.guess.params, "isoflop.guess.flops": iso.guess.flops,
        "lr.peak": sweep.lr.peak, "lr.params": sweep.lr.params, "batch.size": sweep.batch.size,
        "shapes.width_multiple": sweep.shapes.width_multiple,
        "shapes.head_dim": sweep.shapes.head_dim, "shapes.mlp_ratio": sweep.shapes.mlp_ratio,
        "shapes.width_per_depth": sweep.shapes.width_per_depth,
        "holdout.sizes": sweep.holdout.sizes, "holdout.spread": sweep.holdout.spread,
    }  # fmt: skip
    for key, value in positive.items():
        if not value > 0:
            least = "above 1" if key == "isoflop.spread" else "positive"
            shown = iso.spread if key == "isoflop.spread" else value
            raise InputError(f"{key} must be {least}, got {shown}")
    if not 0 < sweep.trunks.cooldown_fraction < 1:
        raise InputError(
            f"trunks.cooldown_fraction must be in (0, 1), got {sweep.trunks.cooldown_fraction}"
        )
    if any(not factor >= 3 for factor in sweep.holdout.factors):
        raise InputError(
            f"holdout.factors must each be at least 3 (4 to 10 are usual), "
            f"got {sweep.holdout.factors}"
        )
    if sweep.batch.exponent and not sweep.batch.flops:
        raise InputError("batch.exponent needs batch.flops, at which the batch is batch.size")
    if not sweep.seeds.every:
        raise InputError("seeds.every must hold at least one seed")


def _check_arm(name: str, block: Any, train: Config) -> None:
    if not 0 <= block["label_noise"] <= 1:
        raise InputError(f"{name}.label_noise must be in [0, 1], got {block['label_noise']}")
    if not block["lr_factor"] > 0:
        raise InputError(f"{name}.lr_factor must be positive, got {block['lr_factor']}")
    for assignment in block["config"]:
        key = assignment.partition("=")[0]
        if key.startswith(SET_BY_SWEEP):
            raise InputError(
                f"{name}.config sets {key}, which the sweep sets itself for each run "
                f"(so it does {', '.join(SET_BY_SWEEP)})"
            )
    config_lib.override(copy.deepcopy(train), block["config"], flag=f"{name}.config")


def total_flops(sweep: Sweep) -> tuple[float | None, str]:
    """What the whole sweep may spend, None if nothing was said, and how it came out.

    Raises:
      InputError: both FLOPs and hours, or hours without a measured rate.
    """
    budget = sweep.budget
    if budget.flops is not None and budget.hours is not None:
        raise InputError("give budget.flops or budget.hours, not both")
    if budget.flops is not None:
        if not budget.flops > 0:
            raise InputError(f"budget.flops must be positive, got {budget.flops}")
        return float(budget.flops), f"budget: {budget.flops:.3g} training FLOPs"
    if budget.hours is None:
        return None, "budget: as the cells need"
    if not budget.flops_per_second or not budget.hours > 0:
        raise InputError(
            "budget.hours must be positive and needs budget.flops_per_second, the training FLOP/s "
            "of the whole target as measured: 3 x model GFLOP an image x perf/images_per_second "
            f"of a short run; got {budget.hours} hours and {budget.flops_per_second}"
        )
    flops = budget.hours * 3600 * budget.flops_per_second
    where = f" on {budget.target}" if budget.target else ""
    return flops, (
        f"budget: {budget.hours:g} hours{where} x {budget.flops_per_second:.3g} FLOP/s as measured "
        f"= {flops:.3g} training FLOPs; starts, compiling and evaluation come on top"
    )
