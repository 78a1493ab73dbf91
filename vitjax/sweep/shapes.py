"""Legal shapes around a size, with the exact parameters and FLOPs of the model they make."""

import copy
import dataclasses
import math
from typing import Any

import jax

from vitjax import config as config_lib
from vitjax import experiment
from vitjax.errors import InputError
from vitjax.models.shapes import Shape
from vitjax.planning.search import divisors
from vitjax.precision import Precision
from vitjax.sweep.config import Sweep


@dataclasses.dataclass(frozen=True)
class Size:
    """A shape, and what the model of the sweep's training config costs in it.

    Attributes:
      num_params: all of them; num_body_params: of the blocks alone.
      forward_flops: of one image, 2 x MAC.
      train_flops: of one image, forward and backward, as the objective counts them.
    """

    shape: Shape
    num_params: int
    num_body_params: int
    forward_flops: int
    train_flops: int


def nearest_heads(width: int, head_dim: int) -> int:
    """The number of heads that divides the width and comes closest to a head's wanted width."""
    wanted = max(width / head_dim, 1.0)
    return min(divisors(width), key=lambda n: (abs(math.log(n / wanted)), n))


def make_shape(width: int, depth: int, mlp_dim: int, head_dim: int) -> Shape:
    """A shape with as many heads as suit its width."""
    return Shape(width, depth, mlp_dim, nearest_heads(width, head_dim))


class Ladder:
    """The legal shapes of a sweep, one a width, from small to large.

    Attributes:
      sizes: by rising number of parameters.

    Raises:
      InputError: the rules of `shapes` allow no shape, or one that the model refuses.
    """

    def __init__(self, sweep: Sweep):
        self._train = sweep.train
        self._preprocess = experiment.make_preprocess(sweep.train)
        self._known: dict[Shape, Size] = {}
        rules = sweep.shapes
        low, high = rules.widths
        step = rules.width_multiple
        widths = range(-(-low // step) * step, high + 1, step)
        if not widths or low < 1 or not rules.depths or min(rules.depths) < 1:
            raise InputError(
                f"shapes allow no shape: widths {rules.widths} in multiples of {step}, "
                f"depths {rules.depths}"
            )
        self._head_dim = rules.head_dim
        shapes = []
        for width in widths:
            wanted = width / rules.width_per_depth
            depth = min(rules.depths, key=lambda d: (abs(math.log(d / wanted)), d))
            shapes.append(make_shape(width, depth, round(width * rules.mlp_ratio), rules.head_dim))
        self.sizes = sorted(map(self.measure, shapes), key=lambda size: size.num_params)

    def make(self, width: int, depth: int, mlp_dim: int) -> Size:
        """The size of three given numbers."""
        return self.measure(make_shape(width, depth, mlp_dim, self._head_dim))

    def measure(self, shape: Shape) -> Size:
        """Builds the model's description, with nothing computed and no data touched."""
        if shape not in self._known:
            block = copy.deepcopy(config_lib.plain(self._train.model))
            block |= {"shape": None, **dataclasses.asdict(shape)}
            if not block.get("patch_size"):
                raise InputError("a sweep's train.model needs patch_size, and no shape")
            model = experiment.make_model(block, self._preprocess, Precision())
            objective: Any = config_lib.build(self._train.objective, model=model)
            body = model.abstract_params["blocks"]
            self._known[shape] = Size(
                shape,
                model.num_params,
                sum(leaf.size for leaf in jax.tree.leaves(body)),
                model.flops_per_image,
                objective.flops_per_image,
            )
        return self._known[shape]

    def nearest(self, num_params: float, among: list[Size] | None = None) -> Size:
        """The size whose parameters are closest, in ratio."""
        among = self.sizes if among is None else among
        return min(among, key=lambda size: abs(math.log(size.num_params / num_params)))

    def spread(self, centre: float, spread: float, count: int, legal: list[Size]) -> list[Size]:
        """Distinct sizes, geometrically from centre / spread to centre * spread, small to large.

        Each is the legal one closest to its place that is not taken yet, the middle first.
        """
        places = [
            centre * spread ** (2 * i / (count - 1) - 1 if count > 1 else 0.0) for i in range(count)
        ]
        free, chosen = list(legal), []
        for place in sorted(places, key=lambda place: abs(math.log(place / centre))):
            if free:
                chosen.append(self.nearest(place, free))
                free.remove(chosen[-1])
        return sorted(chosen, key=lambda size: size.num_params)
