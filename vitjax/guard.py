"""What happens when the loss stops being a number, or jumps.

The device judges every step, so that a bad update can be left out before it is made; the loop
acts on the verdict, which comes with the step's metrics.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vitjax.errors import InputError, suggest

POLICIES = ("stop", "skip", "rollback")
KINDS = ("", "non_finite", "spike")  # by the number that a step reports
MEMORY = 100  # steps over which the running mean of the loss forgets
PyTree = Any


def fresh_health() -> dict[str, Array]:
    """The running mean of good losses, how many there were, and how many updates were left out."""
    return {
        "mean": jnp.zeros((), jnp.float32),
        "count": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


@dataclasses.dataclass(frozen=True)
class Guard:
    """Judges a step by its loss and gradient.

    Attributes:
      policy: "stop"; "skip": leave the update out, the step counts as seen; "rollback": go back to
        the last good checkpoint and pass over the batches since.
      spike_factor: a loss above so many times its running mean (over about a hundred good steps,
        and never within the first hundred) is a fault too; None: only what is no number is.
      max_faults: with more than these in one launch the run stops.

    Source: skipping, and rewinding past the batches around a spike, as in PaLM (Chowdhery et al.
    2022, arXiv 2204.02311, section 5.1).
    """

    policy: str = "stop"
    spike_factor: float | None = None
    max_faults: int = 10

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise InputError(
                f"unknown faults.policy {self.policy!r}; {suggest(self.policy, POLICIES)}"
            )
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(
                f"faults.spike_factor must be above 1, or None, got {self.spike_factor}"
            )
        if self.max_faults < 0:
            raise InputError(f"faults.max_faults must be 0 or more, got {self.max_faults}")

    def __call__(
        self, health: dict[str, Array], loss: Float[Array, ""], grad_norm: Float[Array, ""]
    ) -> tuple[dict[str, Array], Int[Array, ""]]:
        """The health after this step, and the kind of its fault (see KINDS)."""
        loss = loss.astype(jnp.float32)
        is_number = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        fault = jnp.where(is_number, 0, 1)
        if self.spike_factor is not None:
            is_spike = (health["count"] >= MEMORY) & (loss > self.spike_factor * health["mean"])
            fault = jnp.where(is_number & is_spike, 2, fault)
        is_good = fault == 0
        count = health["count"] + is_good
        weight = 1.0 / jnp.clip(count, 1, MEMORY).astype(jnp.float32)
        mean = jnp.where(is_good, health["mean"] + (loss - health["mean"]) * weight, health["mean"])
        skipped = health["skipped"]
        if self.policy == "skip":
            skipped = skipped + jnp.where(is_good, 0, 1)
        return {"mean": mean, "count": count, "skipped": skipped}, fault

    def settle(self, fault: Int[Array, ""], new: PyTree, old: PyTree) -> PyTree:
        """The state after the step: with the policy "skip" a bad one changes nothing but the count
        of steps and the health."""
        if self.policy != "skip":
            return new
        kept = jax.tree.map(lambda n, o: jnp.where(fault == 0, n, o), new, old)
        return dataclasses.replace(kept, step=new.step, health=new.health)
