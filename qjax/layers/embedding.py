"""Quantized tables of embeddings: what `linen.Embed` and `nnx.Embed` share.

A table of ``num_embeddings`` rows is stored as the `QTensor` ``[features,
num_embeddings]``: a row of the table is a column of the tensor. Codes lie in words
along the first axis, in columns of `formats.gptq.Stream` as in the units of
`formats.tiles.Tiles`, and so a row has words, scales and zeros of its own. Attending is
`qjax.matmul` with the same tensor.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Integer

from qjax import decode, tensor
from qjax.formats.gptq import Planar, Stream
from qjax.formats.tiles import SIDE, Tiles
from qjax.layers import dense
from qjax.tensor import Encoded, Grouping, Levels, QTensor, check_packed

AXES = "[features, num_embeddings]"


def start(
    embedding_init: Initializer | None,
    key: Array,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    param_dtype: DTypeLike,
) -> QTensor:
    """Makes the table of a new layer, prepared for this device.

    Args:
      embedding_init: Draws the dense table that is quantized, ``[num_embeddings,
        features]``. None: all words and scales are zero, and no dense array exists.
      key: Key for ``embedding_init``.
      shape: (features, num_embeddings).
      bits: Width of a code.
      group_size: Features of a row that share a scale; None for all of them.
      symmetric: Whether no zeros are stored.
      param_dtype: Dtype of the sample and of the scales.

    Returns:
      The table, ``[features, num_embeddings]``.

    Raises:
      ValueError: If the arguments do not fit together.
    """

    def draw(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        assert embedding_init is not None
        sample = embedding_init(key, shape[::-1], dtype)
        dense.check_sample("embedding_init", sample, shape[::-1])
        return sample.T

    return dense.start(
        None if embedding_init is None else draw,
        key,
        shape,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        param_dtype=param_dtype,
        rows="features",
    )


def lookup(
    table: QTensor,
    inputs: Integer[Array | np.ndarray, "*batch"],
    dtype: DTypeLike | None,
) -> Float[Array, "*batch features"]:
    """Dequantizes some rows of a table, and no others.

    Args:
      table: ``[features, num_embeddings]``.
      inputs: Which rows. As in Flax, negative ones count from the end, others that do
        not exist give NaN, and a table of one row gives that row.
      dtype: As in `qjax.dequantize`.

    Returns:
      ``[..., features]``, equal to rows of ``qjax.dequantize(table, dtype).T``.

    Raises:
      ValueError: If ``inputs`` are no integers, or the table is a stack.
      NotImplementedError: If the words of the table's layout hold more than one row.
    """
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.integer):
        raise ValueError(
            f"inputs.dtype={jnp.result_type(inputs)} must be an integer dtype: inputs "
            "are the indices of rows."
        )
    check_packed(table, "embedding")
    if table.batch:
        raise ValueError(
            f"embedding.shape={table.shape} is a stack; map over it with vmap."
        )
    index, exists = _in_range(jnp.asarray(inputs), table.n)
    if not index.size:
        return jnp.zeros((*index.shape, table.k), dtype or table.dtype)
    rows = decode.dequantize(columns(table, index.reshape(-1)), dtype).T
    rows = rows.reshape(*index.shape, table.k)
    return jnp.where(exists[..., None], rows, jnp.asarray(jnp.nan, rows.dtype))


def factored(
    a: Float[Array, "features rank"],
    b: Float[Array, "rank num_embeddings"] | None,
    inputs: Integer[Array | np.ndarray, "*batch"],
) -> Float[Array, "*batch features"]:
    """Looks up rows of the table ``(a @ b).T``, and computes no others.

    Args:
      a: ``[features, rank]``.
      b: ``[rank, num_embeddings]`` of the dtype of ``a``; None where the table is
        ``a.T``.
      inputs: As in `lookup`; indices without a row give some row.

    Returns:
      ``[..., features]`` in the dtype of ``a``.
    """
    last = a if b is None else b
    index, _ = _in_range(jnp.asarray(inputs), last.shape[-1])
    if b is None:
        return a.T[index]
    return jnp.matmul(b.T[index], a.T, precision="highest")


def _in_range(inputs: Array, n: int) -> tuple[Array, Array]:
    """Returns indices from 0 to n - 1, and whether they are what was asked for."""
    if n == 1:
        return jnp.zeros(inputs.shape, jnp.int32), jnp.ones(inputs.shape, bool)
    # What is out of range stays so in int32, whatever the integers.
    limits = jnp.iinfo(inputs.dtype)
    index = jnp.clip(inputs, max(-n - 1, limits.min), min(n, limits.max))
    index = index.astype(jnp.int32)
    index = jnp.where(index < 0, index + n, index)
    return jnp.clip(index, 0, n - 1), (index >= 0) & (index < n)


def columns(w: QTensor, index: Integer[Array, " m"]) -> QTensor:
    """Gathers columns of a matrix, which stay packed.

    Args:
      w: ``[k, n]``.
      index: Which columns; all exist.

    Returns:
      ``[k, m]``; the words of `formats.tiles.Tiles` are padded to whole units.

    Raises:
      NotImplementedError: If the words of the layout hold more than one column.
    """
    if not isinstance(w.layout, Stream | Planar | Tiles):
        raise NotImplementedError(
            f"embedding has the layout {w.layout!r}, whose words hold several rows of "
            f"the table; {Stream()!r} would read only those asked for, and needs "
            f"features={w.k} to fill whole 32-bit words."
        )
    padding = -len(index) % SIDE if isinstance(w.layout, Tiles) else 0
    held = jnp.pad(index, (0, padding))
    words = tuple(_words(words, w, held) for words in w.words)
    picked = dataclasses.replace(w, words=words, padding=padding)
    if w.grouping is Grouping.ROWS:
        parameters = {
            name: _parameters(parameter, w.n, index)
            for name in ("scale", "zero")
            if (parameter := getattr(w, name)) is not None
        }
        return dataclasses.replace(picked, **parameters)
    return _one_group_a_row(picked, w, index)


def _words(words: Array, w: QTensor, index: Array) -> Array:
    if not isinstance(w.layout, Tiles):
        return jnp.take(words, index, axis=1)
    blocks, units = words.shape[:2]
    # As `formats.tiles` packs a unit: n2 n1 n0, k2 k1, k3, n3, k0.
    slots = words.reshape(blocks, units, -1, 8, 4, 2, 2, 2)
    picked = slots[:, :, index // SIDE, index % 8, :, :, index // 8 % 2]
    # columns, n3, n2 n1 n0, block, unit, k2 k1, k3, k0
    axes = picked.reshape(-1, 2, 8, blocks, units, 4, 2, 2)
    return axes.transpose(3, 4, 0, 2, 5, 6, 1, 7).reshape(blocks, units, -1, SIDE**2)


def _parameters(parameter: Array | Encoded, n: int, index: Array) -> Array:
    """Scales or zeros of some columns."""
    if isinstance(parameter, Levels):
        picked = jax.tree.map(
            lambda leaf: _parameters(leaf, n, index) if leaf.ndim else leaf, parameter
        )
        return picked.decode()
    parameter = tensor.plain(parameter)
    count = parameter.shape[-1]
    if count == 1:
        return parameter
    shared = n // count if count < n else 1  # neighbours with the same scale
    return jnp.take(parameter, index // shared, axis=1)


def _one_group_a_row(picked: QTensor, w: QTensor, index: Array) -> QTensor:
    """Looks up the scale of every element: groups that cross columns do not move."""
    if w.k * w.n > 2**32:
        raise NotImplementedError(
            f"embedding.shape={w.shape} has more than 2**32 elements in groups that "
            "cross rows of the table; their places are counted in 32 bits."
        )
    scales, zeros = [], []
    for part in tensor.split(w):
        places = _places(part, index)
        scales.append(part.scale.reshape(-1)[places])
        if part.zero is not None:
            zeros.append(part.zero.reshape(-1)[places])
    return dataclasses.replace(
        picked,
        scale=jnp.concatenate(scales),
        zero=jnp.concatenate(zeros) if zeros else None,
        segments=tuple(segment._replace(group_size=1) for segment in w.segments),
        grouping=Grouping.ROWS,
    )


def _places(part: QTensor, index: Array) -> Array:
    """Which scale the elements of some columns have, in a matrix of one segment."""
    rows = jnp.arange(part.k, dtype=jnp.uint32)[:, None]
    element = index.astype(jnp.uint32)[None] * jnp.uint32(part.k) + rows
    if part.grouping is Grouping.STRIDED:
        return element % jnp.uint32(part.scale.size)
    size = part.segments[0].group_size
    return jnp.zeros_like(element) if size is None else element // jnp.uint32(size)
