"""Which runs a sweep asks for, each by its shape, length, learning rate and seed."""

import dataclasses
import math

from vitjax.errors import InputError
from vitjax.sweep.config import Sweep
from vitjax.sweep.shapes import Ladder, Size


@dataclasses.dataclass(frozen=True)
class Draft:
    """One run before it has a number and a trunk.

    Attributes:
      pool: images that it draws from; less than the whole set for repeated data.
    """

    stage: str
    kind: str
    arm: str
    size: Size
    batch: int
    steps: int
    lr: float
    seed: int
    pool: int
    budget: float | None = None

    @property
    def trunk_key(self) -> tuple:
        """Runs that differ in length alone share a trunk; fit and hold-out never do."""
        return (self.stage, self.arm, self.size, self.batch, self.lr, self.seed, self.pool)


def guess(sweep: Sweep, flops: float) -> float:
    """The compute-optimal number of parameters, as guessed so far."""
    g = sweep.isoflop.guess
    return g.params * (flops / g.flops) ** g.exponent


def learning_rate(sweep: Sweep, num_params: int) -> float:
    """peak * (params / N) ** exponent, to six digits, so that equal rates are equal."""
    rule = sweep.lr
    return float(f"{rule.peak * (rule.params / num_params) ** rule.exponent:.6g}")


def batch_size(sweep: Sweep, flops: float | None) -> int:
    """The batch of a run of so many FLOPs; of one whose length is given in images, batch.size."""
    rule = sweep.batch
    if not rule.exponent or flops is None:
        return rule.size
    return 2 ** max(0, round(math.log2(rule.size * (flops / rule.flops) ** rule.exponent)))


def warmup_steps(sweep: Sweep, batch: int) -> int:
    return -(-sweep.trunks.warmup_images // batch)


def cooldown_steps(sweep: Sweep, steps: int) -> int:
    return max(1, round(sweep.trunks.cooldown_fraction * steps))


def least_steps(sweep: Sweep, batch: int) -> int:
    """The shortest run that warms up wholly before it cools down."""
    steps = max(2, warmup_steps(sweep, batch) + 1)
    while steps - cooldown_steps(sweep, steps) < max(1, warmup_steps(sweep, batch)):
        steps += 1
    return steps


class Drafter:
    """Lists the runs of a sweep for given budgets.

    Raises:
      InputError: from any method, for a run that is not legal; names it and what is.
    """

    def __init__(self, sweep: Sweep, ladder: Ladder):
        self.sweep, self.ladder = sweep, ladder

    def steps_for(self, size: Size, flops: float, batch: int) -> int:
        return round(flops / (size.train_flops * batch))

    def legal(self, flops: float) -> list[Size]:
        """The sizes that a budget can train.

        Raises:
          InputError: it is below the smallest legal run.
        """
        batch, most = batch_size(self.sweep, flops), self.sweep.isoflop.max_epochs
        least, smallest = least_steps(self.sweep, batch), self.ladder.sizes[0]
        need = least * batch * smallest.train_flops
        if self.steps_for(smallest, flops, batch) < least:
            raise InputError(
                f"a budget of {flops:.4g} training FLOPs is below the smallest legal run, "
                f"{need:.4g}: {smallest.num_params:,} parameters (width {smallest.shape.width}, "
                f"depth {smallest.shape.depth}), {least} steps of {batch} images"
            )
        found = []
        for size in self.ladder.sizes:
            steps = self.steps_for(size, flops, batch)
            epochs = steps * batch / self.sweep.num_images
            if steps >= least and (most is None or epochs <= most):
                found.append(size)
        return found

    def sizes(self, flops: float, count: int, spread: float) -> list[Size]:
        """Distinct legal sizes around the guess.

        Raises:
          InputError: there are fewer.
        """
        legal = self.legal(flops)
        if len(legal) < count:
            most = self.sweep.isoflop.max_epochs
            epochs = "" if most is None else f" with at most {most} epochs"
            raise InputError(
                f"a budget of {flops:.4g} training FLOPs can train {len(legal)} of the "
                f"{len(self.ladder.sizes)} sizes of `shapes`{epochs}, but {count} are asked for: "
                "raise the budget, allow smaller shapes, or lower trunks.warmup_images"
            )
        return self.ladder.spread(guess(self.sweep, flops), spread, count, legal)

    def draft(
        self, kind: str, size: Size, *, flops: float | None = None, images: int = 0, seed: int,
        stage: str = "fit", arm: str = "main", lr_factor: float = 1.0, pool: int = 0,
    ) -> Draft:  # fmt: skip
        """One run, its length given in FLOPs or in images."""
        sweep, batch = self.sweep, batch_size(self.sweep, flops)
        steps = self.steps_for(size, flops, batch) if flops else round(images / batch)
        least = least_steps(sweep, batch)
        if steps < least:
            raise InputError(
                f"the {kind} run of {size.num_params:,} parameters would have {steps} steps of "
                f"{batch} images; the shortest legal run has {least} (trunks.warmup_images="
                f"{sweep.trunks.warmup_images}, cooldown {sweep.trunks.cooldown_fraction:g})"
            )
        lr = learning_rate(sweep, size.num_params)
        if lr_factor != 1:
            lr = float(f"{lr * lr_factor:.6g}")
        pool = pool or sweep.num_images
        return Draft(stage, kind, arm, size, batch, steps, lr, seed, pool, flops)

    def isoflop(self, budgets: tuple[float, ...]) -> list[Draft]:
        """Every size of every budget, with every seed; more seeds near the guess; the arms."""
        sweep, found = self.sweep, []
        for flops in budgets:
            sizes = self.sizes(flops, sweep.isoflop.sizes, sweep.isoflop.spread)
            for seed in sweep.seeds.every:
                found += [self.draft("isoflop", s, flops=flops, seed=seed) for s in sizes]
            centre = self.ladder.nearest(guess(sweep, flops), sizes)
            found += [
                self.draft("seed", centre, flops=flops, seed=seed) for seed in sweep.seeds.extra
            ]
        seed = sweep.seeds.every[0]
        for name, arm in sweep.arms.items():
            count, factor = arm["sizes"] or sweep.isoflop.sizes, arm["lr_factor"]
            for flops in budgets:
                found += [
                    self.draft("isoflop", s, flops=flops, seed=seed, arm=name, lr_factor=factor)
                    for s in self.sizes(flops, count, sweep.isoflop.spread)
                ]
        return found

    def lr_check(self, budgets: tuple[float, ...]) -> list[Draft]:
        """The learning rate times each factor, at the isoFLOP runs nearest to each size."""
        sweep, found = self.sweep, []
        for wanted in sweep.lr.check_params if budgets else ():
            flops = min(budgets, key=lambda c: abs(math.log(guess(sweep, c) / wanted)))
            sizes = self.sizes(flops, sweep.isoflop.sizes, sweep.isoflop.spread)
            size, seed = self.ladder.nearest(wanted, sizes), sweep.seeds.every[0]
            found += [
                self.draft("lr", size, flops=flops, seed=seed, lr_factor=float(factor))
                for factor in sweep.lr.check_factors
            ]
        return found

    def star(self) -> list[Draft]:
        """The centre, and one dimension at a time changed, for every duration."""
        block, found = self.sweep.star, []
        if not block.centre:
            return []
        if not block.images:
            raise InputError("star.centre needs star.images: how many images each shape sees")
        width, depth, mlp_dim = block.centre
        shapes = [(width, depth, mlp_dim)]
        shapes += [(w, depth, mlp_dim) for w in block.widths]
        shapes += [(width, d, mlp_dim) for d in block.depths]
        shapes += [(width, depth, m) for m in block.mlp_dims]
        for shape in dict.fromkeys(shapes):
            size = self.ladder.make(*shape)
            for seed in self.sweep.seeds.every:
                found += [
                    self.draft("star", size, images=images, seed=seed) for images in block.images
                ]
        return found

    def data(self) -> list[Draft]:
        """One shape over data sizes, each image seen once, and over repeats of fewer images."""
        sweep, block = self.sweep, self.sweep.data
        if not block.images:
            if block.repeats:
                raise InputError("data.repeats needs data.images, the largest of which is repeated")
            return []
        if not block.params:
            raise InputError("data.images needs data.params, the size of the model")
        if max(block.images) > sweep.num_images:
            raise InputError(
                f"data.images are seen once each, but {max(block.images)} is more than "
                f"num_images={sweep.num_images}"
            )
        if any(not repeats > 1 for repeats in block.repeats):
            raise InputError(f"data.repeats must each be above 1, got {block.repeats}")
        size, seed = self.ladder.nearest(block.params), sweep.seeds.every[0]
        found = [self.draft("data", size, images=n, seed=seed) for n in block.images]
        most = max(block.images)
        found += [
            self.draft("data", size, images=most, seed=seed, pool=max(1, round(most / repeats)))
            for repeats in block.repeats
        ]
        return found

    def holdout(self, largest: float) -> list[Draft]:
        """Runs beyond the largest fitted one, around the guess there."""
        block, found = self.sweep.holdout, []
        for factor in block.factors:
            flops = factor * largest
            for size in self.sizes(flops, block.sizes, block.spread):
                found += [
                    self.draft("holdout", size, flops=flops, seed=seed, stage="holdout")
                    for seed in block.seeds
                ]
        return found

    def all(self, budgets: tuple[float, ...]) -> list[Draft]:
        """Every run, each once: what two questions ask alike is trained for both."""
        found = self.isoflop(budgets) + self.lr_check(budgets) + self.star() + self.data()
        if not found:
            raise InputError(
                "the sweep has no runs: give budget.flops, isoflop.budgets, star.centre or "
                "data.images"
            )
        largest = max(d.budget or d.steps * d.batch * d.size.train_flops for d in found)
        once: dict[tuple, Draft] = {}
        for run in found + self.holdout(largest):
            once.setdefault((run.trunk_key, run.steps), run)
        return list(once.values())
