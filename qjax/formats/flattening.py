"""A `QTensor` taken apart into named arrays and plain metadata, for files of any kind.

Arrays have the names of the leaves: "words.0", "scale", "zero", "order"; those of an
encoding are one level deeper, as "scale.index". The metadata is one flat object of
strings and integers, which JSON or the header of a file holds as it is: "layout" and
"scale" name classes of `qjax.formats`, "layout.k" is a field of the layout and
"segments.0.bits" one of a segment; what is None is left out.

The promise is that of optimum-quanto's ``__tensor_flatten__`` and
``__tensor_unflatten__``: huggingface/optimum-quanto,
optimum/quanto/tensor/weights/awq/packed.py, commit
2cdc58089254e36a873f30bcbdff428e6b74d60e.
"""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from qjax import formats, tensor
from qjax.formats import (
    block_scale,
    bnb,
    compressed_tensors_floats,
    exl2,
    modelopt,
    mpq,
    tiles,
)
from qjax.formats.checks import FLOATS
from qjax.sharding import joined
from qjax.tensor import (
    Affine,
    Encoded,
    Grouping,
    Layout,
    Nested,
    QTensor,
    Segment,
    WithGlobal,
    check_packed,
    levels,
)

FORMAT, VERSION = "qjax.QTensor", 1
Plain = str | int
# 64-bit numbers would lose half of their bits on the way to a device.
_DTYPES = (*FLOATS, jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint16, jnp.uint32)
_FLOATS = {jnp.dtype(dtype).name: jnp.dtype(dtype).name for dtype in FLOATS}
_LARGEST = 2**31 - 1
_VECTORS = ("order", "row_group", "codebook", "input_scale")

_MODULES = [getattr(formats, name) for name in formats.__all__ if name.islower()]
_MODULES += [block_scale, compressed_tensors_floats, levels]
_MODULES.append(tiles)  # no file holds it, but a prepared tensor does


def _defined(base: type) -> Mapping[str, type]:
    """Subclasses that the modules of `qjax.formats` define, as "gptq.Stream"."""
    return types.MappingProxyType(
        {
            f"{module.__name__.rpartition('.')[2]}.{kind.__name__}": kind
            for module in _MODULES
            for kind in vars(module).values()
            if isinstance(kind, type)
            and issubclass(kind, base)
            and kind.__module__ == module.__name__
            and not inspect.isabstract(kind)
        }
    )


# What metadata may name. A name from a file is a key here, and nothing is imported.
LAYOUTS = _defined(Layout)
ENCODINGS = _defined(Encoded)


def flatten(qt: QTensor) -> tuple[dict[str, Array], dict[str, Plain]]:
    """Takes a tensor apart into arrays and plain metadata.

    Args:
      qt: A quantized tensor, stacked or not, in any layout of `LAYOUTS`.

    Returns:
      The leaves by name, as they are; and strings and integers that say the rest, which
      `json.dumps` accepts.

    Raises:
      TypeError: If ``qt`` is no `QTensor`.
      ValueError: If the layout or an encoding is none of `qjax.formats`.

    Example:
      >>> w = qjax.quantize(jnp.eye(64), bits=3, group_size=32)
      >>> arrays, metadata = flatten(w)
      >>> list(arrays), metadata["layout"], metadata["segments.0.bits"]
      (['words.0', 'scale', 'zero'], 'gptq.Stream', 3)
      >>> unflatten(arrays, metadata)
      QTensor(64x64, 3 bits, group 32, Stream(), (q - z) * s, float32 scale, 2.125 KiB)
    """
    check_packed(qt, "qt")
    qt = joined(qt)
    leaves = jax.tree_util.tree_leaves_with_path(qt)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }
    metadata: dict[str, Plain] = {
        "format": FORMAT,
        "version": VERSION,
        "affine": qt.affine.name,
        "grouping": qt.grouping.name,
        "rounding": qt.rounding,
        "padding": qt.padding,
        "segments": len(qt.segments),
        **({"weight_dtype": qt.weight_dtype} if qt.weight_dtype else {}),
        **_described("layout", qt.layout, LAYOUTS),
    }
    for i, segment in enumerate(qt.segments):
        metadata |= _set(f"segments.{i}", segment._asdict())
    for name in ("scale", "zero"):
        if isinstance(getattr(qt, name), Encoded):
            metadata |= _described(name, getattr(qt, name), ENCODINGS)
    return arrays, metadata


def _described(name: str, value: Any, classes: Mapping[str, type]) -> dict[str, Plain]:
    """The name of an object's class, and those of its fields that are no arrays."""
    kinds = [key for key, kind in classes.items() if kind is type(value)]
    if not kinds:
        raise ValueError(
            f"{name}={value!r} must be one of {list(classes)} to be flattened; "
            "qjax.relayout changes the layout, and qjax.prepare decodes scales."
        )
    static = {field.name: getattr(value, field.name) for field in _static(type(value))}
    # A flag is 1, or not there.
    static = {
        k: v if type(v) is not bool else int(v) or None for k, v in static.items()
    }
    return {name: kinds[0]} | _set(name, static)


def _static(kind: type) -> list[dataclasses.Field]:
    encoded = issubclass(kind, Encoded)
    fields = dataclasses.fields(kind)
    return [field for field in fields if not encoded or field.metadata.get("static")]


def _set(name: str, values: Mapping[str, Any]) -> dict[str, Plain]:
    return {f"{name}.{k}": value for k, value in values.items() if value is not None}


def unflatten(arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> QTensor:
    """Puts a tensor together again; the inverse of `flatten`.

    Both may come from a file: nothing is taken on trust, and what a name stands for is
    looked up in `LAYOUTS` and `ENCODINGS`.

    Args:
      arrays: JAX or NumPy arrays by the names of `flatten`.
      metadata: As `flatten` returns it, also after a way through JSON.

    Returns:
      A tensor equal to the one that was flattened. NumPy arrays are moved to the
      default device; others stay where they are.

    Raises:
      ValueError: If a name, a type, a dtype, a shape or an index is not sound, saying
        which, what it is and what it must be.

    Example:
      >>> import json
      >>> w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
      >>> arrays, metadata = flatten(w)
      >>> again = unflatten(arrays, json.loads(json.dumps(metadata)))
      >>> jax.tree.structure(again) == jax.tree.structure(w)
      True
    """
    entries, held = _Entries(metadata), _arrays(arrays)
    entries.choice("format", {FORMAT: None})
    entries.integer("version", VERSION, VERSION)
    segments = _segments(entries, held)
    fields = {
        "layout": _layout(entries),
        "affine": entries.choice("affine", Affine.__members__),
        "grouping": entries.choice("grouping", Grouping.__members__),
        "rounding": entries.integer("rounding", 1, 2),
        "padding": entries.integer("padding"),
        "weight_dtype": entries.optional("weight_dtype", _FLOATS),
    }
    words = [held.pop(f"words.{i}") for i in range(len(segments))]
    scale, zero = (_parameter(name, entries, held) for name in ("scale", "zero"))
    if scale is None:
        raise ValueError("arrays['scale'] is missing.")
    fields |= {name: held.pop(name) for name in _VECTORS if name in held}
    entries.close()
    if held:
        raise ValueError(
            f"arrays has {sorted(held)}, which are no leaves of a QTensor."
        )
    _check_words(words, segments, fields["layout"], fields["padding"])
    qt = tensor.build(words, scale, zero, segments=segments, **fields)
    _check_indices(qt)
    return qt


class _Entries:
    """Metadata that is taken out entry by entry, each checked."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._left = dict(metadata)

    def has(self, key: str) -> bool:
        return key in self._left

    def integer(self, key: str, low: int = 0, high: int = _LARGEST) -> int:
        value = self._left.pop(key, None)
        # JSON's true is no number.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"metadata[{key!r}]={value!r} must be an integer from {low} to {high}."
            )
        return value

    def flag(self, key: str) -> bool:
        return self.has(key) and self.integer(key, 1, 1) == 1

    def choice(self, key: str, values: Mapping[str, Any]) -> Any:
        value = self._left.pop(key, None)
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"metadata[{key!r}]={value!r} must be in {[*values]}.")
        return values[value]

    def optional(self, key: str, values: Mapping[str, Any]) -> Any:
        return self.choice(key, values) if self.has(key) else None

    def close(self) -> None:
        if self._left:
            raise ValueError(
                f"metadata has {sorted(map(str, self._left))}, which say nothing."
            )


def _arrays(arrays: Mapping[str, Any]) -> dict[str, Array]:
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray) or array.dtype not in _DTYPES:
            found = getattr(array, "dtype", type(array).__name__)
            wanted = ", ".join(jnp.dtype(dtype).name for dtype in _DTYPES)
            raise ValueError(
                f"arrays[{name!r}] of {found} must be an array of one of {wanted}."
            )
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _segments(entries: _Entries, held: Mapping[str, Array]) -> list[Segment]:
    # The arrays that are there bound what a wrong number of segments can ask for.
    names = [f"words.{i}" for i in range(entries.integer("segments", 1, len(held)))]
    for name in names:
        if name not in held:
            raise ValueError(f"arrays[{name!r}] is missing; found {sorted(held)}.")
    return [
        Segment(
            bits=entries.integer(f"segments.{i}.bits", 1, 8),
            group_size=_optional(entries, f"segments.{i}.group_size"),
            padding=entries.integer(f"segments.{i}.padding"),
        )
        for i in range(len(names))
    ]


def _optional(entries: _Entries, key: str) -> int | None:
    return entries.integer(key, 1) if entries.has(key) else None


def _layout(entries: _Entries) -> Layout:
    kind, fields = entries.choice("layout", LAYOUTS), {}
    for field in _static(kind):
        key = f"layout.{field.name}"
        if field.name == "axis":
            fields["axis"] = entries.integer(key, 0, 1)
        elif field.type is bool:
            fields[field.name] = entries.has(key) and entries.integer(key, 1, 1) == 1
        elif field.type == int | None:
            fields[field.name] = _optional(entries, key)
        else:  # Extents, of k or of a tile.
            fields[field.name] = entries.integer(key, 1)
    return kind(**fields)


def _check_words(
    words: list[Array], segments: list[Segment], layout: Layout, padding: int
) -> None:
    """Checks that the layout writes words of these shapes, with room for padding."""
    for i, (array, segment) in enumerate(zip(words, segments, strict=True)):
        name = f"arrays['words.{i}']={array.dtype}{list(array.shape)}"
        if array.ndim < layout.rank or 0 in array.shape:
            raise ValueError(
                f"{name} must have at least {layout.rank} axes and not be empty."
            )
        matrix = jax.ShapeDtypeStruct(tensor.matrix_shape(array, layout), array.dtype)
        k, n = layout.extents(matrix.shape, segment.bits)
        if k <= segment.padding or n <= padding:
            raise ValueError(
                f"{name} holds {k}x{n} codes and must hold more than the "
                f"padding of {segment.padding} rows and {padding} columns."
            )

        def again(words: Array, bits: int = segment.bits) -> Array:
            return layout.pack(layout.unpack(words, bits), bits)

        written = jax.eval_shape(again, matrix)
        if written.shape != matrix.shape:
            raise ValueError(
                f"{name} must be {list(written.shape)} a matrix for {layout!r}."
            )


def _parameter(
    name: str, entries: _Entries, held: dict[str, Array]
) -> Array | Encoded | None:
    """Takes the scale or the zero out of the arrays, plain or encoded."""
    if not entries.has(name):
        return held.pop(name, None)
    kind = entries.choice(name, ENCODINGS)
    leaves = {key: held.pop(key) for key in [*held] if key.startswith(f"{name}.")}
    arrays = {key.removeprefix(f"{name}."): leaf for key, leaf in leaves.items()}
    if kind in _BUILDERS:
        return _BUILDERS[kind](name, arrays, entries)
    # One array alone fits together with itself; `build` checks what it decodes to.
    (field,) = dataclasses.fields(kind)
    if [*arrays] != [field.name]:
        raise ValueError(
            f"{name}: arrays has {sorted(leaves)}, not ['{name}.{field.name}']."
        )
    return kind(**arrays)


def _check_indices(qt: QTensor) -> None:
    """Checks the values that pick rows; others are clamped where they are used."""
    if qt.order is not None and not isinstance(qt.order, Tracer):
        rows = np.sort(np.asarray(qt.order), axis=-1)
        if (rows != np.arange(qt.k)).any():
            raise ValueError("arrays['order'] must be a permutation of the inputs.")
    if qt.row_group is not None:
        _at_most("row_group", qt.row_group, qt.scale.shape[-2] - 1)


def _at_most(name: str, array: Array, last: int) -> None:
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


def _exl2_scale(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
    del entries
    shape = arrays["index"].shape if "index" in arrays else ()
    expected = {
        "index": ((jnp.uint8,), shape),
        "maximum": ((jnp.float16,), shape[:-1]),
    }
    _leaves(name, arrays, expected)
    _at_most(f"{name}.index", arrays["index"], 15)
    return exl2.Scale(**arrays)


def _mpq_numbers(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
    del entries
    shape = arrays["index"].shape if "index" in arrays else ()
    one = (*shape[:-1], 1)
    expected = {
        "index": ((jnp.uint8,), shape),
        "zero": (FLOATS, one),
        "step": (FLOATS, one),
    }
    _leaves(name, arrays, expected)
    _at_most(f"{name}.index", arrays["index"], 15)
    return mpq.DoubleQuantized(**arrays)


def _stored_global(
    kind: type[Encoded], name: str, arrays: Mapping[str, Array], entries: _Entries
) -> Encoded:
    del entries
    _check_global(name, arrays, jnp.uint8)
    return kind(**arrays)


def _with_global(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
    divides = entries.flag(f"{name}.divides")
    _check_global(name, arrays, jnp.float16)
    return WithGlobal(divides=divides, **arrays)


def _check_global(name: str, arrays: Mapping[str, Array], dtype: Any) -> None:
    shape = arrays["local"].shape if "local" in arrays else ()
    whole = ((jnp.float32,), shape[:-2])
    _leaves(name, arrays, {"local": ((dtype,), shape), "whole": whole})


def _block_scale(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
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
    _at_most(f"{name}.block", arrays["block"], arrays["values"].shape[-1] - 1)
    return block_scale.BlockScale(
        values=arrays["values"],
        block=arrays["block"],
        rows=rows,
        columns=of_k,
        exponents=exponents,
    )


def _bnb_absmax(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
    fields = {
        "nested_blocksize": entries.integer(f"{name}.nested_blocksize", 1),
        "quant_type": entries.choice(
            f"{name}.quant_type", {key: key for key in bnb.TABLES}
        ),
        "storage": entries.choice(f"{name}.storage", _FLOATS | {"uint8": "uint8"}),
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


def _nested(name: str, arrays: Mapping[str, Array], entries: _Entries) -> Encoded:
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
_BUILDERS: Mapping[type, Callable[[str, Mapping[str, Array], _Entries], Encoded]] = (
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
