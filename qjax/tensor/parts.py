"""What a `QTensor` is made of: its layout, affine map, grouping and segments."""

import abc
import enum
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Integer, UInt8

from qjax.tensor.digits import Digits


class Cut(typing.NamedTuple):
    """Where words may be cut without unpacking them.

    Attributes:
      k_axis: Axis of one matrix's words that runs along k.
      rows: Rows of the least piece along it.
      n_axis: Axis that runs along n.
      columns: Columns of the least piece along it.
    """

    k_axis: int
    rows: int
    n_axis: int
    columns: int


class Layout(abc.ABC):
    """Where the codes of one segment lie in machine words.

    A layout is a frozen, hashable dataclass: it is static metadata of a `QTensor`. Its
    methods are pure jnp, take one matrix (batch axes come through `jax.vmap`), and
    raise `ValueError` with the reason when the layout cannot hold what it is given.
    """

    # Number of axes that the words of one segment have.
    rank: typing.ClassVar[int] = 2

    @abc.abstractmethod
    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Array:
        """Packs codes of ``bits`` bits, ``[k, n]``, into words."""

    @abc.abstractmethod
    def unpack(self, words: Array, bits: int) -> UInt8[Array, "k n"]:
        """Unpacks the words of one segment into uint8 codes, ``[k, n]``."""

    @abc.abstractmethod
    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns the (k, n) that words of this shape hold, padding included."""

    def cut(self, bits: int) -> Cut | None:
        """Returns where words may be cut; None: nowhere."""
        return None

    def digits(self, bits: int) -> Digits | None:
        """Returns where rows and columns go, if words permute their binary digits."""
        return None


class Encoded(abc.ABC):
    """A scale or zero kept in the encoding of its file, so that writing is exact.

    Subclasses are pytrees of arrays. `qjax.prepare` replaces them by what they decode
    to.
    """

    @abc.abstractmethod
    def decode(self) -> Array:
        """Returns the plain ``[*batch, groups, n]`` array."""

    def for_kernels(self) -> "Array | Encoded":
        """Returns what GPU kernels read in its place; by default what it decodes to."""
        return self.decode()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return jax.eval_shape(type(self).decode, self).shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the decoded array."""
        return jax.eval_shape(type(self).decode, self).dtype


class InSteps(Encoded):
    """A scale of two factors by which upstream multiplies one after the other.

    `decode` gives their product, which is what a prepared tensor has. Of others,
    `qjax.dequantize` rounds after each factor, as upstream does.
    """

    # The factor that comes last; float32.
    last: typing.ClassVar[float]

    @property
    @abc.abstractmethod
    def first(self) -> Array:
        """The factor that comes first, float32 ``[*batch, groups, n]``."""

    def decode(self) -> Array:
        """Returns the product of both."""
        return self.first.astype(jnp.float32) * jnp.float32(self.last)


@typing.overload
def plain(parameter: Array | Encoded) -> Array: ...
@typing.overload
def plain(parameter: Array | Encoded | None) -> Array | None: ...
def plain(parameter: typing.Any) -> typing.Any:  # abstract, too
    """Decodes a scale or zero that is kept in its file's encoding."""
    return parameter.decode() if isinstance(parameter, Encoded) else parameter


def columns(parameter: Array, n: int) -> Array:
    """Gives a scale or zero one value for each of n columns, padding left out."""
    count = parameter.shape[-1]
    if count < n:
        parameter = jnp.repeat(parameter, n // count, axis=-1)
    return parameter[..., :n]


def position(index: int | Integer[Array, ""], count: int) -> Int32[Array, ""]:
    """Returns which of ``count`` matrices an index means, the nearest that there is.

    Args:
      index: From 0, in any integer dtype, also one that cannot hold ``count``.
      count: Matrices of a stack.

    Example:
      >>> position(jnp.uint8(200), 300), position(-1, 3)
      (Array(200, dtype=int32), Array(0, dtype=int32))
    """
    found = jnp.asarray(index)
    if found.dtype.itemsize < 4:
        found = found.astype(jnp.int32)
    return jnp.clip(found, 0, count - 1).astype(jnp.int32)


class Affine(enum.Enum):
    """How a code ``q`` becomes a number; ``s`` is the scale, ``z`` the zero."""

    ZERO = "(q - z) * s"  # GPTQ, AWQ, HQQ
    OFFSET = "q * s + z"  # FlexGen; MBWQ with z = -zeros; AWQ v2
    CENTERED = "(q - 2^(bits-1)) * s + z"  # tinygemm; EXL2 and symmetric without z
    CODEBOOK = "codebook[q] * s"  # NF4, FP4
    FLOAT = "float(q) * s"  # `qjax.tensor.floats`: FP8, NVFP4, MXFP4

    @property
    def counts(self) -> bool:
        """Whether codes count steps, and stand for no table's entries or floats."""
        return self not in (Affine.CODEBOOK, Affine.FLOAT)

    def centre(self, bits: int) -> int:
        """Returns the code that the formula takes off: the middle one, or 0."""
        return 2 ** (bits - 1) if self is Affine.CENTERED else 0


class Grouping(enum.Enum):
    """Which elements share a scale."""

    ROWS = "rows"  # runs of group_size stored rows, in each column
    FLAT = "flat"  # runs of group_size elements of W.T in row-major order
    STRIDED = "strided"  # element f of that order belongs to group f % groups


class Segment(typing.NamedTuple):
    """A run of stored rows whose codes have the same width.

    Attributes:
      bits: Width of a code, 1 to 8.
      group_size: Number of rows (`Grouping.ROWS`) or elements that share a scale; the
        last group may be shorter. None: all rows of the segment share one.
      padding: Rows at the end of the segment's words that hold nothing.
    """

    bits: int
    group_size: int | None
    padding: int = 0
