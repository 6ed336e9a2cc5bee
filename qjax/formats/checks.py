"""Names, dtypes and shapes of a module's tensors against what a format expects."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike


class Expected(NamedTuple):
    """What a tensor may be: its dtypes and its number of axes."""

    dtypes: Sequence[DTypeLike]
    axes: int
    optional: bool = False


def check_tensors(
    tensors: Mapping[str, Any], expected: Mapping[str, Expected], name: str
) -> None:
    """Checks names, dtypes and numbers of axes.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name.
      expected: All tensors that there may be.
      name: Name of the format, for messages.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    for key in (key for key, one in expected.items() if not one.optional):
        if key not in tensors:
            raise ValueError(f"{key} is missing; found {sorted(tensors)}.")
    for key, array in tensors.items():
        if key not in expected:
            raise ValueError(f"{key} is no tensor of {name}; those are {[*expected]}.")
        dtypes, axes, _ = expected[key]
        if array.dtype not in dtypes:
            wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise ValueError(f"{key}.dtype={array.dtype} must be {wanted}.")
        if len(array.shape) != axes:
            raise ValueError(f"{key}.shape={array.shape} must have {axes} axes.")


def check_shapes(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Checks the shapes of those tensors that are there.

    Args:
      tensors: As in `check_tensors`.
      shapes: The shape that each should have.
      source: What these follow from, for messages.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    for key in (key for key in shapes if key in tensors):
        found = tuple(tensors[key].shape)
        if found != shapes[key]:
            raise ValueError(
                f"{key}.shape={found} must be {shapes[key]}, from {source}."
            )


def check_finite(tensors: Mapping[str, Any], names: Sequence[str]) -> None:
    """Checks the values of those tensors that are there.

    Args:
      tensors: Concrete arrays by upstream name.
      names: Those to look at.

    Raises:
      ValueError: If one holds NaN or infinity.
    """
    for key in (key for key in names if key in tensors):
        if not np.isfinite(np.asarray(tensors[key]).astype(np.float32)).all():
            raise ValueError(f"{key} must be finite; found NaN or infinity.")
