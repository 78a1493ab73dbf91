"""An objective whose loss goes wrong where the labels say so."""

import dataclasses

import jax.numpy as jnp

from vitjax.objectives.supervised import Supervised

NAN, SPIKE = 1000, 1001  # labels that no class has


@dataclasses.dataclass(frozen=True)
class Poisoned(Supervised):
    def loss(self, params, extra, batch, key):
        value, rest = super().loss(params, extra, batch, key)
        factor = jnp.where((batch["labels"] == NAN).any(), jnp.nan, 1.0)
        factor = jnp.where((batch["labels"] == SPIKE).any(), 20.0, factor)
        return value * factor, rest
