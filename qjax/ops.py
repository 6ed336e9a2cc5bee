"""Operations on quantized tensors: `matmul`, `dequantize`, `prepare`."""

import contextlib
import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Integer

from qjax import decode, dispatch, moving, pallas, sharding, tensor, watched, xla
from qjax.bits import block
from qjax.formats.tiles import Tiles
from qjax.meshes import gathered, is_explicit, on_mesh_of, vary_together
from qjax.partitioning import over_devices
from qjax.product import product
from qjax.sharding import P, Segmented
from qjax.tensor import Encoded, Grouping, Layout, Levels, QTensor, Segment
from qjax.watched import Watched


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
    unpacks the codes in registers, and with more than 32 rows rounds each weight to
    float16; elsewhere, XLA compiles the product.

    Differentiable in ``x`` and in the float leaves of ``w``: scale, float zero,
    codebook and input scale; the cotangents of integer leaves are float0. As of
    any `jax.custom_vjp`, `jax.grad` and `jax.jacrev` take the derivatives, also of one
    another, and `jax.jvp` and `jax.jacfwd` do not.

    The number of rows may be left open for `jax.export`. On a GPU the weight is then
    formed, as for many rows.

    The dense weight is formed only if it has at most 4 MiB in float32, if many rows on
    a GPU make up for it (in float16), or if the layout or grouping of ``w`` has no
    native path. `prepare` gives ``w`` the layout that this device reads natively; what
    it does not, and float32 ``x`` on a GPU whose kernels could multiply 16-bit floats,
    is warned of once.

    Args:
      x: ``[..., k]`` bfloat16, float16 or float32 activations. Inside `jax.shard_map`,
        a weight that is cut along k and has an order takes all inputs, not its share.
      w: ``[k, n]`` quantized weight; with ``index`` a stack ``[count, k, n]``.
      index: Which matrix of a stack, as of layers or experts, from 0. It may be traced,
        and is then clamped. The GPU kernels read that matrix where it lies, without a
        copy, also where it lies on one device of several; products with all of a stack
        go through `jax.vmap`.
      implementation: None takes the first of `dispatch.IMPLEMENTATIONS` that supports
        the operands. A name takes that one and no other: "pallas" never falls back, and
        fails where there is no GPU. "pallas_bf16" does without the scaling that lets
        float16 hold rows of bfloat16, where there are more than 16 of them: it takes
        those of any range. "xla_int8" rounds the activations to int8, "xla_float8" to
        E4M3 floats, for weights of such floats without groups. These three are never
        taken unless named.

    Returns:
      ``[..., n]`` product in the dtype of ``x``.

    Raises:
      TypeError: If ``w`` is no `QTensor`, or ``x`` no array.
      ValueError: If shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: If the named implementation declines these operands.

    Example:
      >>> w = qjax.quantize(jnp.arange(512.0).reshape(64, 8), bits=4, group_size=32)
      >>> matmul(jnp.ones((2, 64)), w).shape
      (2, 8)
    """
    check(x, w, index, implementation)
    if isinstance(w, Watched):
        x, w = watched.see(x, w, index)
    return _apply(x, w, index, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _apply(
    x: Array, w: QTensor, index: Array | None, implementation: str | None
) -> Array:
    """Everything around the product of two matrices, one program for eager callers."""
    with on_mesh_of((x, w)):
        if index is not None:
            index = tensor.position(index, w.batch[0])
            if _is_encoded(w) and not isinstance(w.layout, Tiles):
                # Decoded is the one matrix, and not all of them.
                w, index = pallas.one_of(gathered(w), index), None
        if index is None:
            w, _ = dispatch.native(w, None)
        # Whole, as rows of x may be cut along the axis that it is cut along.
        factors = gathered(pallas.one_of(gathered(w.input_scale), index))
        scaled = x
        if factors is not None:
            wide = factors.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
            scaled = x.astype(jnp.float32) * wide
        stored = dataclasses.replace(readable(w), input_scale=None)
        kernels = x.dtype != jnp.float32
        choice = dispatch.Choice(implementation, kernels, dtype=x.dtype)
        return product(*vary_together(scaled, stored, index), choice)


def _is_encoded(w: QTensor) -> bool:
    parameters = (w.scale, w.zero)
    return any(
        isinstance(p, Encoded) and not isinstance(p, Segmented) for p in parameters
    )


def decoded(w: QTensor) -> QTensor:
    """Decodes scale and zero, but leaves apart what is cut over devices.

    Args:
      w: Any weight.

    Returns:
      The same weight; its parameters are arrays or `sharding.Segmented`.
    """
    return w if isinstance(w.scale, Segmented) else tensor.decoded(w)


def readable(w: QTensor) -> QTensor:
    """Decodes scale and zero but for those in two levels that a kernel reads.

    Args:
      w: Any weight.

    Returns:
      The same weight; its parameters are arrays, `sharding.Segmented`, or in `Tiles`
      `tensor.Levels`.
    """
    if isinstance(w.scale, Segmented) or not isinstance(w.layout, Tiles):
        return decoded(w)
    scale, zero = (
        p.for_kernels() if isinstance(p, Encoded) else p for p in (w.scale, w.zero)
    )
    kept = dataclasses.replace(w, scale=scale, zero=zero)
    return kept if dispatch.kernels_read(kept) else tensor.decoded(w)


def dequantize(qt: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*b k n"]:
    """Computes the dense weight.

    Args:
      qt: A quantized tensor, stacked or not.
      dtype: None gives the upstream's dtype (the scale's) with the upstream's rounding,
        bit for bit. Any other dtype widens scales and zeros to float32, evaluates the
        map there, and rounds the result once to ``dtype``.

    Returns:
      ``[*batch, k, n]``, rows in the order of the input features; the same on all
      devices. On an NVIDIA GPU, a kernel computes it of a weight in `Tiles`, or in a
      layout from which `relayout` moves words there.

    Raises:
      TypeError: If ``qt`` is no `QTensor`.
      ValueError: If ``dtype`` is no float dtype.

    Example:
      >>> w = qjax.quantize(jnp.eye(32), bits=4, group_size=32)
      >>> dequantize(w).shape, dequantize(w, jnp.bfloat16).dtype
      ((32, 32), dtype(bfloat16))
    """
    tensor.check_packed(qt, "qt")
    qt = watched.bare(qt)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype={dtype!r} must be a float dtype; qjax.codes gives the codes."
        )
    if is_explicit(qt):
        return _dequantize_shards(qt, None if dtype is None else jnp.dtype(dtype))
    return decode.dequantize(qt, dtype, stored=_stored_weight)


def relayout(qt: QTensor, layout: Layout) -> QTensor:
    """Moves the codes into another layout; scales, zeros and order stay as they are.

    Lossless: nothing is requantized. On an NVIDIA GPU, one launch reads the words and
    writes them, if both layouts only permute codes of 1, 2, 4 or 8 bits; elsewhere, the
    codes are unpacked and packed.

    Args:
      qt: A quantized tensor, stacked or not.
      layout: The layout to move to.

    Returns:
      A tensor with the same codes and the same weight. Where words of ``layout`` cannot
      be cut over devices as those of ``qt`` are, every device has all of them;
      `prepare` does not move such a tensor.

    Raises:
      TypeError: If ``qt`` is no `QTensor`, or ``layout`` no `Layout`.
      ValueError: If ``layout`` cannot hold the codes, with the reason.

    Example:
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> planar = relayout(w, qjax.formats.gptq.Planar())
      >>> bool((qjax.codes(planar) == qjax.codes(w)).all())
      True
    """
    tensor.check_packed(qt, "qt")
    _check_layout(layout)
    return decode.relayout(qt, layout, move=moving.move_words)


def _check_layout(layout: Any) -> None:
    if not isinstance(layout, Layout):
        raise TypeError(f"layout={layout!r} must be a Layout, as formats.awq.Gemm().")


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_shards(qt: QTensor, dtype: jnp.dtype | None) -> Array:
    """`dequantize` of arrays that are traced with their pieces, each device its own.

    The whole of it is one function over devices: not all of its operations have a type
    by themselves.
    """
    units = sharding.units(qt)
    if qt.order is not None:
        # Rows of a device belong to inputs anywhere. Words are smaller than what they
        # stand for, and so every device takes those of all rows.
        units |= {f"k{i}": 1 for i in range(len(qt.segments))}
    return over_devices(
        lambda w: decode.dequantize(sharding.joined(w), dtype, stored=_stored_weight),
        (qt,),
        (sharding.names(qt),),
        P(*[f"b{i}" for i in range(len(qt.batch))], "k0", "n"),
        units,
    )


def _stored_weight(w: QTensor, dtype: DTypeLike | None) -> Array:
    if isinstance(w.scale, Levels):
        w = tensor.decoded(w)
    if isinstance(w.scale, Encoded) or isinstance(w.zero, Encoded):
        return decode.stored_weight(w, dtype)
    by_kernel = _moves_to_kernel(w) and dispatch.kernels_read(w)
    stored = dataclasses.replace(w, order=None, input_scale=None)
    return over_devices(
        functools.partial(
            _by_device if by_kernel else decode.stored_weight, dtype=dtype
        ),
        (stored,),
        (sharding.names(stored),),
        sharding.dense_names(stored),
        sharding.units(stored),
    )


def _moves_to_kernel(w: QTensor) -> bool:
    """Whether a weight is in the kernels' layout, or one launch moves it there."""
    layout = pallas.layout_of(w)
    return w.layout == layout or all(
        moving.are_permuted(w.layout, layout, segment.bits) for segment in w.segments
    )


def _by_device(w: QTensor, dtype: DTypeLike | None) -> Array:
    """`decode.stored_weight`; on a GPU by a kernel."""
    elsewhere = functools.partial(decode.stored_weight, dtype=dtype)

    def on_gpu(w: QTensor) -> Array:
        # Moved first, words are read in order, and each once: XLA would read them once
        # for every code.
        moved = decode.relayout(w, pallas.layout_of(w), move=moving.move_piece)
        with contextlib.suppress(NotImplementedError):
            return pallas.weight(moved, dtype)
        return elsewhere(w)

    return dispatch.by_device(on_gpu, elsewhere, w)


def check(x: Array, w: QTensor, index: Any, implementation: str | None) -> None:
    """Checks the arguments of `matmul`, and warns of what is slow."""
    tensor.check_packed(w)
    tensor.check_array(x, "x")
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
    # A device's share of ordered rows belongs to inputs anywhere, and wants all of x.
    shared = w.order is not None and jax.sharding.get_abstract_mesh().manual_axes
    fits = x.ndim and (x.shape[-1] % w.k if shared else x.shape[-1] - w.k) == 0
    if not fits:
        raise ValueError(
            f"x.shape={x.shape} must end in k={w.k}, as w.shape={w.shape} is [k, n]."
        )
    if implementation in dispatch.ON_GPU and x.dtype == jnp.float32:
        raise NotImplementedError(
            f"implementation={implementation!r} multiplies 16-bit floats and declines "
            "float32 x; cast x to bfloat16, or leave implementation out."
        )
    if implementation not in (None, *dispatch.IMPLEMENTATIONS["matmul"]):
        known = list(dispatch.IMPLEMENTATIONS["matmul"])
        raise ValueError(f"implementation={implementation!r} must be one of {known}.")
    if w.layout != xla.NATIVE and not isinstance(w.layout, Tiles):
        _warn_once(_why_slow(w))
    elif implementation is None and (reason := _why_no_kernel(x, w)):
        _warn_once(reason)
    if w.grouping is not Grouping.ROWS:
        _warn_once(f"Grouping {w.grouping.value!r} makes matmul form the dense weight.")


def _why_slow(w: QTensor) -> str:
    """What matmul has to do with a layout that no product reads."""
    bits = w.segments[0].bits
    if len(w.segments) == 1 and w.k % block(bits)[0]:
        return (
            f"{w.layout!r} of k={w.k} and {bits} bits fills no whole words of "
            f"{xla.NATIVE!r}, so that matmul forms the dense weight."
        )
    return (
        f"{w.layout!r} is moved to {xla.NATIVE!r} at every call of matmul; "
        "`qjax.prepare` does it once."
    )


def _why_no_kernel(x: Array, w: QTensor) -> str | None:
    """Why a product goes through XLA on a GPU whose kernels could do it, if it does."""
    native = _native_layout(w)
    if not isinstance(native, Tiles) or not moving.stays_cut(w, native):
        return None
    if not isinstance(w.layout, Tiles):
        return (
            f"{w.layout!r} is multiplied by XLA on this GPU, whose kernels read "
            f"{native!r}; `qjax.prepare` moves it once, as layers and load do."
        )
    if x.dtype == jnp.float32:
        return (
            "float32 x is multiplied by XLA on this GPU, whose kernels take bfloat16 "
            "and float16, and the weight is unpacked at every call; cast x."
        )
    return None


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
    warnings.warn(message, stacklevel=4)


def prepare(tree: Any, *, layout: Layout | None = None) -> Any:
    """Gives every `QTensor` of a tree the form that its device multiplies fastest.

    The codes move to the layout that is native there: `formats.tiles.Tiles` on an
    NVIDIA GPU from sm_80 on, if the kernels read the tensor, and else
    `formats.gptq.Stream`. Encoded scales and zeros are decoded, but for those in two
    levels that the kernels read (`tensor.Levels`), and an act-order ``row_group`` whose
    groups are all full becomes an ``order``: the rows are stored group by group, and
    ``x`` is gathered instead of the scales. Nothing is requantized; other leaves pass
    through.

    A tensor that is cut over devices (`shard`) stays cut: it moves only to a layout
    whose words can be cut the same way. A piece of `Tiles` is 128 or 256 rows and 16
    columns; what is cut more finely becomes a `Stream` on a GPU as well, and stays as
    it is if that cannot be cut so, either. Inside `jax.jit`, how a tensor is cut over
    automatic axes is not known.

    Args:
      tree: A `QTensor` or any pytree that holds some. Call it once, at load: it looks
        at the values of ``row_group`` and so needs concrete arrays.
      layout: The layout to move to, where it is not for the device that holds the
        tensor; one that cannot hold a tensor, or be cut as it is, leaves it as it is.

    Returns:
      The same tree with prepared tensors. A tensor that no native layout can hold stays
      as it is.

    Raises:
      TypeError: If ``layout`` is no `Layout`.
      ValueError: If the words of a tensor are those of another layout than its own.

    Example:
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> planar = relayout(w, qjax.formats.gptq.Planar())
      >>> prepare({"kernel": planar})["kernel"].layout
      Stream()
    """
    if layout is not None:
        _check_layout(layout)
    is_qtensor = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731

    def one(leaf: Any) -> Any:
        if not is_qtensor(leaf):
            return leaf
        tensor.check_packed(leaf)
        grouped = _group_rows(leaf)
        # On a GPU, too, what XLA reads is better than what nothing reads.
        wanted = [_native_layout(grouped), xla.NATIVE] if layout is None else [layout]
        for target in wanted:
            if moving.stays_cut(grouped, target):
                return readable(moving.in_layout(grouped, target))
        return readable(grouped)

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def _native_layout(w: QTensor) -> Layout:
    """The layout that the device of a tensor reads without a detour."""
    by_kernels = _has_kernels(w.words[0]) and dispatch.kernels_read(w)
    return pallas.layout_of(w) if by_kernels else xla.NATIVE


def _has_kernels(words: Array) -> bool:
    """Whether the device of an array has kernels: an NVIDIA GPU, sm_80 or later."""
    # A tracer is nowhere, and so is an abstract array.
    placed = isinstance(words, jax.Array) and not isinstance(words, Tracer)
    devices = words.devices() if placed else jax.devices()
    # Only CUDA devices say their compute capability: "9.0" for sm_90.
    capability = getattr(min(devices, key=lambda d: d.id), "compute_capability", "0")
    return int(str(capability).split(".")[0]) >= 8


def _group_rows(qt: QTensor) -> QTensor:
    """Stores rows of full act-order groups together."""
    row_group = qt.row_group
    if row_group is None or qt.batch or len(qt.segments) != 1:
        return qt
    qt = moving.in_layout(qt, xla.NATIVE)
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
