"""Tokens in blocks, each of which has one expert.

The tokens of an expert follow each other, and are cut into blocks of ``block_m`` rows:

    tokens          a a a a a b b c c c c
    blocks of 4     [a a a a] [a . . .] [b b . .] [c c c c]

How many blocks there are is only known when the program runs, and a loop visits those
alone; how many there can be, which bounds the memory, follows from the shapes. The
blocks of consecutive experts, as of those that a device holds, follow each other.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Integer, Num

# From the rows that a GPU kernel takes at least to those of its largest tile.
_FEWEST, _MOST = 8, 128
# Experts whose tokens are counted by adding up, for each, those of all before it.
_MOST_SUMMED = 512


def experts_of(
    group_sizes: Integer[Array, " experts"], t: int
) -> tuple[Int32[Array, " t"], Bool[Array, " t"]]:
    """Says which expert each of sorted tokens has.

    Args:
      group_sizes: As in `qjax.ragged_matmul`.
      t: Number of tokens.

    Returns:
      The experts, and whether a token has one; where not, its expert is the last.
    """
    ends = _running_sum(group_sizes.astype(jnp.int32))
    tokens = jnp.arange(t, dtype=jnp.int32)
    return _run_of(tokens, ends), tokens < ends[-1]


def _run_of(places: Array, ends: Array) -> Array:
    """The run that each place lies in, of runs that end there; else the last run."""
    # Unrolled, it is one kernel on a GPU, and no loop of several.
    run = jnp.searchsorted(ends, places, side="right", method="scan_unrolled")
    return jnp.minimum(run.astype(jnp.int32), len(ends) - 1)


def _running_sum(counts: Array) -> Array:
    """The cumulative sum; of not very many one kernel on a GPU, which XLA's is not."""
    if len(counts) > _MOST_SUMMED:
        return jnp.cumsum(counts)
    places = jnp.arange(len(counts))
    up_to = places[None] <= places[:, None]
    return jnp.where(up_to, counts[None], 0).sum(1, dtype=counts.dtype)


class Blocks(NamedTuple):
    """How tokens lie in blocks.

    Attributes:
      expert: Of every block.
      after: How many blocks the tokens of an expert and of those before it take.
      token: Of every row of a block.
      inside: Whether that row holds a token.
      place: Of every token, among the rows of all blocks.
      has_expert: Whether a token is in a block.
    """

    expert: Int32[Array, " blocks"]
    after: Int32[Array, " experts"]
    token: Int32[Array, "blocks block_m"]
    inside: Bool[Array, "blocks block_m"]
    place: Int32[Array, " t"]
    has_expert: Bool[Array, " t"]

    def rows(self, tokens: Num[Array, "t k"]) -> Num[Array, "blocks block_m k"]:
        """The tokens of every block, and zeros in the rows that hold none."""
        return jnp.where(self.inside[..., None], tokens[self.token], 0)

    def tokens(self, rows: Num[Array, "blocks block_m n"]) -> Num[Array, "t n"]:
        """Inverse of `rows`, and its transpose; zeros for tokens in no block."""
        flat = rows.reshape(-1, rows.shape[-1])
        return jnp.where(self.has_expert[:, None], flat[self.place], 0)


def plan(group_sizes: Integer[Array, " experts"], t: int) -> Blocks:
    """Lays sorted tokens out in blocks.

    Args:
      group_sizes: As in `qjax.ragged_matmul`.
      t: Number of tokens, at least one.

    Returns:
      As many blocks as there can be.
    """
    experts = len(group_sizes)
    block_m = _block_rows(t, experts)
    # Most blocks there are where as many experts as can be have one token, and all
    # others are in whole blocks.
    least = min(t, experts)
    blocks = jnp.arange(least + (t - least) // block_m, dtype=jnp.int32)
    ends = jnp.minimum(_running_sum(group_sizes.astype(jnp.int32)), t)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    held = -(-(ends - starts) // block_m)
    after = _running_sum(held)
    expert = _run_of(blocks, after)
    first = starts[expert] + (blocks - (after - held)[expert]) * block_m
    token = first[:, None] + jnp.arange(block_m, dtype=jnp.int32)[None]
    own, has_expert = experts_of(group_sizes, t)
    place = (after - held)[own] * block_m + jnp.arange(t, dtype=jnp.int32) - starts[own]
    return Blocks(
        expert=expert,
        after=after,
        token=jnp.minimum(token, t - 1),
        inside=token < ends[expert][:, None],
        place=place,
        has_expert=has_expert,
    )


def _block_rows(t: int, experts: int) -> int:
    """The power of two that the tokens of an expert fill on average."""
    mean = -(-t // experts)
    return min(t, max(_FEWEST, min(_MOST, 1 << (mean - 1).bit_length())))


class Share(NamedTuple):
    """The blocks that a device multiplies: those of the experts that it holds.

    Attributes:
      expert: Of every block, which of these it has; of others' blocks, any.
      begin: The first of its blocks, which follow each other.
      end: The first that is not.
    """

    expert: Int32[Array, " blocks"]
    begin: Int32[Array, ""]
    end: Int32[Array, ""]

    @classmethod
    def of(cls, blocks: Blocks, numbers: Int32[Array, " held"]) -> "Share":
        """The share of a device that holds the experts of these numbers."""
        first, last = numbers[0], numbers[-1]
        before = jnp.where(first > 0, blocks.after[jnp.maximum(first - 1, 0)], 0)
        expert = jnp.clip(blocks.expert - first, 0, len(numbers) - 1)
        return cls(expert, before, blocks.after[last])

    @property
    def matrix(self) -> Int32[Array, " blocks"]:
        """The expert of every block, and -1 for those that are left out."""
        block = jnp.arange(len(self.expert), dtype=jnp.int32)
        is_own = (self.begin <= block) & (block < self.end)
        return jnp.where(is_own, self.expert, -1)
