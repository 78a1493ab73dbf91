"""The precision policy: which type is used where."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vitjax.errors import InputError, suggest

DTYPES = ("float32", "bfloat16")
PRODUCTS = ("compute", "fp8")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which type is used where.

    Attributes:
      params: of the parameters (and of their moving average).
      compute: of matrix products and of the parameters that devices gather for them.
      gradients: of the kernels' gradients as devices add them up.
      optimizer: of the optimizer's state; "float32" leaves it as the algorithm has it.
      products: of the blocks' dense layers: "compute", or "fp8" (see `vitjax.models.fp8`).

    Norms, softmax and losses are always float32.
    """

    params: str = "float32"
    compute: str = "float32"
    gradients: str = "float32"
    optimizer: str = "float32"
    products: str = "compute"

    def compute_cast(self, x: Array) -> Array:
        """To the type of matrix products."""
        return x.astype(self.compute)

    def full_cast(self, x: Array) -> Array:
        """To float32."""
        return x.astype(jnp.float32)


def make_precision(
    params: str = "float32",
    compute: str = "auto",
    gradients: str = "auto",
    optimizer: str = "float32",
    products: str = "compute",
) -> Precision:
    """The policy; `compute="auto"` is bfloat16 on accelerators and float32 on CPUs, and
    `gradients="auto"` is what compute is."""
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    gradients = compute if gradients == "auto" else gradients
    types = {"params": params, "compute": compute, "gradients": gradients, "optimizer": optimizer}
    for name, value in types.items():
        if value not in DTYPES:
            raise InputError(f"unknown precision.{name} {value!r}; {suggest(value, DTYPES)}")
    if (compute, gradients) == ("float32", "bfloat16"):
        raise InputError(
            "precision.gradients cannot be bfloat16 where precision.compute is float32"
        )
    if products not in PRODUCTS:
        raise InputError(f"unknown precision.products {products!r}; {suggest(products, PRODUCTS)}")
    return Precision(**types, products=products)
