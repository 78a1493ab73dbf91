"""The layers of a Vision Transformer.

Array letters: B batch, N tokens, D width, H heads, K head width, F MLP width.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vitjax.models import fp8
from vitjax.models.attention import KERNELS, attend, displaced
from vitjax.models.norms import LayerNorm
from vitjax.models.positions import rotate
from vitjax.parallel import constrain, platform, splits_layers
from vitjax.precision import Precision

# Rank and scale of the low-rank update of each layer of a block that has one.
Lora = Mapping[str, tuple[int, float]]
ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def _contract(x: Array, y: Array, x_dims: Sequence[int], y_dims: Sequence[int], **kwargs) -> Array:
    return jax.lax.dot_general(x, y, ((tuple(x_dims), tuple(y_dims)), ((), ())), **kwargs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(rows: Array, kernel: Array, num_in: int, precision: Precision) -> Array:
    return _contract(rows, precision.compute_cast(kernel), range(1, 1 + num_in), range(num_in))


def _product_forward(rows, kernel, num_in, precision):
    return _product(rows, kernel, num_in, precision), (rows, kernel)


def _product_backward(num_in, precision, saved, grad):
    rows, kernel = saved
    out = range(1, grad.ndim)
    d_rows = _contract(grad, precision.compute_cast(kernel), out, range(num_in, kernel.ndim))
    if platform() == "cpu":  # has no product of a narrow type with a wide result
        rows, grad = rows.astype(precision.gradients), grad.astype(precision.gradients)
    d_kernel = _contract(rows, grad, (0,), (0,), preferred_element_type=precision.gradients)
    return d_rows, d_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def product(rows: Array, kernel: Array, num_in: int, precision: Precision) -> Array:
    """Contracts rows `[R, *in]` with a kernel `[*in, *out]` to `[R, *out]`.

    Where gradients are kept in a wider type than the product, so is their sum over devices.
    """
    if precision.products == "fp8":
        flat, out = rows.reshape(len(rows), -1), kernel.shape[num_in:]
        kernel = precision.compute_cast(kernel).reshape(flat.shape[1], -1)
        y: Array = fp8.product(flat, kernel, precision.gradients)
        return y.reshape(len(rows), *out)
    if precision.gradients == precision.compute:
        return _contract(rows, precision.compute_cast(kernel), range(1, 1 + num_in), range(num_in))
    return _product(rows, kernel, num_in, precision)


class Linear(nnx.Module):
    """A dense layer between groups of dimensions: kernel `[*in_dims, *out_dims]`.

    All leading dimensions are flattened into one before the product: on CPUs a single large
    matrix product beats a batch of small ones, elsewhere the reshape is free. The kernel's are
    too, unless the middle ones may be split over devices: compilers know more ways to run a plain
    product, with its bias, without transposing.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        out_dims: Sequence[int],
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        fan_out: int | None = None,
        zero_init: bool = False,
        bias_value: float = 0.0,
        lora: tuple[int, float] | None = None,
    ):
        """Draws the kernel from Xavier's uniform distribution.

        Args:
          in_dims, out_dims: the dimensions contracted and produced.
          fan_out: the output width that sets the scale; the product of `out_dims` by default.
            A fused projection of query, key and value keeps the scale of a single one.
          zero_init: start from a kernel of zeros instead.
          bias_value: where the bias starts.
          lora: rank and scale of a product of two small matrices that is added to the kernel; it
            starts at zero (Hu et al. 2021, arXiv 2106.09685).
        """
        shape = (*in_dims, *out_dims)
        fan_in = math.prod(in_dims)
        limit = math.sqrt(6.0 / (fan_in + (fan_out or math.prod(out_dims))))
        if zero_init:
            kernel = jnp.zeros(shape, precision.params)
        else:
            kernel = jax.random.uniform(rngs.params(), shape, precision.params, -limit, limit)
        self.kernel = nnx.Param(kernel)
        self.bias = (
            nnx.Param(jnp.full(out_dims, bias_value, precision.params)) if use_bias else None
        )
        rank, self.lora_scale = lora or (0, 0.0)
        down, up = (*in_dims, rank), (rank, *out_dims)
        drawn = jax.random.normal(rngs.params(), down, precision.params) if rank else None
        self.lora_a = nnx.Param(drawn * fan_in**-0.5) if drawn is not None else None
        self.lora_b = nnx.Param(jnp.zeros(up, precision.params)) if rank else None
        self.num_in = len(in_dims)
        self.precision = precision

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        p = self.precision
        lead, in_dims = x.shape[: -self.num_in], x.shape[-self.num_in :]
        out_dims = self.kernel.shape[self.num_in :]
        num_in, flat = self.num_in, (math.prod(in_dims), math.prod(out_dims))
        kernel, is_flat = self.kernel[...], not splits_layers()
        if is_flat:
            in_dims, num_in, kernel = flat[:1], 1, kernel.reshape(flat)
        rows = p.compute_cast(x).reshape(math.prod(lead), *in_dims)
        y = product(rows, kernel, num_in, p)
        if self.lora_a is not None and self.lora_b is not None:
            down, up = self.lora_a[...], self.lora_b[...]
            if is_flat:
                down, up = down.reshape(flat[0], -1), up.reshape(-1, flat[1])
            narrow = product(rows, down, num_in, p) * self.lora_scale
            y = y + product(narrow, up, 1, p)
        if self.bias is not None:
            y = y + p.compute_cast(self.bias[...]).reshape(y.shape[1:])[None]
        return y.reshape(*lead, *out_dims)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection of query, key and value.

    `key_bias=False` leaves biases to queries and values: the keys' would change nothing but in a
    norm (BEiT, DINOv3).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        qkv_bias: bool,
        key_bias: bool,
        out_bias: bool,
        qk_norm: bool,
        qk_norm_bias: bool,
        eps: float,
        lora: Lora,
        is_causal: bool = False,
        kernel: str = "xla",
    ):
        head_dim = width // num_heads
        make = {"precision": precision, "rngs": rngs}
        use_bias = qkv_bias and key_bias
        self.qkv = Linear(
            (width,),
            (3, num_heads, head_dim),
            use_bias=use_bias,
            fan_out=width,
            lora=lora.get("qkv"),
            **make,
        )
        zeros = jnp.zeros((2, num_heads, head_dim), precision.params)
        self.qv_bias = nnx.Param(zeros) if qkv_bias and not key_bias else None
        norm = {"precision": precision, "eps": eps, "use_bias": qk_norm_bias}
        self.query_norm = LayerNorm(head_dim, **norm) if qk_norm else None
        self.key_norm = LayerNorm(head_dim, **norm) if qk_norm else None
        self.out = Linear(
            (num_heads, head_dim), (width,), use_bias=out_bias, lora=lora.get("out"), **make
        )
        self.precision = precision
        self.is_causal = is_causal
        self.kernel = kernel

    def __call__(
        self,
        x: Float[Array, "B N D"],
        rope: Any = None,
        offsets: Mapping[str, Array] | None = None,
        intermediates: bool = False,
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """Returns the attended tokens, and if asked for what `attend` computed on the way.

        `rope` holds the sines and cosines of the last tokens' angles, or is None.
        """
        p = self.precision
        # Split rather than indexed: the gradient is one concatenation, not a sum of padded parts.
        parts = jnp.split(constrain(self.qkv(x), "B N 3 H K"), 3, axis=2)
        query, key, value = (jnp.swapaxes(jnp.squeeze(part, 2), 1, 2) for part in parts)
        if self.qv_bias is not None:
            bias = p.compute_cast(self.qv_bias[...])[:, None, :, None]
            query, value = query + bias[0], value + bias[1]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope, p), rotate(key, rope, p)
        if intermediates or offsets is not None:
            mixed, seen = attend(query, key, value, p, offsets, self.is_causal)
        else:
            mixed, seen = KERNELS[self.kernel](query, key, value, self.is_causal), {}
        mixed = constrain(mixed, "B H N K")
        return self.out(jnp.transpose(mixed, (0, 2, 1, 3))), seen


class Mlp(nnx.Module):
    """Two dense layers with an activation between.

    `gated` multiplies the activated half of the first layer with the other (Shazeer 2020, arXiv
    2002.05202): with "silu" it is SwiGLU.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        activation: str,
        precision: Precision,
        rngs: nnx.Rngs,
        gated: bool = False,
        use_bias: bool = True,
        lora: Lora = {},  # noqa: B006
    ):
        make: dict[str, Any] = {"precision": precision, "rngs": rngs, "use_bias": use_bias}
        up: dict[str, Any] = make | {"lora": lora.get("mlp")}
        self.up = None if gated else Linear((width,), (mlp_dim,), **up)
        self.gate_up = Linear((width,), (2, mlp_dim), fan_out=mlp_dim, **up) if gated else None
        self.down = Linear((mlp_dim,), (width,), lora=lora.get("mlp"), **make)
        self.activation = activation
        self.precision = precision

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        activate = ACTIVATIONS[self.activation]
        if platform() != "cpu":  # computed again from its input, which is less to read than to keep
            activate = jax.checkpoint(activate)
        if self.gate_up is not None:
            both = constrain(self.gate_up(x), "B N 2 F")
            gate, value = (jax.lax.index_in_dim(both, i, 2, keepdims=False) for i in (0, 1))
            hidden = activate(gate) * value
        else:
            assert self.up is not None
            hidden = constrain(self.up(x), "B N F")
            if self.precision.products == "fp8":  # XLA's 8-bit products cannot end in a GELU
                hidden = jax.lax.optimization_barrier(hidden)
            hidden = activate(hidden)
        return self.down(hidden)


def dropout(
    x: Float[Array, "B N D"], rate: float | Float[Array, ""], key: jax.Array | None, *, whole: bool
) -> Float[Array, "B N D"]:
    """Zeroes values (or with `whole` an example's entire branch) and rescales the rest.

    `key=None` means inference: nothing is dropped.
    """
    if key is None:
        return x
    keep = 1.0 - jnp.asarray(rate, x.dtype)
    shape = (x.shape[0], 1, 1) if whole else x.shape
    kept = jax.random.bernoulli(key, keep.astype(jnp.float32), shape)
    return jnp.where(kept, x / keep, jnp.zeros((), x.dtype))


def fusion_border(x: Array) -> Array:
    """On CPUs, an array that is computed once and kept.

    XLA's CPU compiler would otherwise compute the gradient of the residual stream in each block
    anew, from those of all later blocks.
    """
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


class Block(nnx.Module):
    """A pre-norm Transformer block, sequential or parallel (ViT-22B).

    `layer_scale` multiplies each branch by learned numbers that start there (CaiT, Touvron et al.
    2021, arXiv 2103.17239).
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: str,
        eps: float,
        norm_bias: bool,
        parallel: bool,
        gated_mlp: bool,
        mlp_bias: bool,
        layer_scale: float | None,
        dropout_rate: float,
        use_drop_path: bool,
        lora: Lora,
        **attention: Any,
    ):
        norm = {"precision": precision, "eps": eps, "use_bias": norm_bias}
        make = {"precision": precision, "rngs": rngs}
        self.norm1 = LayerNorm(width, **norm)
        self.attention = Attention(width, num_heads, eps=eps, lora=lora, **make, **attention)
        self.norm2 = None if parallel else LayerNorm(width, **norm)
        self.mlp = Mlp(
            width,
            mlp_dim,
            activation=activation,
            gated=gated_mlp,
            use_bias=mlp_bias,
            lora=lora,
            **make,
        )
        has_scale = layer_scale is not None

        def scale():
            return nnx.Param(jnp.full((width,), layer_scale or 0.0, precision.params))

        self.layer_scale1 = scale() if has_scale else None
        self.layer_scale2 = scale() if has_scale else None
        self.dropout_rate = dropout_rate
        self.use_drop_path = use_drop_path
        self.precision = precision

    def _branch(self, y, scale, key, index, drop_path):
        y = fusion_border(y)
        if scale is not None:
            y = y * self.precision.compute_cast(scale[...])[None, None]
        if key is None:
            return y
        if self.dropout_rate:
            y = dropout(y, self.dropout_rate, jax.random.fold_in(key, 2 * index), whole=False)
        if self.use_drop_path:
            y = dropout(y, drop_path, jax.random.fold_in(key, 2 * index + 1), whole=True)
        return y

    def __call__(
        self,
        x: Float[Array, "B N D"],
        key: jax.Array | None,
        drop_path: Float[Array, ""],
        rope: Any = None,
        offsets: Mapping[str, Array] | None = None,
        intermediates: bool = False,
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """Returns the tokens, and what was computed on the way; with `intermediates` attention's
        weights too, which the faster kernels do not have.

        `offsets` are added to norm1 or attention_weights, where it has these names.
        """
        x = fusion_border(x)
        normed = displaced(self.norm1(x), "norm1", offsets)
        attended, seen = self.attention(normed, rope, offsets, intermediates)
        x = x + self._branch(attended, self.layer_scale1, key, 0, drop_path)
        if self.norm2 is not None:  # else both branches' partial sums are added first, then shared
            x = constrain(x, "B N D")
        transformed = self.mlp(normed if self.norm2 is None else self.norm2(x))
        x = constrain(x + self._branch(transformed, self.layer_scale2, key, 1, drop_path), "B N D")
        seen |= {"norm1": normed, "attention": attended, "mlp": transformed, "output": x}
        return x, seen
