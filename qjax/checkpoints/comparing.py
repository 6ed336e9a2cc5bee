"""Two checkpoints of one model, tensor by tensor: how far they are apart."""

import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from qjax import ops, progress, tensor
from qjax.checkpoints import gguf, modules
from qjax.checkpoints.config import read_config
from qjax.checkpoints.differences import Comparison, Difference, Held, Shape
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.quantizing import conv1d
from qjax.checkpoints.shards import Stored
from qjax.tensor import QTensor

# So many numbers of two dense tensors are read at a time.
_RUN = 1 << 24
# So many are widened to float64 at a time, and stay in a processor's cache.
_CHUNK = 1 << 15

Part = Matrix | Stored


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """Compares the weights of two checkpoints of one model, tensor by tensor.

    Tensors go by their names; a quantized matrix "up_proj" is also compared with a
    dense "up_proj.weight", of which files hold the transpose. Weights are what
    `qjax.dequantize` makes of them in float32, in the order of the inputs also where
    act-order stores rows in another; their differences and sums are float64. Memory
    holds one tensor of each side at a time, and of a stack one matrix unpacked.

    They are compared as they are: where a quantizer moved factors from a matrix into
    the norm before it, as AWQ does, both are far from what they were, although the
    model computes nearly the same.

    Args:
      a: A directory or a GGUF file, dense or quantized, as in `load`. Errors are
        relative to its weights.
      b: Another.

    Returns:
      A `Difference` of each tensor that both have; names and shapes that differ.

    Raises:
      FileNotFoundError: As `load`, for either.
      ValueError: As `load`, for either; or if no matrix is in both, and so nothing says
        that they are the same model.

    Example:
      >>> found = compare("tests/data/llama_bf16", "examples/llm/checkpoint")
      >>> found.is_one_model, len(found.tensors)
      (True, 30)
      >>> worst = max(found.tensors, key=lambda one: one.relative_error)
      >>> worst.name, worst.a.bits, worst.b.bits, round(worst.relative_error, 3)
      ('model.layers.0.mlp.down_proj', 16, 4, 0.17)
    """
    first, second = _open(a), _open(b)
    pairs = _pairs(first, second)
    if not any(pair.is_matrix for pair in pairs):
        raise ValueError(_no_matrix(first, second))
    differences: list[Difference] = []
    other_shapes: dict[str, tuple[Shape, Shape]] = {}
    with progress.bar(
        sum(pair.nbytes for pair in pairs), "Comparing weights"
    ) as advance:
        for pair in pairs:
            found = _look(pair)
            if isinstance(found, Difference):
                differences.append(found)
            else:
                other_shapes[pair.name] = found
            advance(pair.nbytes)
    return Comparison(
        tensors=tuple(differences),
        only_in_a=_rest(first, [pair.a for pair in pairs]),
        only_in_b=_rest(second, [pair.b for pair in pairs]),
        other_shapes=other_shapes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """A checkpoint of which only the headers have been read.

    Attributes:
      path: Its directory or file.
      parts: As `modules.open_parts` gives them.
      conv1d: Last names of modules that hold dense weights ``[k, n]``.
    """

    path: Path
    parts: Mapping[str, Part]
    conv1d: Collection[str]

    def counterpart(self, part: Part) -> Part | None:
        """Finds by its name what this checkpoint has of a part of another one."""
        if part.name in self.parts:
            return self.parts[part.name]
        if isinstance(part, Matrix):
            return self.parts.get(f"{part.name}.weight")
        packed = self.parts.get(part.name.removesuffix(".weight"))
        return packed if isinstance(packed, Matrix) else None

    def has_transposed(self, part: Part) -> bool:
        """Whether a part of this checkpoint is the ``[n, k]`` of a linear layer.

        Dense tensors with the name of a matrix itself, as gpt-oss has them of its
        experts, are ``[k, n]``.
        """
        module, _, last = part.name.rpartition(".")
        is_dense = isinstance(part, Stored) and last == "weight"
        return is_dense and module.rpartition(".")[2] not in self.conv1d


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """What two checkpoints have of one tensor.

    Attributes:
      a: The part of the first.
      b: The part of the second.
      is_turned: Whether one is quantized, and the other dense and its transpose.
    """

    a: Part
    b: Part
    is_turned: bool

    @property
    def name(self) -> str:
        return self.b.name if isinstance(self.b, Matrix) else self.a.name

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def is_matrix(self) -> bool:
        return any(
            isinstance(part, Matrix) or len(part.shape) > 1 for part in (self.a, self.b)
        )


def _open(path: str | os.PathLike[str]) -> _Checkpoint:
    parts = modules.open_parts(path)
    config = {} if gguf.is_file(path) else read_config(path)
    return _Checkpoint(path=Path(path), parts=parts, conv1d=conv1d(config).keys())


def _pairs(a: _Checkpoint, b: _Checkpoint) -> list[_Pair]:
    pairs = []
    for part in a.parts.values():
        other = b.counterpart(part)
        if other is not None:
            packed = isinstance(part, Matrix) or isinstance(other, Matrix)
            turned = packed and (a.has_transposed(part) or b.has_transposed(other))
            pairs.append(_Pair(a=part, b=other, is_turned=turned))
    return pairs


def _rest(checkpoint: _Checkpoint, paired: Sequence[Part]) -> tuple[str, ...]:
    """Names of what a checkpoint has and the other one has not."""
    names = {part.name for part in paired}
    return tuple(name for name in checkpoint.parts if name not in names)


def _no_matrix(a: _Checkpoint, b: _Checkpoint) -> str:
    """Says that two checkpoints have no matrix in common, and what to do."""
    said = (
        f"no matrix is in both {a.path} and {b.path}: the one has such names as "
        f"{_example(a)}, the other {_example(b)}. Both must be of one model, and name "
        "its tensors alike"
    )
    if gguf.is_file(a.path) == gguf.is_file(b.path):
        return f"{said}."
    return (
        f"{said}; a GGUF file has llama.cpp's names, and some of its matrices have "
        "their rows in another order. Compare it with a GGUF file of the dense model, "
        "as llama.cpp's convert_hf_to_gguf.py makes it."
    )


def _example(checkpoint: _Checkpoint) -> str:
    """The name of a matrix, a quantized one if there is any."""
    parts = checkpoint.parts.values()
    quantized = [part.name for part in parts if isinstance(part, Matrix)]
    return repr(next(iter([*quantized, *checkpoint.parts]), None))


def _look(pair: _Pair) -> Difference | tuple[Shape, Shape]:
    """Reads both parts and compares them; gives their shapes if these differ."""
    a, b = _opened(pair.a), _opened(pair.b)
    shape, other = _shape(a, pair.is_turned), _shape(b, pair.is_turned)
    if shape != other:
        return shape, other
    sums = [
        _measured(*chunk)
        for slices in _slices(a, b, pair.is_turned)
        for chunk in _chunks(*slices)
    ]
    return Difference(
        name=pair.name,
        shape=shape,
        a=_held(pair.a, a, sum(one.not_finite[0] for one in sums)),
        b=_held(pair.b, b, sum(one.not_finite[1] for one in sums)),
        lost=math.fsum(one.lost for one in sums),
        energy=math.fsum(one.energy for one in sums),
        largest=max((one.largest for one in sums), default=0.0),
        same_codes=_same_codes(a, b),
    )


def _opened(part: Part) -> QTensor | Stored:
    """Reads a matrix; dense tensors are read slice by slice."""
    return part.read() if isinstance(part, Matrix) else part


def _shape(one: QTensor | Stored, is_turned: bool) -> Shape:
    if isinstance(one, Stored) and is_turned:
        return (*one.shape[:-2], *one.shape[-2:][::-1])
    return one.shape


def _held(part: Part, one: QTensor | Stored, not_finite: int) -> Held:
    packed = isinstance(one, QTensor)
    return Held(
        format=part.dialect if isinstance(part, Matrix) else part.dtype.name,
        is_quantized=packed,
        bits=one.bits if packed else 8 * one.dtype.itemsize,
        nbytes=part.nbytes,
        not_finite=not_finite,
    )


def _slices(
    a: QTensor | Stored, b: QTensor | Stored, is_turned: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of both, where both are dense in runs, else a matrix at a time."""
    if isinstance(a, Stored) and isinstance(b, Stored):
        for ranges in _runs(a.shape):
            yield a.piece(ranges).read().reshape(-1), b.piece(ranges).read().reshape(-1)
        return
    for index in np.ndindex(*a.shape[:-2]):
        yield _weight(a, index, is_turned), _weight(b, index, is_turned)


def _runs(shape: Shape) -> Iterator[list[slice]]:
    """Cuts a shape along its first axis."""
    if not shape:
        yield []
        return
    rest = [slice(None)] * (len(shape) - 1)
    step = max(1, _RUN // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield [slice(first, first + step), *rest]


def _weight(
    one: QTensor | Stored, index: Shape, is_turned: bool
) -> Float[np.ndarray, "k n"]:
    """A matrix, of a stack the one at ``index``; dense ones have the file's dtype."""
    if isinstance(one, QTensor):
        return np.asarray(ops.dequantize(_picked(one, index), jnp.float32))
    ranges = [*(slice(i, i + 1) for i in index), slice(None), slice(None)]
    w = one.piece(ranges).read().reshape(one.shape[-2:])
    return w.T if is_turned else w


def _picked(qt: QTensor, index: Shape) -> QTensor:
    return jax.tree.map(lambda leaf: leaf[index], qt) if index else qt


def _same_codes(a: QTensor | Stored, b: QTensor | Stored) -> bool | None:
    if not isinstance(a, QTensor) or not isinstance(b, QTensor):
        return None
    return all(
        np.array_equal(_codes(_picked(a, index)), _codes(_picked(b, index)))
        for index in np.ndindex(*a.batch)
    )


def _codes(qt: QTensor) -> UInt8[np.ndarray, "k n"]:
    """Codes of a matrix, in the order of its inputs."""
    order = tensor.plain(qt.order)
    return qt.numpy() if order is None else qt.numpy()[np.argsort(order)]


def _chunks(
    a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[Float[np.ndarray, " size"], Float[np.ndarray, " size"]]]:
    """Widens both to float64, some rows at a time."""
    step = max(1, _CHUNK // max(1, math.prod(a.shape[1:])))
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        yield a[rows].astype(np.float64).ravel(), b[rows].astype(np.float64).ravel()


class _Sums(NamedTuple):
    """Of some numbers, what `Difference` and `Held` say of all."""

    lost: float
    energy: float
    largest: float
    not_finite: tuple[int, int]


def _measured(a: Float[np.ndarray, " size"], b: Float[np.ndarray, " size"]) -> _Sums:
    # Infinity less infinity is NaN, and looked at below.
    with np.errstate(invalid="ignore"):
        off = np.abs(a - b)
        lost = _squares(off)
    if math.isfinite(lost):  # No square of float32 is too large for float64.
        return _Sums(lost, _squares(a), float(off.max(initial=0)), (0, 0))
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    off = np.where(equal, 0.0, np.where(np.isfinite(off), off, np.inf))
    finite = np.where(np.isfinite(a), a, 0.0)
    return _Sums(
        lost=_squares(off),
        energy=_squares(finite),
        largest=float(off.max()),
        not_finite=(int(np.sum(~np.isfinite(a))), int(np.sum(~np.isfinite(b)))),
    )


def _squares(x: Float[np.ndarray, " size"]) -> float:
    # Not x @ x: the threads of BLAS cost more than they save on so few numbers.
    return float(np.square(x).sum())
