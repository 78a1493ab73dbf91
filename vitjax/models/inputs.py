"""Tokens of what is known beside the image: age, sex, site."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.errors import InputError
from vitjax.precision import Precision


class InputTokens(nnx.Module):
    """One token for each variable: a linear map of its numbers, or a learned one where unknown.

    A number variable has size 1; a category is as many numbers as it has values, of 0 and 1. A
    variable is unknown where any of its numbers is NaN.

    Args:
      sizes: numbers of each variable.
      width: of a token.
    """

    def __init__(self, sizes: Sequence[int], width: int, *, precision: Precision, rngs: nnx.Rngs):
        drawn = jax.random.normal(rngs.params(), (sum(sizes), width), precision.params)
        self.kernel = nnx.Param(0.02 * drawn)
        self.bias = nnx.Param(jnp.zeros((len(sizes), width), precision.params))
        self.missing = nnx.Param(jnp.zeros((len(sizes), width), precision.params))
        self.sizes, self.precision = tuple(sizes), precision

    def __call__(
        self, inputs: Float[Array, "B M"] | None, batch_size: int
    ) -> Float[Array, "B V D"]:
        """Without inputs everything is unknown."""
        p = self.precision
        missing = p.compute_cast(self.missing[...])
        if inputs is None:
            return jnp.broadcast_to(missing[None], (batch_size, *missing.shape))
        if inputs.shape[-1] != sum(self.sizes):
            raise InputError(f"inputs {inputs.shape} do not fit model.input_sizes={self.sizes}")
        tokens, start = [], 0
        for variable, size in enumerate(self.sizes):
            values = inputs[:, start : start + size]
            known = jnp.isfinite(values).all(-1, keepdims=True)
            values = p.compute_cast(jnp.where(jnp.isfinite(values), values, 0.0))
            kernel = p.compute_cast(self.kernel[start : start + size])
            token = values @ kernel + p.compute_cast(self.bias[variable])[None]
            tokens.append(jnp.where(known, token, missing[variable][None]))
            start += size
        return jnp.stack(tokens, 1)
