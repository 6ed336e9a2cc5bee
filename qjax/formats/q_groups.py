"""Rows of several widths, as the ``q_groups`` of EXL2 and MBWQ describes them.

The stored rows are cut into groups, each of one width and widest first. The words of
the groups follow each other down the matrix, 32 rows of ``b`` bits in ``b`` words, and
in each column a group is the bit stream of `qjax.bits`. Its first two words at 3 bits:

    bit 31                                                             bit 0
    | q10: 2 low bits | q9 | q8 | q7 | q6 | q5 | q4 | q3 | q2 | q1 | q0 |
    | q21: 1 low bit  | q20 | q19 |    ...    | q12 | q11 | q10: high bit |

``q_groups`` is int16, a pair (bits, first row of words) for each group. The groups of
one width are a segment in the layout `gptq.Stream`, as the native products read it.

Source: turboderp-org/exllamav2, exllamav2/ext.py and
exllamav2/exllamav2_ext/cuda/q_matrix.cu, commit
da07facd10b5c7f35b03664c41a3090c9f093de5; GreenBitAI/bitorch-engine,
bitorch_engine/layers/qlinear/nbit/cuda/utils.py and mbwq_linear_cuda_kernel.cu, commit
0009b1f8178e86df6433383879c0005a49c0cc92.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int16, Int32, Integer

from qjax import tensor
from qjax.bits import pack_fields
from qjax.tensor import QTensor, Segment

WIDTHS = (8, 6, 5, 4, 3, 2)


class Groups(NamedTuple):
    """Width and number of stored rows of each group."""

    bits: tuple[int, ...]
    rows: tuple[int, ...]


def read_groups(
    q_groups: Int16[Array | np.ndarray, " pairs"], num_qrows: int
) -> Groups:
    """Reads ``q_groups`` and checks it.

    Args:
      q_groups: Concrete int16 ``[2 * groups]``, pairs (bits, first row of words); both
        are unsigned.
      num_qrows: Rows of words in the matrix.

    Returns:
      The groups.

    Raises:
      ValueError: If a width is unknown or follows a smaller one, or the words between
        two groups are no positive multiple of 32 rows (16 at 2 bits).

    Example:
      >>> read_groups(np.array([4, 0, 4, 16, 2, 24], np.int16), 28)
      Groups(bits=(4, 4, 2), rows=(128, 64, 64))
    """
    pairs = np.asarray(q_groups).view(np.uint16).astype(np.int64).reshape(-1, 2)
    bits, first = pairs.T
    if not np.isin(bits, WIDTHS).all() or (np.diff(bits) > 0).any():
        raise ValueError(
            f"q_groups has widths {bits.tolist()}; they must be among {WIDTHS} and "
            "must not increase."
        )
    words = np.diff(first, append=num_qrows)
    rows = words * 32 // bits
    unit = np.where(bits == 2, 16, 32)
    whole = (words > 0) & (words * 32 % bits == 0) & (rows % unit == 0)
    if not first.size or first[0] != 0 or not whole.all():
        raise ValueError(
            f"q_groups has widths {bits.tolist()} and first rows {first.tolist()} of "
            f"{num_qrows}; these must start at 0 and leave each group a positive "
            "multiple of 32 rows (16 at 2 bits)."
        )
    return Groups(tuple(bits.tolist()), tuple(rows.tolist()))


def make_group_map(
    q_groups: Int16[Array | np.ndarray, " pairs"], num_qrows: int
) -> Int16[np.ndarray, " entries"]:
    """Lists each stored row's group, and the rows that are left in it.

    Upstream derives it when it loads a matrix; qjax does not need it.

    Args:
      q_groups: As in `read_groups`.
      num_qrows: As in `read_groups`.

    Returns:
      int16 ``[2 * k]``, pairs (group, rows left with this one); both are unsigned.

    Raises:
      ValueError: As `read_groups`.

    Example:
      >>> make_group_map(np.array([4, 0, 2, 4], np.int16), 5)[60:68].tolist()
      [0, 2, 0, 1, 1, 16, 1, 15]
    """
    sizes = np.array(read_groups(q_groups, num_qrows).rows)
    group = np.repeat(np.arange(sizes.size), sizes)
    left = np.cumsum(sizes)[group] - np.arange(group.size)
    return np.stack([group, left], axis=1).astype(np.uint16).view(np.int16).reshape(-1)


def rows(
    q_groups: Int16[Array | np.ndarray, " pairs"], num_qrows: int
) -> tuple[int, ...]:
    """Counts the rows of 8 bits, of 8 and 6, and so on, as upstream's kernels do.

    Args:
      q_groups: As in `read_groups`.
      num_qrows: As in `read_groups`.

    Returns:
      Where the rows of 8, 6, 5, 4, 3 and 2 bits end, and last the widths that there
      are, bit ``b - 1`` for width ``b``.

    Raises:
      ValueError: As `read_groups`.

    Example:
      >>> rows(np.array([4, 0, 4, 16, 2, 24], np.int16), 28)
      (0, 0, 0, 192, 192, 256, 10)
    """
    groups = read_groups(q_groups, num_qrows)
    bits, sizes = np.array(groups)
    ends = [int(sizes[bits >= width].sum()) for width in WIDTHS]
    return (*ends, sum(1 << (width - 1) for width in set(groups.bits)))


def split_words(
    words: Int32[np.ndarray, "rows n"], groups: Groups
) -> tuple[list[Array], list[Segment]]:
    """Cuts the words of a matrix into segments, one for each width.

    Only the last group of a segment may be shorter than the others. Where the groups of
    a width vary more than that, the width has several segments.

    Args:
      words: The matrix as the file holds it.
      groups: Its groups.

    Returns:
      The uint32 words of each segment, and the segments.
    """
    runs: list[list[int]] = []  # bits, rows of a group, rows in all
    for bits, size in zip(*groups, strict=True):
        if runs and bits == runs[-1][0] and size <= runs[-1][1] and _is_whole(runs[-1]):
            runs[-1][2] += size
        else:
            runs.append([bits, size, size])
    heights = [bits * total // 32 for bits, _, total in runs]
    parts = np.split(words.view(np.uint32), np.cumsum(heights)[:-1])
    return [jnp.asarray(part) for part in parts], [Segment(*run[:2]) for run in runs]


def _is_whole(run: list[int]) -> bool:
    return run[2] % run[1] == 0


def groups_of(qt: QTensor) -> Groups:
    """Lists the groups of a matrix whose groups are runs of stored rows."""
    bits, sizes = [], []
    for segment, count in zip(qt.segments, qt.rows, strict=True):
        full, rest = divmod(count, segment.group_size or count)
        found = [segment.group_size or count] * full + [rest] * bool(rest)
        bits += [segment.bits] * len(found)
        sizes += found
    return Groups(tuple(bits), tuple(sizes))


def unwritable(groups: Groups) -> str | None:
    """Says why ``q_groups`` should not describe some groups, or None.

    Groups of 16 rows at 2 bits are read but never written: upstream dequantizes them as
    meant, but its fused kernels do not multiply by them as meant.
    """
    if not set(groups.bits) <= set(WIDTHS):
        return f"its widths {sorted(set(groups.bits))} are not all among {WIDTHS}"
    if list(groups.bits) != sorted(groups.bits, reverse=True):
        return f"its rows have {list(groups.bits)} bits; the widest must come first"
    if any(size % 32 for size in groups.rows):
        return (
            f"its groups have {sorted(set(groups.rows))} rows, of which upstream's "
            "kernels need multiples of 32"
        )
    if sum(b * size // 32 for b, size in zip(*groups, strict=True)) > 2**16:
        return "it has more rows of words than 16 bits count"
    return None


def write_groups(groups: Groups) -> Int16[Array, " pairs"]:
    """Makes the ``q_groups`` of groups that `unwritable` has nothing against."""
    bits, sizes = np.array(groups)
    ends = np.cumsum(bits * sizes // 32)
    pairs = np.stack([bits, np.concatenate([[0], ends[:-1]])], axis=1)
    return jnp.asarray(pairs.astype(np.uint16).view(np.int16).reshape(-1))


@functools.partial(jax.jit, static_argnums=1)
def join_words(qt: QTensor, columns: int) -> Int32[Array, "rows columns"]:
    """Packs the segments one below the other.

    Args:
      qt: One matrix, the rows of every segment whole words.
      columns: At least n; columns from n on hold the middle code of their width.

    Returns:
      The words as a file holds them.
    """
    codes, parts, first = tensor.codes(qt), [], 0
    for segment, count in zip(qt.segments, qt.rows, strict=True):
        part = jnp.pad(
            codes[first : first + count],
            ((0, 0), (0, columns - qt.n)),
            constant_values=2 ** (segment.bits - 1),
        )
        parts.append(pack_fields(part, segment.bits))
        first += count
    return jax.lax.bitcast_convert_type(jnp.concatenate(parts), jnp.int32)


def check_permutation(
    permutation: Integer[np.ndarray, " rows"], k: int, name: str
) -> bool:
    """Checks an order of the stored rows.

    Args:
      permutation: Concrete integers.
      k: Number of stored rows.
      name: What the file calls it, for messages.

    Returns:
      Whether it changes anything.

    Raises:
      ValueError: If it has another length or is no permutation.
    """
    if permutation.shape != (k,):
        raise ValueError(
            f"{name}.shape={permutation.shape} must be ({k},), as many as q_groups has "
            "rows."
        )
    identity = np.arange(k)
    if not np.array_equal(np.sort(permutation), identity):
        raise ValueError(f"{name} must hold each of 0 to {k - 1} once.")
    return not np.array_equal(permutation, identity)
