"""What there is to say of two checkpoints of one model, tensor by tensor."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What one of two checkpoints holds of a tensor.

    Attributes:
      format: Format of a quantized matrix, or the dtype of a dense tensor.
      is_quantized: Whether it is a quantized matrix.
      bits: Width of a code, the mean if the rows differ; or of a dense number.
      nbytes: Bytes in the files, of a matrix those of scales and zeros, too.
      not_finite: How many of its numbers are NaN or infinite.
    """

    format: str
    is_quantized: bool
    bits: int | float
    nbytes: int
    not_finite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a tensor of one checkpoint is from that of another.

    Attributes:
      name: Path of the module of a matrix that either holds quantized; else the full
        name of the tensor.
      shape: ``(*stack, k, n)`` of such a matrix; else that in the files.
      a: What the first checkpoint holds.
      b: What the second one holds.
      lost: Sum of the squares of ``a - b``, which is 0 where both are NaN or the same
        infinity, and infinite where else one of them is not finite.
      energy: Sum of the squares of ``a``, of its finite numbers.
      largest: The largest ``|a - b|``.
      same_codes: Whether both hold the same integer codes, in the order of the inputs;
        None unless both are quantized.
    """

    name: str
    shape: Shape
    a: Held
    b: Held
    lost: float
    energy: float
    largest: float
    same_codes: bool | None

    @property
    def weights(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> tuple[float, float] | None:
        """All bits in the files by the weights, on either side; None of no weights."""
        return _bits_per_weight((self.a.nbytes, self.b.nbytes), self.weights)

    @property
    def is_quantized(self) -> bool:
        """Whether a checkpoint, or both, hold it quantized."""
        return self.a.is_quantized or self.b.is_quantized

    @property
    def same_values(self) -> bool:
        """Whether all numbers are equal, whatever dtype or packing holds them."""
        return self.largest == 0

    @property
    def relative_error(self) -> float:
        """``norm(a - b) / norm(a)``, Frobenius norms; 0 where nothing differs."""
        return _relative(self.lost, self.energy)

    @property
    def snr_db(self) -> float:
        """The signal-to-noise ratio in decibels; infinite where nothing differs."""
        return _decibels(self.relative_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """What several differences come to.

    Attributes:
      count: How many tensors they are of.
      same: How many of these have equal values.
      weights: How many numbers they have.
      nbytes: Bytes in the files of the first checkpoint, and of the second.
      relative_error: As in `Difference`, of all numbers as if of one tensor.
    """

    count: int
    same: int
    weights: int
    nbytes: tuple[int, int]
    relative_error: float

    @property
    def bits_per_weight(self) -> tuple[float, float] | None:
        """As in `Difference`."""
        return _bits_per_weight(self.nbytes, self.weights)

    @property
    def snr_db(self) -> float:
        """As in `Difference`."""
        return _decibels(self.relative_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` finds.

    Attributes:
      tensors: Those that both checkpoints have, in the order of the first.
      only_in_a: Names that only the first has.
      only_in_b: Names that only the second has.
      other_shapes: The shapes on either side of tensors that have the same name and
        other shapes, and were not compared.
    """

    tensors: tuple[Difference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shapes: Mapping[str, tuple[Shape, Shape]]

    @property
    def is_one_model(self) -> bool:
        """Whether both have the same names and shapes."""
        return not (self.only_in_a or self.only_in_b or self.other_shapes)

    @property
    def total(self) -> Total:
        """What all differences come to."""
        return total(self.tensors)


def total(differences: Sequence[Difference]) -> Total:
    """Adds up differences, of matrices alone for example."""
    return Total(
        count=len(differences),
        same=sum(one.same_values for one in differences),
        weights=sum(one.weights for one in differences),
        nbytes=(
            sum(one.a.nbytes for one in differences),
            sum(one.b.nbytes for one in differences),
        ),
        relative_error=_relative(
            math.fsum(one.lost for one in differences),
            math.fsum(one.energy for one in differences),
        ),
    )


def _bits_per_weight(
    nbytes: tuple[int, int], weights: int
) -> tuple[float, float] | None:
    if not weights:
        return None
    return 8 * nbytes[0] / weights, 8 * nbytes[1] / weights


def _relative(lost: float, energy: float) -> float:
    if lost == 0:
        return 0.0
    return math.sqrt(lost / energy) if energy else math.inf


def _decibels(relative_error: float) -> float:
    return -20 * math.log10(relative_error) if relative_error else math.inf
