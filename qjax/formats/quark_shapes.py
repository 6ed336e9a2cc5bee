"""What Quark's tensors are like: their dtypes, and shapes that follow from each other.

Source: as `quark`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qjax.formats import fp8
from qjax.formats.checks import FLOATS, Expected
from qjax.formats.quark_config import Config
from qjax.formats.quark_scheme import Scheme

OF_WEIGHTS = ("weight", "weight_scale", "weight_scale_2", "weight_zero_point")
_OF_ACTIVATIONS = (
    "input_scale",
    "input_scale_2",
    "input_zero_point",
    "output_zero_point",
)
# The last turn what the weight is multiplied by: no scheme here has them.
TENSORS = (*OF_WEIGHTS, *_OF_ACTIVATIONS, "input_rotation", "input_prescale")
_ANY = (*FLOATS, fp8.E4M3, jnp.int8, jnp.uint8, jnp.int32)


class Extents(NamedTuple):
    """Extents of a matrix, and whether scales of groups are ``[n, groups]``."""

    k: int
    n: int
    groups: int
    by_rows: bool


def scheme_in(config: Config) -> Scheme:
    """The scheme of a module's configuration.

    Raises:
      ValueError: If it has none.
    """
    if config.scheme is None:
        raise ValueError("config.scheme=None must say how the weight is quantized.")
    return config.scheme


def expected(scheme: Scheme) -> dict[str, Expected]:
    """The tensors that a module may have, with their dtypes."""
    stored = scheme.stored.dtype
    scales = (jnp.uint8, jnp.float8_e8m0fnu) if scheme.exponents else FLOATS
    tensors = {
        "weight": Expected((stored,), 2),
        "weight_scale": Expected((fp8.E4M3,) if scheme.nested else scales, None),
        **{name: Expected(_ANY, None, optional=True) for name in _OF_ACTIVATIONS},
    }
    if scheme.nested:
        tensors["weight_scale_2"] = Expected(FLOATS, None)
    if scheme.is_integer:
        points = (jnp.int32, *FLOATS) if scheme.float_zero else (stored,)
        optional = scheme.symmetric and scheme.is_signed
        tensors["weight_zero_point"] = Expected(points, None, optional=optional)
    return tensors


def extents_of(tensors: Mapping[str, Any], config: Config) -> Extents:
    """The extents of a matrix, from those of its weight and scales.

    Args:
      tensors: As in `quark.check`, with the numbers of axes that they should have.
      config: The module's configuration.

    Raises:
      ValueError: If codes do not fill words of 32 bits, or inputs their groups; or if
        scales may be of two matrices.
    """
    scheme, shape = scheme_in(config), tuple(tensors["weight"].shape)
    stored, size = scheme.stored, scheme.group_size
    outer, items = shape
    inner = items // stored.items * stored.codes
    k, n = (outer, inner) if scheme.is_turned else (inner, outer)
    whole = items % stored.items == 0 and (stored.bits != 2 or k % 16 == 0)
    if not k or not n or not whole or k % (size or k):
        raise ValueError(
            f"weight.shape={shape} must have inputs in whole groups of {size} and in "
            f"whole words of 32 bits, here {k} of {scheme.dtype}, and not be empty."
        )
    groups = k // (size or k)
    if not scheme.is_turned:
        return Extents(k, n, groups, by_rows=True)
    return _turned(tuple(tensors["weight_scale"].shape), k, (n, groups), config)


def _turned(
    scale: tuple[int, ...], k: int, most: tuple[int, int], config: Config
) -> Extents:
    """Extents of codes that are packed along n, whose number only the scales tell."""
    (n, groups), codes = most, scheme_in(config).stored.codes
    found = [
        Extents(k, shape[1], groups, by_rows)
        for by_rows, shape in ((False, scale), (True, scale[::-1]))
        if len(shape) == 2 and shape[0] == groups and 0 <= n - shape[1] < codes
    ]
    if len(found) == 2 and not config.versioned:
        raise ValueError(
            f"weight_scale.shape={scale} may be [groups, n] or, as in older files, "
            "[n, groups]; the configuration must have a 'version' to tell."
        )
    return found[0] if found else Extents(k, n, groups, by_rows=False)


def shapes_of(
    scheme: Scheme, extents: Extents
) -> Mapping[str, Sequence[tuple[int, ...]]]:
    """The shapes that tensors beside the weight may have."""
    k, n, groups, by_rows = extents
    packed, one = -(-n // scheme.stored.codes), [(), (1,)]
    match scheme.qscheme:
        case "per_tensor":
            scales = points = one
        case "per_channel":
            scales, points = [(n,), (n, 1)], [(packed,)]
        case "per_group":
            scales = [(n, groups) if by_rows else (groups, n)]
            points = [(groups, packed)]
        case "per_block":
            rows, columns = scheme.block_size or (n, k)
            scales, points = [(-(-n // rows), -(-k // columns))], []
    return {
        "weight_scale": scales,
        "weight_zero_point": scales if scheme.float_zero else points,
        "weight_scale_2": one,
    }
