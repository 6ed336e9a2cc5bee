"""GPTQ: every row makes up for the rounding of those before it.

Source: IST-DASLab/gptq, gptq.py, commit 2d65066eeb06a5c9ff5184d8cebdf33662c67faf, and
https://arxiv.org/abs/2210.17323.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, DTypeLike, Float, UInt8

from qjax import rtn
from qjax.meshes import whole
from qjax.quantizers import clip as clip_
from qjax.quantizers.error import check_gram
from qjax.rtn import Grid, Scheme
from qjax.tensor import QTensor, over_batch

# Rows between two products with the rows that are still to come.
_BLOCK = 128


def quantize(
    w: Float[Array | np.ndarray, "*batch k n"],
    bits: SupportsIndex = 4,
    group_size: SupportsIndex | None = 128,
    symmetric: bool = False,
    *,
    gram: Float[Array | np.ndarray, "*batch k k"],
    scale_dtype: DTypeLike | None = None,
    act_order: bool = False,
    fewer: float = 0.0,
    clip: bool = False,
    damp: float = 0.01,
) -> QTensor:
    """Quantizes a weight so that its outputs change least, by GPTQ.

    Row by row is rounded, and what that costs the outputs ``x @ w`` is made up for, as
    well as can be, by the rows that are still to come. The range of a group is that of
    its rows when the first of them is reached.

    It takes some ``2 k**2 n + k**3`` operations and, for a while, two more matrices
    ``[k, k]`` and ``[k, n]`` in float32.

    Args:
      w: As in `qjax.quantize`.
      bits: As in `qjax.quantize`.
      group_size: As in `qjax.quantize`.
      symmetric: As in `qjax.quantize`.
      gram: ``x.T @ x`` of inputs that the layer sees, some hundreds of rows or more; a
        mean does as well as a sum. `quantizers.gram` computes it of inputs at hand, and
        `quantizers.grams` of all layers of a model.
      scale_dtype: As in `qjax.quantize`.
      act_order: Whether rows of large inputs come first (upstream's ``desc_act``): less
        error, for inputs that are put in order at every product. Groups are then runs
        of ordered rows.
      fewer: Share of the rows, those of the smallest inputs, that get a bit less, to
        whole groups: ``bits - fewer`` bits a weight, for sizes between two widths. The
        matrix has both in one product, and no upstream's files hold it, but
        `qjax.flatten` does. ``act_order`` is implied.
      clip: Whether each group also searches its range, as `quantizers.clip` does.
      damp: What is added to the diagonal of ``gram``, as a share of its mean: more for
        fewer inputs.

    Returns:
      As `qjax.quantize`; with ``act_order``, rows have an ``order``. Of operands cut
      along explicit axes of a mesh, it is whole on every device; `qjax.shard` cuts it.

    Raises:
      TypeError: If ``w`` or ``gram`` is no array.
      ValueError: As `qjax.quantize`; if ``gram`` is not float ``[*batch, k, k]``,
        ``damp`` is negative, or ``fewer`` not below 1 or there is no such width; or if
        ``gram`` is not positive definite even so, as where it is not finite (of traced
        arrays, the result is then not finite, either).

    Example:
      >>> w, mix, x = jax.random.normal(jax.random.key(0), (3, 64, 64))
      >>> gram = qjax.quantizers.gram(x @ mix)  # inputs that are related
      >>> rounded = qjax.quantize(w, bits=3, group_size=32)
      >>> packed = quantize(w, bits=3, group_size=32, gram=gram, act_order=True)
      >>> error = qjax.quantizers.output_error
      >>> bool(error(w, packed, gram) < 0.7 * error(w, rounded, gram))
      True
    """
    scheme = rtn.check(w, bits, group_size, symmetric, scale_dtype)
    check_gram(w, gram)
    if not 0 <= damp < math.inf:
        raise ValueError(f"damp={damp!r} must be finite and not negative.")
    parts = _parts(scheme, w.shape[-2], fewer)
    ordered = bool(act_order) or len(parts) > 1
    one = functools.partial(_quantize, parts, ordered, bool(clip), damp=damp)
    operands = whole((jnp.asarray(w), jnp.asarray(gram)))
    packed, sound = over_batch(one, *operands)
    if not isinstance(sound, Tracer) and not sound.all():
        raise ValueError(
            f"gram with damp={damp} of its mean diagonal is not positive definite: it "
            "must be finite and of more inputs, or damp larger."
        )
    return packed


def _parts(scheme: Scheme, k: int, fewer: float) -> tuple[tuple[Scheme, int], ...]:
    """What each run of rows gets, and how many there are of them."""
    if not 0 <= fewer < 1:
        raise ValueError(f"fewer={fewer!r} must be a share from 0 to less than 1.")
    # Groups and words of any width are whole.
    unit = math.lcm(scheme.group_size or 1, 32)
    rows = round(fewer * k / unit) * unit
    if not rows:
        return ((scheme, k),)
    if scheme.bits == 2:
        raise ValueError(f"fewer={fewer!r}: of 2 bits, no row can have a bit less.")
    if rows >= k:
        return ((scheme._replace(bits=scheme.bits - 1), k),)
    return (scheme, k - rows), (scheme._replace(bits=scheme.bits - 1), rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _quantize(
    parts: tuple[tuple[Scheme, int], ...],
    act_order: bool,
    clip: bool,
    w: Array,
    gram: Array,
    damp: Array,
) -> tuple[QTensor, Array]:
    w, gram = w.astype(jnp.float32), gram.astype(jnp.float32)
    # How large inputs are as a whole says nothing.
    mean = gram.diagonal().mean()
    gram /= jnp.where(mean > 0, mean, 1)
    diagonal = gram.diagonal()
    sound = jnp.isfinite(mean) & jnp.isfinite(gram).all()
    # Nothing is known of inputs that were always 0: no other row makes up for theirs.
    dead = diagonal == 0
    order = jnp.argsort(-diagonal).astype(jnp.int32) if act_order else None
    gram += jnp.diag(jnp.where(dead, 1, 0) + damp * diagonal.mean())
    if order is not None:
        w, gram = w[order], gram[order][:, order]
    spread, packed, end = _feedback(gram), [], 0
    for scheme, rows in parts:
        start, end = end, end + rows
        codes, grid, errors = _rounded(
            scheme, clip, w[start:end], spread[start:end, start:end]
        )
        w = _made_up(w, spread[start:end], errors, end)
        packed.append(rtn.assemble(scheme, codes, grid))
    joined = dataclasses.replace(_joined(packed), order=order)
    sound &= jnp.isfinite(spread).all() & (spread.diagonal() > 0).all()
    return joined, sound


def _made_up(w: Array, spread: Array, errors: Array, start: int) -> Array:
    """The weight, with its rows from ``start`` on making up for errors before them."""
    shares = spread[:, start:].T
    return w.at[start:].add(-jnp.matmul(shares, errors, precision="highest"))


def _joined(packed: Sequence[QTensor]) -> QTensor:
    """One matrix of runs of rows."""
    zeros = [one.zero for one in packed if one.zero is not None]
    return dataclasses.replace(
        packed[0],
        words=tuple(one.words[0] for one in packed),
        scale=jnp.concatenate([one.scale for one in packed]),
        zero=jnp.concatenate(zeros) if zeros else None,
        segments=tuple(one.segments[0] for one in packed),
    )


def _feedback(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The upper triangular U with ``U.T @ U`` the inverse of ``gram``.

    Row i says how much of the error of row i the rows after it take on, in units of its
    diagonal, once those before it are settled.
    """
    # gram = R R^T with R upper: what Cholesky's L is, seen from the other corner.
    upper = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(upper, jnp.eye(len(gram), dtype=gram.dtype), lower=False)


def _rounded(
    scheme: Scheme, clip: bool, w: Float[Array, "k n"], spread: Float[Array, "k k"]
) -> tuple[UInt8[Array, "k n"], Grid, Float[Array, "k n"]]:
    """Rounds the rows in their order, each with the errors of those before it.

    Args:
      scheme: What codes there are.
      clip: Whether ranges are searched.
      w: The rows.
      spread: As `_feedback` returns it, for these rows.

    Returns:
      Codes, what they stand for, and the errors for later rows to make up for.
    """
    k, n = w.shape
    size = scheme.group_size or k
    block = math.gcd(size, _BLOCK)

    def grid_at(start: Array, w: Array) -> Grid:
        group = jax.lax.dynamic_slice_in_dim(w, start, size)[None]
        if clip:
            grid = clip_.search(scheme, group, jnp.ones((1, size), jnp.float32))
        else:
            grid = rtn.cover(scheme, *rtn.bounds(group))
        return grid

    def one_row(i: Array, state: tuple, corner: Array, grid: Grid) -> tuple:
        rows, codes, errors = state
        row = rows[i][None, None]
        code = rtn.nearest(scheme, row, grid)
        error = (row - rtn.values(code, grid))[0, 0] / corner[i, i]
        rows -= jnp.outer(corner[i], error)
        codes = codes.at[i].set(code[0, 0].astype(jnp.uint8))
        return rows, codes, errors.at[i].set(error)

    def one_block(state: tuple[Array, Grid], start: Array) -> tuple:
        w, grid = state
        grid = jax.lax.cond(start % size == 0, grid_at, lambda *_: grid, start, w)
        corner = jax.lax.dynamic_slice(spread, (start, start), (block, block))
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)
        empty = jnp.zeros_like(rows, jnp.uint8), jnp.zeros_like(rows)
        step = functools.partial(one_row, corner=corner, grid=grid)
        _, codes, errors = jax.lax.fori_loop(0, block, step, (rows, *empty))
        # Rows that are done change, too, and nobody looks at them any more.
        shares = jax.lax.dynamic_slice_in_dim(spread, start, block)
        w -= jnp.matmul(shares.T, errors, precision="highest")
        return (w, grid), (codes, grid, errors)

    first = Grid(jnp.zeros((1, n), scheme.dtype), jnp.zeros((1, n), jnp.float32))
    starts = jnp.arange(0, k, block)
    _, (codes, grids, errors) = jax.lax.scan(one_block, (w, first), starts)
    # All blocks of a group have its grid.
    grid = Grid(*(part[:: size // block, 0] for part in grids))
    return codes.reshape(k, n), grid, errors.reshape(k, n)
