"""A quantized matrix in files, before and while it is read."""

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qjax.checkpoints.shards import Stored
from qjax.formats import FORMATS
from qjax.tensor import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantized matrix in files, of which only the headers have been read.

    Attributes:
      name: Path of the module.
      tensors: Its tensors by their names below the module.
      format: The module of `FORMATS` that reads it.
      config: That format's ``Config`` for this module.
    """

    name: str
    tensors: Mapping[str, Stored]
    format: types.ModuleType
    config: Any

    @property
    def dialect(self) -> str:
        """Name of the format, with the version of GPTQ's."""
        names = [name for name, module in FORMATS.items() if module is self.format]
        return getattr(self.config, "checkpoint_format", names[0])

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def stacked(self) -> int:
        """How many axes of a stack lead those of the tensors, where `piece` cuts it."""
        axes = next(iter(self._axes.values()), ())
        return sum(axis.startswith("b") for axis in axes)

    @property
    def _axes(self) -> Mapping[str, tuple[str, ...]]:
        return getattr(self.format, "axes", lambda *_: {})(self.tensors, self.config)

    def check(self) -> None:
        """Checks names, dtypes and shapes against the format."""
        try:
            self.format.check(self.tensors, self.config)
        except ValueError as error:
            raise self._fault(error) from None

    def read(self) -> QTensor:
        """Reads the matrix in the layout of the file."""
        arrays = {name: _given(stored.read()) for name, stored in self.tensors.items()}
        return self._built(arrays)

    def piece(self, at: Mapping[str, int], of: Mapping[str, int]) -> "Matrix | None":
        """Picks one of equal pieces as a matrix of its own, and reads nothing.

        Args:
          at: Which one, along "k", "n" and the axes of a stack, "b0" and so on.
          of: Into how many the matrix is cut. Along k its groups must be runs of rows,
            which ``g_idx`` is then not needed to say.

        Returns:
          The piece, or None where the files do not hold it by itself.
        """
        axes = self._axes
        present = {axis for names in axes.values() for axis in names}
        wanted = {axis for axis, count in of.items() if count > 1}
        if axes.keys() != self.tensors.keys() or wanted - present:
            return None
        pieces = {}
        for name, stored in self.tensors.items():
            if axes[name] == ("k",) and of["k"] > 1:
                continue
            ranges = []
            for size, axis in zip(stored.shape, axes[name], strict=True):
                # All of a column may share a scale.
                count = 1 if size == 1 else of.get(axis, 1)
                if size % count:
                    return None
                share, first = size // count, at[axis] if count > 1 else 0
                ranges.append(slice(first * share, (first + 1) * share))
            pieces[name] = stored.piece(ranges)
        matrix = dataclasses.replace(self, tensors=pieces)
        with contextlib.suppress(ValueError):
            matrix.check()
            return matrix
        return None

    def blank(self) -> QTensor:
        """A matrix of zeros of the same structure; of the files, ``g_idx`` is read."""
        arrays = {
            name: stored.read()
            if len(stored.shape) == 1
            else np.zeros(stored.shape, stored.dtype)
            for name, stored in self.tensors.items()
        }
        return self._built(arrays)

    def _built(self, arrays: Mapping[str, Any]) -> QTensor:
        try:
            return self.format.from_tensors(arrays, self.config)
        except ValueError as error:
            raise self._fault(error) from None

    def _fault(self, error: ValueError) -> ValueError:
        files = sorted({str(stored.file) for stored in self.tensors.values()})
        return ValueError(f"{', '.join(files)}: {self.name}: {error}")


def _given(array: np.ndarray) -> np.ndarray | jax.Array:
    """Gives an array to JAX, which takes its memory; `jnp.asarray` would copy it.

    Not 64 bits, which JAX would cut to 32 before anyone has looked at the values.
    """
    whole = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jax.device_put(array) if whole else array
