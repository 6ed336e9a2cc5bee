"""Operations on quantized tensors: `matmul`, `dequantize`, `prepare`."""

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Integer

from qjax import decode, pallas, tensor, xla
from qjax.bits import block
from qjax.formats.tiles import Tiles
from qjax.tensor import Encoded, Grouping, Layout, QTensor, Segment

# Every implementation of the three products that `matmul` and its gradient need. One
# raises `NotImplementedError` to decline its operands; other errors are the caller's.
# Those of the GPU take the index of a matrix in a stack, too.
_Table = Mapping[str, Callable[..., Any]]
IMPLEMENTATIONS: Mapping[str, _Table] = {
    # x [m, k], w -> x @ W
    "matmul": {
        "pallas": pallas.fused,
        "pallas_bf16": pallas.fused_bf16,
        "pallas_dense": pallas.dense,
        "xla_fused": xla.fused,
        "xla_tiled": xla.tiled,
        "xla_dense": xla.dense,
        "xla_int8": xla.int8,
    },
    # dy [m, n], w -> dy @ W.T
    "matmul_t": {
        "pallas": pallas.fused_t,
        "pallas_dense": pallas.dense_t,
        "xla_tiled": xla.tiled_t,
        "xla_dense": xla.dense_t,
    },
    # x [m, k], dy [m, n], w -> gradients of the float leaves of w, by name
    "leaf_grad": {
        "pallas": pallas.fused_grad,
        "xla_grouped": xla.grouped_grad,
        "xla_tiled": xla.tiled_grad,
        "xla_dense": xla.dense_grad,
    },
}

_ON_GPU = ("pallas", "pallas_bf16", "pallas_dense")
# Up to this many rows the products of XLA's forms stay in registers (`xla.fused`).
_FUSED_ROWS = 3
# A weight of at most 4 MiB in float32 is formed: it stays in the cache, and one product
# costs less than a loop over tiles.
_SMALL = 1024 * 1024


class _Choice(NamedTuple):
    """What the caller's operands allow.

    Attributes:
      implementation: The one that the caller named, or None.
      kernels: Whether the activations have 16 bits, which the GPU kernels keep exactly.
    """

    implementation: str | None
    kernels: bool


def _xla_order(op: str, m: int, w: QTensor) -> tuple[str, ...]:
    """Names of XLA's forms to try, best first."""
    if op == "matmul" and m <= _FUSED_ROWS:
        return ("xla_fused", "xla_tiled", "xla_dense")
    if w.k * w.n <= _SMALL:
        return ("xla_dense",)
    if op == "leaf_grad":
        return ("xla_grouped", "xla_tiled", "xla_dense")
    return ("xla_tiled", "xla_dense")


def _gpu_order(op: str, m: int, w: QTensor) -> tuple[str, ...]:
    """Names of the GPU's implementations to try, best first."""
    if op == "leaf_grad":
        return ("pallas",)
    if m < pallas.dense_rows(op, w):
        return ("pallas", "pallas_dense")
    return ("pallas_dense", "pallas")


def matmul(
    x: Float[Array, "*batch k"],
    w: QTensor,
    *,
    index: int | Integer[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Computes ``x @ dequantize(w)`` without forming the weight.

    The weight is evaluated in float32 from widened scales and zeros, and the product is
    accumulated in float32. On an NVIDIA GPU (sm_80 and later), 16-bit activations and a
    weight that `prepare` put into `formats.tiles.Tiles` are multiplied by a kernel that
    unpacks the codes in registers; elsewhere, XLA compiles the product.

    Differentiable in ``x`` and in the float leaves of ``w``: scale, float zero,
    codebook and input scale; the cotangents of integer leaves are float0.

    The dense weight is formed only if it has at most 4 MiB in float32, if many rows on
    a GPU make up for it (in float16), or if the layout or grouping of ``w`` has no
    native path; the last warns once. `prepare` gives ``w`` the layout that this device
    reads natively.

    Args:
      x: ``[..., k]`` bfloat16, float16 or float32 activations.
      w: ``[k, n]`` quantized weight; with ``index`` a stack ``[count, k, n]``.
      index: Which matrix of a stack, as of layers or experts, from 0. It may be traced,
        and is then clamped. The GPU kernels read that matrix where it lies, without a
        copy; products with all of a stack go through `jax.vmap`.
      implementation: None takes the first of `IMPLEMENTATIONS` that supports the
        operands. A name takes that one and no other: "pallas" never falls back, and
        fails where there is no GPU. "pallas_bf16" does without the scaling of rows
        that lets float16 hold them: it takes bfloat16 of any range. "xla_int8" rounds
        the activations to int8. Both are never taken unless named.

    Returns:
      ``[..., n]`` product in the dtype of ``x``.

    Raises:
      ValueError: If shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: If the named implementation declines these operands.

    Example:
      >>> w = qjax.quantize(jnp.arange(512.0).reshape(64, 8), bits=4, group_size=32)
      >>> matmul(jnp.ones((2, 64)), w).shape
      (2, 8)
    """
    _check_operands(x, w, index, implementation)
    if w.layout != xla.NATIVE and not isinstance(w.layout, Tiles):
        _warn_once(
            f"{w.layout!r} is moved to {xla.NATIVE!r} at every call of matmul; "
            "`qjax.prepare` does it once."
        )
    if w.grouping is not Grouping.ROWS:
        _warn_once(f"Grouping {w.grouping.value!r} makes matmul form the dense weight.")
    return _apply(x, w, index, implementation)


@functools.partial(jax.jit, static_argnums=3)
def _apply(
    x: Array, w: QTensor, index: Array | None, implementation: str | None
) -> Array:
    """Everything around the product of two matrices, one program for eager callers."""
    if index is not None:
        index = jnp.clip(index, 0, w.batch[0] - 1).astype(jnp.int32)
    if not isinstance(w.layout, Tiles):
        w, index = _in_layout(pallas.one_of(w, index), xla.NATIVE), None
    rows = x.reshape(-1, x.shape[-1])
    input_scale, order = pallas.one_of((w.input_scale, w.order), index)
    if input_scale is not None:
        rows = rows.astype(jnp.float32) * input_scale.astype(jnp.float32)[None]
    if order is not None:
        rows = jnp.take(rows, order, axis=1, unique_indices=True)
    stored = dataclasses.replace(
        w,
        scale=tensor.plain(w.scale),
        zero=tensor.plain(w.zero),
        order=None,
        input_scale=None,
    )
    choice = _Choice(implementation, kernels=x.dtype != jnp.float32)
    y = _matmul(*vary_together(rows, stored, index), choice)
    return y.reshape(*x.shape[:-1], w.n).astype(x.dtype)


# With W[k, n] = f(q[k, n], s, z) and g the cotangent of y = x W:
#   dx = g W^T,   dW = x^T g,   ds = sum over its group of dW * df/ds, and so for z.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: QTensor, index: Array | None, choice: _Choice) -> Array:
    def by_parts(x: Array, w: QTensor, index: Array | None) -> Array:
        products = (
            _run("matmul", choice, xs, part, index) for xs, part in _parts(x, w)
        )
        return functools.reduce(jnp.add, products)

    # The fused kernel multiplies all segments in one launch.
    if len(w.segments) == 1:
        return by_parts(x, w, index)
    if choice.implementation in ("pallas", "pallas_bf16"):
        return IMPLEMENTATIONS["matmul"][choice.implementation](x, w, index)
    fused = (
        _goes_to_kernels(w, choice) and _gpu_order("matmul", len(x), w)[0] == "pallas"
    )
    if fused:
        return jax.lax.platform_dependent(
            x, w, index, cuda=pallas.fused, default=by_parts
        )
    return by_parts(x, w, index)


def _matmul_forward(
    x: Array, w: QTensor, index: Array | None, choice: _Choice
) -> tuple:
    return _matmul(x, w, index, choice), (x, w, index)


def _matmul_backward(
    choice: _Choice, residuals: tuple[Array, QTensor, Array | None], dy: Array
) -> tuple[Array, QTensor, np.ndarray | None]:
    choice = choice._replace(implementation=None)  # Named for the forward product.
    x, w, index = residuals
    by_part, gradients = [], []
    for xs, part in _parts(x, w):
        by_part.append(_run("matmul_t", choice, dy, part, index))
        gradients.append(_run("leaf_grad", choice, xs, dy, part, index))
    leaves = {
        name: functools.reduce(jnp.add, group)
        if name == "codebook" or w.row_group is not None
        else jnp.concatenate(group)
        for name in gradients[0]
        for group in [[gradient[name] for gradient in gradients]]
    }
    dw = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), w)
    cast = {name: leaves[name].astype(getattr(w, name).dtype) for name in leaves}
    dx = jnp.concatenate(by_part, axis=1).astype(x.dtype)
    if index is None:
        return dx, dataclasses.replace(dw, **cast), None
    spread = {
        name: jnp.zeros_like(getattr(w, name)).at[index].set(gradient)
        for name, gradient in cast.items()
    }
    no_cotangent = np.zeros((), jax.dtypes.float0)
    return dx, dataclasses.replace(dw, **spread), no_cotangent


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dequantize(qt: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*b k n"]:
    """Computes the dense weight.

    Args:
      qt: A quantized tensor, stacked or not.
      dtype: None gives the upstream's dtype (the scale's) with the upstream's rounding,
        bit for bit. Any other dtype widens scales and zeros to float32, evaluates the
        map there, and rounds the result once to ``dtype``.

    Returns:
      ``[*batch, k, n]``, rows in the order of the input features; the same on all
      devices. On an NVIDIA GPU, a kernel computes it of a weight in `Tiles`.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> dequantize(w).shape, dequantize(w, jnp.bfloat16).dtype
      ((32, 32), dtype(bfloat16))
    """
    return decode.dequantize(qt, dtype, stored=_stored_weight)


def _stored_weight(w: QTensor, dtype: DTypeLike | None) -> Array:
    def on_gpu(w: QTensor) -> Array:
        with contextlib.suppress(NotImplementedError):
            return pallas.weight(w, dtype)
        return elsewhere(w)

    def elsewhere(w: QTensor) -> Array:
        return decode.stored_weight(w, dtype)

    encoded = isinstance(w.scale, Encoded) or isinstance(w.zero, Encoded)
    if w.layout != pallas.layout_of(w) or encoded or not _kernels_read(w):
        return elsewhere(w)
    return jax.lax.platform_dependent(w, cuda=on_gpu, default=elsewhere)


def vary_together(*operands: Any) -> tuple[Any, ...]:
    """Inside `jax.shard_map`, lets all leaves vary over the axes that any varies over.

    The transpose of the cast sums the cotangent of a replicated operand over devices.

    Args:
      *operands: Trees of arrays.

    Returns:
      The same trees.
    """
    varying = lambda leaf: jax.typeof(leaf).manual_axis_type.varying  # noqa: E731
    axes = set().union(*map(varying, jax.tree.leaves(operands)))

    def cast(leaf: Array) -> Array:
        missing = tuple(axes - varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, operands)


def _parts(x: Array, w: QTensor) -> Iterator[tuple[Array, QTensor]]:
    """Pairs every segment with its columns of x."""
    ends = itertools.accumulate(w.rows)
    for end, rows, part in zip(ends, w.rows, tensor.split(w), strict=True):
        yield x[:, end - rows : end], part


def _run(op: str, choice: _Choice, *operands: Any) -> Any:
    """Runs the named implementation, or the first that does not decline.

    The operands are rows, the weight, and the index of one in a stack, or None.
    """
    *rows, w, index = operands
    name, m = choice.implementation, rows[0].shape[0]
    if name in _ON_GPU:
        return IMPLEMENTATIONS[op][name](*operands)
    if name is not None:
        wide = [row.astype(jnp.float32) for row in rows]
        return IMPLEMENTATIONS[op][name](*wide, pallas.one_of(w, index))

    def on_gpu(*operands: Any) -> Any:
        return _first(op, _gpu_order(op, m, w), operands)

    def elsewhere(*operands: Any) -> Any:
        *rows, w, index = operands
        native = _in_layout(pallas.one_of(w, index), xla.NATIVE)
        wide = [row.astype(jnp.float32) for row in rows]
        return _first(op, _xla_order(op, m, native), (*wide, native))

    # What the entries of a codebook are worth is summed by XLA.
    by_codebook = op == "leaf_grad" and w.codebook is not None
    if by_codebook or not _goes_to_kernels(w, choice):
        return elsewhere(*operands)
    # The platform is known when the program is lowered, not here.
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=elsewhere)


def _first(op: str, names: tuple[str, ...], operands: tuple[Any, ...]) -> Any:
    reasons = []
    for name in names:
        try:
            return IMPLEMENTATIONS[op][name](*operands)
        except NotImplementedError as error:
            reasons.append(error)
    raise ExceptionGroup(f"no implementation of {op} takes {operands[-1]!r}", reasons)


def _goes_to_kernels(w: QTensor, choice: _Choice) -> bool:
    named = choice.implementation is not None
    if w.layout != pallas.layout_of(w) or not choice.kernels or named:
        return False
    return _kernels_read(w)


def _kernels_read(w: QTensor) -> bool:
    try:
        pallas.check(w)
    except NotImplementedError:
        return False
    return True


def _in_layout(w: QTensor, layout: Layout) -> QTensor:
    """Moves the codes if the layout can hold them."""
    with contextlib.suppress(ValueError):  # xla.dense reads any layout.
        return decode.relayout(w, layout)
    return w


def _check_operands(
    x: Array, w: QTensor, index: Any, implementation: str | None
) -> None:
    if index is not None:
        _check_index(w, index)
    elif w.batch:
        raise ValueError(
            f"w.shape={w.shape} is a stack; pass index=, or map over it: "
            "jax.vmap(qjax.matmul)(x, w)."
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"x.dtype={x.dtype} must be bfloat16, float16 or float32; cast x."
        )
    if not x.ndim or x.shape[-1] != w.k:
        raise ValueError(
            f"x.shape={x.shape} must end in k={w.k}, as w.shape={w.shape} is [k, n]."
        )
    if implementation in _ON_GPU and x.dtype == jnp.float32:
        raise NotImplementedError(
            f"implementation={implementation!r} multiplies 16-bit floats and declines "
            "float32 x; cast x to bfloat16, or leave implementation out."
        )
    if implementation not in (None, *IMPLEMENTATIONS["matmul"]):
        known = list(IMPLEMENTATIONS["matmul"])
        raise ValueError(f"implementation={implementation!r} must be one of {known}.")


def _check_index(w: QTensor, index: Any) -> None:
    if len(w.batch) != 1:
        raise ValueError(
            f"index={index!r} is of a stack [count, k, n]; w.shape={w.shape}."
        )
    array = index if isinstance(index, Array) else np.asarray(index)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"index={index!r} must be one integer.")
    if not isinstance(index, Tracer) and not 0 <= int(index) < w.batch[0]:
        raise ValueError(f"index={index} must lie in [0, {w.batch[0]}).")


@functools.lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def prepare(tree: Any, *, layout: Layout | None = None) -> Any:
    """Gives every `QTensor` of a tree the form that its device multiplies fastest.

    The codes move to the layout that is native there: `formats.tiles.Tiles` on an
    NVIDIA GPU from sm_80 on, if the kernels read the tensor, and else
    `formats.gptq.Stream`. Encoded scales and zeros are decoded, and an act-order
    ``row_group`` whose groups are all full becomes an ``order``: the rows are stored
    group by group, and ``x`` is gathered instead of the scales. Nothing is requantized;
    other leaves pass through.

    Args:
      tree: A `QTensor` or any pytree that holds some. Call it once, at load: it looks
        at the values of ``row_group`` and so needs concrete arrays.
      layout: The layout to move to, where it is not for the device that holds the
        tensor; one that cannot hold a tensor leaves it as it is.

    Returns:
      The same tree with prepared tensors. A tensor that no native layout can hold stays
      as it is.

    Example:
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> planar = decode.relayout(w, qjax.formats.gptq.Planar())
      >>> prepare({"kernel": planar})["kernel"].layout
      Stream()
    """
    is_qtensor = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731

    def one(leaf: Any) -> Any:
        if not is_qtensor(leaf):
            return leaf
        grouped = _group_rows(leaf)
        return _in_layout(grouped, layout or _native_layout(grouped))

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def _native_layout(w: QTensor) -> Layout:
    """The layout that the device of a tensor reads without a detour."""
    words = w.words[0]
    devices = jax.devices() if isinstance(words, Tracer) else words.devices()
    # Only CUDA devices say their compute capability: "9.0" for sm_90.
    capability = getattr(min(devices, key=lambda d: d.id), "compute_capability", "0")
    has_kernels = int(str(capability).split(".")[0]) >= 8
    return pallas.layout_of(w) if has_kernels and _kernels_read(w) else xla.NATIVE


def _group_rows(qt: QTensor) -> QTensor:
    """Decodes scale and zero, and stores rows of full act-order groups together."""
    qt = dataclasses.replace(
        qt, scale=tensor.plain(qt.scale), zero=tensor.plain(qt.zero)
    )
    row_group = qt.row_group
    if row_group is None or qt.batch or len(qt.segments) != 1:
        return qt
    qt = _in_layout(qt, xla.NATIVE)
    bits = qt.segments[0].bits
    counts = np.bincount(np.asarray(row_group), minlength=qt.scale.shape[-2])
    size = counts[0]
    if qt.layout != xla.NATIVE or size % block(bits)[0] or (counts != size).any():
        return qt
    rows = jnp.argsort(row_group, stable=True).astype(jnp.int32)
    return dataclasses.replace(
        qt,
        words=(_permute_rows(qt.words[0], rows, bits),),
        segments=(Segment(bits, int(size)),),
        row_group=None,
        order=rows if qt.order is None else qt.order[rows],
    )


@functools.partial(jax.jit, static_argnums=2)
def _permute_rows(words: Array, rows: Array, bits: int) -> Array:
    return xla.NATIVE.pack(xla.NATIVE.unpack(words, bits)[rows], bits)
