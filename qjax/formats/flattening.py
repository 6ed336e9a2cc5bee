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
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from qjax import formats, tensor
from qjax.formats import (
    block_scale,
    bnb_int8,
    compressed_tensors_floats,
    tiles,
    torchao_bytes,
)
from qjax.formats.checks import FLOATS
from qjax.formats.flattening_metadata import Entries
from qjax.formats.flattening_scales import BUILDERS, FLOAT_NAMES, check_range
from qjax.sharding import joined
from qjax.tensor import (
    Affine,
    Encoded,
    Grouping,
    Layout,
    QTensor,
    Segment,
    check_packed,
    levels,
)

FORMAT, VERSION = "qjax.QTensor", 1
Plain = str | int
# 64-bit numbers would lose half of their bits on the way to a device.
_DTYPES = (*FLOATS, jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint16, jnp.uint32)
_VECTORS = ("order", "row_group", "codebook", "input_scale")

_MODULES = [getattr(formats, name) for name in formats.__all__ if name.islower()]
_MODULES += [block_scale, bnb_int8, compressed_tensors_floats, levels]
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
LAYOUTS: Mapping[str, type] = types.MappingProxyType(
    # The name is older than the module.
    {**_defined(Layout), "torchao.Bytes": torchao_bytes.Bytes}
)
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
    metadata = {"format": FORMAT, "version": VERSION, **describe(qt)}
    for name in ("scale", "zero"):
        if isinstance(getattr(qt, name), Encoded):
            metadata |= _described(name, getattr(qt, name), ENCODINGS)
    return arrays, metadata


def describe(qt: Any) -> dict[str, Plain]:
    """Says what is static of a tensor, or of anything with the same attributes."""
    metadata: dict[str, Plain] = {
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
    return metadata


def static_fields(entries: Entries, most: int) -> dict[str, Any]:
    """Takes what `describe` says out of metadata, as fields of a `QTensor`.

    A number of segments above ``most`` is refused.
    """
    segments = [
        Segment(
            bits=entries.integer(f"segments.{i}.bits", 1, 8),
            group_size=entries.extent(f"segments.{i}.group_size"),
            padding=entries.integer(f"segments.{i}.padding"),
        )
        for i in range(entries.integer("segments", 1, most))
    ]
    return {
        "segments": tuple(segments),
        "layout": _layout(entries),
        "affine": entries.choice("affine", Affine.__members__),
        "grouping": entries.choice("grouping", Grouping.__members__),
        "rounding": entries.integer("rounding", 1, 2),
        "padding": entries.integer("padding"),
        "weight_dtype": entries.optional("weight_dtype", FLOAT_NAMES),
    }


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
      arrays: JAX or NumPy arrays by the names of `flatten`. What NumPy's files call
        ``|V2``, two bytes, is bfloat16.
      metadata: As `flatten` returns it, also after a way through JSON, or with texts
        for its integers, as a safetensors file has them.

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
    entries, held = Entries(metadata), _arrays(arrays)
    entries.choice("format", {FORMAT: None})
    entries.integer("version", VERSION, VERSION)
    # The arrays that are there bound what it can ask for.
    fields = static_fields(entries, len(held))
    segments = fields.pop("segments")
    for name in (names := [f"words.{i}" for i in range(len(segments))]):
        if name not in held:
            raise ValueError(f"arrays[{name!r}] is missing; found {sorted(held)}.")
    words = [held.pop(name) for name in names]
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


def _arrays(arrays: Mapping[str, Any]) -> dict[str, Array]:
    arrays = {
        name: array.view(jnp.bfloat16) if _dtype(array) == np.dtype("V2") else array
        for name, array in arrays.items()
    }
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray) or array.dtype not in _DTYPES:
            found = _dtype(array) or type(array).__name__
            wanted = ", ".join(jnp.dtype(dtype).name for dtype in _DTYPES)
            raise ValueError(
                f"arrays[{name!r}] of {found} must be an array of one of {wanted}."
            )
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _dtype(array: Any) -> Any:
    return getattr(array, "dtype", None)


def _layout(entries: Entries) -> Layout:
    kind, fields = entries.choice("layout", LAYOUTS), {}
    for field in _static(kind):
        key = f"layout.{field.name}"
        if field.name == "axis":
            fields["axis"] = entries.integer(key, 0, 1)
        elif field.type is bool:
            fields[field.name] = entries.flag(key)
        elif field.type == int | None:
            fields[field.name] = entries.extent(key)
        else:  # Extents, of k or of a tile.
            fields[field.name] = entries.integer(key, 1)
    return kind(**fields)


def _check_words(
    words: list[Array], segments: Sequence[Segment], layout: Layout, padding: int
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
    name: str, entries: Entries, held: dict[str, Array]
) -> Array | Encoded | None:
    """Takes the scale or the zero out of the arrays, plain or encoded."""
    if not entries.has(name):
        return held.pop(name, None)
    kind = entries.choice(name, ENCODINGS)
    leaves = {key: held.pop(key) for key in [*held] if key.startswith(f"{name}.")}
    arrays = {key.removeprefix(f"{name}."): leaf for key, leaf in leaves.items()}
    if kind in BUILDERS:
        return BUILDERS[kind](name, arrays, entries)
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
        check_range("row_group", qt.row_group, qt.scale.shape[-2] - 1)
