"""Encoded scales and zeros of a flattened tensor, put together again and checked.

Encodings of one array need nothing of their own; those of several are in `BUILDERS`.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from qjax.formats import (
    block_scale,
    bnb,
    compressed_tensors_floats,
    exl2,
    modelopt,
    mpq,
)
from qjax.formats.checks import FLOATS
from qjax.formats.flattening_metadata import Entries
from qjax.tensor import Encoded, Nested, WithGlobal

# What a number of 16 or 32 bits may be, by its name.
FLOAT_NAMES = {jnp.dtype(dtype).name: jnp.dtype(dtype).name for dtype in FLOATS}


def check_range(name: str, array: Array, last: int) -> None:
    """Checks that the values of an array, if known, lie in 0 to ``last``."""
    if isinstance(array, Tracer):
        return
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > last:
        raise ValueError(
            f"arrays[{name!r}] from {low} to {high} must lie in 0 to {last}."
        )


def _leaves(
    name: str, arrays: Mapping[str, Array], expected: Mapping[str, tuple]
) -> None:
    """Checks names, dtypes and shapes of an encoding's leaves."""
    if arrays.keys() != expected.keys():
        raise ValueError(
            f"{name} has the arrays {sorted(arrays)}; it must have {sorted(expected)}."
        )
    for key, (dtypes, shape) in expected.items():
        array = arrays[key]
        if array.dtype not in dtypes or array.shape != shape:
            wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise ValueError(
                f"arrays['{name}.{key}']={array.dtype}{list(array.shape)} must be "
                f"{wanted}{list(shape)}."
            )


def _exl2_scale(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    del entries
    shape = arrays["index"].shape if "index" in arrays else ()
    expected = {
        "index": ((jnp.uint8,), shape),
        "maximum": ((jnp.float16,), shape[:-1]),
    }
    _leaves(name, arrays, expected)
    check_range(f"{name}.index", arrays["index"], 15)
    return exl2.Scale(**arrays)


def _mpq_numbers(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    del entries
    shape = arrays["index"].shape if "index" in arrays else ()
    one = (*shape[:-1], 1)
    expected = {
        "index": ((jnp.uint8,), shape),
        "zero": (FLOATS, one),
        "step": (FLOATS, one),
    }
    _leaves(name, arrays, expected)
    check_range(f"{name}.index", arrays["index"], 15)
    return mpq.DoubleQuantized(**arrays)


def _stored_global(
    kind: type[Encoded], name: str, arrays: Mapping[str, Array], entries: Entries
) -> Encoded:
    del entries
    _check_global(name, arrays, jnp.uint8)
    return kind(**arrays)


def _with_global(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    divides = entries.flag(f"{name}.divides")
    _check_global(name, arrays, jnp.float16)
    return WithGlobal(divides=divides, **arrays)


def _check_global(name: str, arrays: Mapping[str, Array], dtype: Any) -> None:
    shape = arrays["local"].shape if "local" in arrays else ()
    whole = ((jnp.float32,), shape[:-2])
    _leaves(name, arrays, {"local": ((dtype,), shape), "whole": whole})


def _block_scale(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    rows, of_k = (entries.integer(f"{name}.{key}", 1) for key in ("rows", "columns"))
    exponents = entries.flag(f"{name}.exponents")
    shape = arrays["values"].shape if "values" in arrays else ()
    columns = arrays["block"].shape[-1:] if "block" in arrays else ()
    dtypes = (jnp.uint8,) if exponents else (*FLOATS, jnp.uint8)
    expected = {
        "values": (dtypes, shape),
        "block": ((jnp.int32,), (*shape[:-2], *columns)),
    }
    _leaves(name, arrays, expected)
    check_range(f"{name}.block", arrays["block"], arrays["values"].shape[-1] - 1)
    return block_scale.BlockScale(
        values=arrays["values"],
        block=arrays["block"],
        rows=rows,
        columns=of_k,
        exponents=exponents,
    )


def _bnb_absmax(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    fields = {
        "nested_blocksize": entries.integer(f"{name}.nested_blocksize", 1),
        "quant_type": entries.choice(
            f"{name}.quant_type", {key: key for key in bnb.TABLES}
        ),
        "storage": entries.choice(f"{name}.storage", FLOAT_NAMES | {"uint8": "uint8"}),
    }
    shape = arrays["absmax"].shape if "absmax" in arrays else ()
    batch, count = shape[:-2], math.prod(shape[-2:])
    expected = {"absmax": ((jnp.uint8,), shape)}
    nested = {
        "absmax": ((jnp.float32,), (*batch, -(-count // fields["nested_blocksize"]))),
        "table": ((jnp.float32,), (*batch, 256)),
        "offset": ((jnp.float32,), batch),
    }
    if len(arrays) == 1:
        _leaves(name, arrays, {"absmax": ((jnp.float32,), shape)})
        return bnb.Absmax(absmax=arrays["absmax"], **fields)
    expected |= {f"nested.{key}": value for key, value in nested.items()}
    _leaves(name, arrays, expected)
    leaves = {key: arrays[f"nested.{key}"] for key in nested}
    return bnb.Absmax(absmax=arrays["absmax"], nested=bnb.Nested(**leaves), **fields)


def _nested(name: str, arrays: Mapping[str, Array], entries: Entries) -> Encoded:
    negative = entries.flag(f"{name}.negative")
    factor, step = (
        arrays[key].shape if key in arrays else () for key in ("factor", "step")
    )
    blocks = step[-2:-1] or (1,)
    expected = {
        "factor": ((jnp.int8,), factor),
        "step": ((jnp.float16,), (*factor[:-2], *blocks, *factor[-1:])),
    }
    _leaves(name, arrays, expected)
    if len(factor) < 2 or 0 in blocks or factor[-2] % blocks[0]:
        raise ValueError(
            f"arrays['{name}.step'] of {blocks} blocks must have a divisor of the "
            f"groups of arrays['{name}.factor'], whose shape is {factor}."
        )
    return Nested(negative=negative, **arrays)


# Of encodings with several arrays, which must fit together.
BUILDERS: Mapping[type, Callable[[str, Mapping[str, Array], Entries], Encoded]] = (
    types.MappingProxyType(
        {
            exl2.Scale: _exl2_scale,
            mpq.DoubleQuantized: _mpq_numbers,
            bnb.Absmax: _bnb_absmax,
            block_scale.BlockScale: _block_scale,
            **{
                kind: functools.partial(_stored_global, kind)
                for kind in (compressed_tensors_floats.OverGlobal, modelopt.TimesGlobal)
            },
            Nested: _nested,
            WithGlobal: _with_global,
        }
    )
)
