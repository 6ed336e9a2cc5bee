"""The products that `qjax.matmul` and its gradient need, each launch configured."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int32

from qjax import tensor
from qjax.pallas import configs
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import DTYPES, matvec
from qjax.pallas.operands import DTYPE, fit, one_of, unit_of
from qjax.pallas.scale_grad import scale_grad
from qjax.tensor import Affine, QTensor


def fused(
    x: Float[Array, "m k"],
    w: QTensor,
    index: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """``x @ W`` in a dtype, the weight unpacked in registers and stored nowhere."""
    if takes_few_rows(len(x), x.dtype):
        config = configs.for_matvec(len(x), w)
        return matvec(x, w, config, index=index, dtype=dtype)
    return matmul(x, w, configs.for_matmul(len(x), w), index=index).astype(dtype)


def takes_few_rows(m: int, dtype: DTypeLike) -> bool:
    """Whether `fused` is `matvec`, one launch."""
    return m <= configs.FEW_ROWS and dtype in DTYPES


def fused_blocks(
    x: Float[Array, "blocks m k"],
    w: QTensor,
    index: Int32[Array, " blocks"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "blocks m n"]:
    """`fused` of blocks of rows, each by its matrix of a stack, in one launch.

    Args:
      x: Blocks of at most 128 rows.
      w: ``[count, k, n]``.
      index: Which matrix each block takes; -1 for none, which gives zeros.
      dtype: Of the products.

    Returns:
      Products, rounded once.
    """
    blocks, m, k = x.shape
    few = takes_few_rows(m, x.dtype)
    config = configs.for_blocks("matvec" if few else "matmul", blocks, m, w)
    of_program = config.block_m // config.slices
    # Whole tiles of the kernel.
    side = max(of_program, 1 << (m - 1).bit_length())
    rows = jnp.pad(x, ((0, 0), (0, side - m), (0, 0))).reshape(-1, k)
    index = jnp.repeat(index, side // of_program)
    if few:
        product = matvec(rows, w, config, index=index, dtype=dtype)
    else:
        product = matmul(rows, w, config, index=index).astype(dtype)
    return product.reshape(blocks, side, -1)[:, :m]


def fused_bf16(
    x: Float[Array, "m k"],
    w: QTensor,
    index: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """`fused` in bfloat16: elements of a row may differ by more than 2**28."""
    bf16 = jnp.dtype(jnp.bfloat16)
    if takes_few_rows(len(x), bf16):
        return fused(x.astype(bf16), w, index, dtype)
    config = configs.for_exact(len(x), w)
    return matmul(x, w, config, dtype=bf16, index=index).astype(dtype)


def fused_t(
    dy: Float[Array, "m n"], w: QTensor, index: Array | None = None
) -> Float[Array, "m k"]:
    """``dy @ W.T``, the weight unpacked in registers and stored nowhere."""
    return matmul_t(dy, w, configs.for_matmul_t(len(dy), w), index=index)


def fused_grad(
    x: Float[Array, "m k"],
    dy: Float[Array, "m n"],
    w: QTensor,
    index: Array | None = None,
) -> dict[str, Array]:
    """Gradients of scale and float zero, reduced in registers."""
    return scale_grad(x, dy, w, configs.for_scale_grad(len(x), w), index=index)


def dense(
    x: Float[Array, "m k"],
    w: QTensor,
    index: Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """``x @ W`` for many rows: forms the weight in float16, then multiplies."""
    return _through_dense(x, w, index, (((1,), (0,)), ((), ()))).astype(dtype)


def dense_t(
    dy: Float[Array, "m n"], w: QTensor, index: Array | None = None
) -> Float[Array, "m k"]:
    """``dy @ W.T`` for many rows: forms the weight in float16, then multiplies."""
    return _through_dense(dy, w, index, (((1,), (1,)), ((), ())))


def weight(w: QTensor, dtype: DTypeLike | None) -> Float[Array, "k n"]:
    """The dense weight of a matrix, bit for bit that of `decode.stored_weight`."""
    if w.scale.dtype == jnp.float32 and w.zero is not None and w.affine != Affine.ZERO:
        raise NotImplementedError(
            "A kernel may round the product of a code and a float32 scale, or not, "
            "before it adds the zero."
        )
    parts = [
        dequantize(part, dtype, configs.for_dequantize(part))
        for part in tensor.split(w)
    ]
    return jnp.concatenate(parts)


def _through_dense(rows: Array, w: QTensor, index: Array | None, axes: tuple) -> Array:
    added = None if w.affine is Affine.ZERO else w.zero
    scale, added = one_of((w.scale, added), index)
    unit, undo = unit_of(tensor.plain(scale), tensor.plain(added))
    config = configs.for_dequantize(w)
    weight = dequantize(w, DTYPE, config, index=index, unit=unit)
    x, unscale = fit(rows)
    y = lax.dot_general(x, weight, axes, preferred_element_type=jnp.float32)
    return y * (unscale * undo)
