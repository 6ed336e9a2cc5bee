"""What formats check alike: a file's tensors and configuration, and what to write."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, DTypeLike

from qjax.bits import whole
from qjax.tensor import Affine, Grouping, QTensor, check_array, plain

# What scales and float zeros may be.
FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)


class Expected(NamedTuple):
    """What a tensor may be.

    Attributes:
      dtypes: The dtypes it may have.
      axes: Its number of axes; None for any.
      optional: Whether it may be left out.
      like: Another tensor, one that must be there, whose dtype it may have, too.
    """

    dtypes: Sequence[DTypeLike]
    axes: int | None
    optional: bool = False
    like: str | None = None


def check_tensors(
    tensors: Mapping[str, Any], expected: Mapping[str, Expected], name: str
) -> None:
    """Checks names, dtypes and numbers of axes.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name.
      expected: All tensors that there may be, in the order in which they are checked.
      name: Name of the format, for messages.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    for key in (key for key, one in expected.items() if not one.optional):
        if key not in tensors:
            raise ValueError(f"{key} is missing; found {sorted(tensors)}.")
    for key in (key for key in tensors if key not in expected):
        raise ValueError(f"{key} is no tensor of {name}; those are {[*expected]}.")
    for key in (key for key in expected if key in tensors):
        array, (dtypes, axes, _, like) = tensors[key], expected[key]
        if like is not None:
            dtypes = (*dtypes, tensors[like].dtype)
        if array.dtype not in dtypes:
            wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            wanted += "" if like is None else f", that of {like},"
            raise ValueError(f"{key}.dtype={array.dtype} must be {wanted} in {name}.")
        if axes is not None and len(array.shape) != axes:
            raise ValueError(f"{key}.shape={tuple(array.shape)} must have {axes} axes.")


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
    check_shapes_among(tensors, {key: [shapes[key]] for key in shapes}, source)


def check_shapes_among(
    tensors: Mapping[str, Any],
    allowed: Mapping[str, Sequence[tuple[int, ...]]],
    source: str,
) -> None:
    """Does the work of `check_shapes` where a tensor may have one of several shapes.

    Args:
      tensors: As in `check_tensors`.
      allowed: The shapes that each may have.
      source: As in `check_shapes`.

    Raises:
      ValueError: As `check_shapes`.
    """
    for key in (key for key in allowed if key in tensors):
        found = tuple(tensors[key].shape)
        if found not in allowed[key]:
            wanted = " or ".join(map(str, allowed[key]))
            raise ValueError(f"{key}.shape={found} must be {wanted}, from {source}.")


def check_finite(
    tensors: Mapping[str, Any], names: Sequence[str] | None = None
) -> None:
    """Checks the values of those tensors that are there.

    Args:
      tensors: Concrete arrays by upstream name.
      names: Those to look at; None for all.

    Raises:
      ValueError: If one holds NaN or infinity.
    """
    wanted = tensors if names is None else names
    for key in (key for key in wanted if key in tensors):
        if not np.isfinite(np.asarray(tensors[key]).astype(np.float32)).all():
            raise ValueError(f"{key} must be finite; found NaN or infinity.")


def check_positive(name: str, value: Any) -> None:
    """Checks a number of rows, columns or weights of a configuration.

    Args:
      name: Name of the field, for messages.
      value: What was found there.

    Raises:
      ValueError: If it is no positive integer that has 31 bits.
    """
    if not 0 < (whole(value) or 0) < 2**31:
        raise ValueError(f"{name}={value!r} must be a positive integer below 2**31.")


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Checks an argument that is one of a few.

    Args:
      name: Name of the argument, for messages.
      value: What was given.
      known: What there is.

    Raises:
      ValueError: If it is something else.
    """
    if value not in (choices := tuple(known)):
        raise ValueError(f"{name}={value!r} must be one of {choices}.")


def check_width(bits: int, widths: Collection[int], name: str) -> None:
    """Checks the width of the codes that a layout is given.

    Args:
      bits: Any number.
      widths: Those that the layout has.
      name: Whose layout it is, for messages.

    Raises:
      ValueError: If it has others.
    """
    if bits not in widths:
        *others, last = map(str, widths)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(
            f"bits={bits!r} must be {wanted} in {name}; gptq.Stream() holds 1 to 8."
        )


def check_weight(w: Any) -> None:
    """Checks what a format that has floats of its own is given to round.

    Args:
      w: Any argument.

    Raises:
      TypeError: If it is a list, say, and no array.
      ValueError: If it is no dense weight ``[..., k, n]`` of a dtype of `FLOATS`.
    """
    check_array(w, "w")
    if w.ndim < 2 or w.dtype not in FLOATS:
        raise ValueError(
            "w must be bfloat16, float16 or float32 [..., k, n]; got "
            f"{w.dtype}{w.shape}."
        )


def check_codes(codes: Array) -> None:
    """Checks what a layout is given to pack.

    Args:
      codes: Any array.

    Raises:
      ValueError: If these are not integers ``[k, n]``, at least one.
    """
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    if codes.ndim != 2 or not codes.size:
        raise ValueError(
            f"codes.shape={codes.shape} must be [k, n], not empty; vmap packs stacks."
        )


def check_words(words: Array, axes: int, *dtypes: DTypeLike) -> None:
    """Checks what a layout is given to unpack.

    Args:
      words: Any array.
      axes: How many axes the words of one matrix have.
      *dtypes: What they may be.

    Raises:
      ValueError: If the array is of another kind.
    """
    if words.dtype not in dtypes:
        wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"words.dtype={words.dtype} must be {wanted}.")
    if words.ndim != axes:
        raise ValueError(
            f"words.shape={words.shape} must have {axes} axes; vmap unpacks stacks."
        )


def check_method(entry: Mapping[str, Any], name: str) -> None:
    """Checks that a configuration is one of a format, where it says of which.

    Args:
      entry: The ``quantization_config``.
      name: The format's ``quant_method``.

    Raises:
      ValueError: If it is another.
    """
    if entry.get("quant_method", name) != name:
        raise ValueError(f"quant_method={entry['quant_method']!r} must be {name!r}.")


def check_object(name: str, value: Any) -> Mapping[str, Any]:
    """Checks an object of a configuration.

    Args:
      name: Name of the field, for messages.
      value: What it holds.

    Returns:
      The value.

    Raises:
      ValueError: If it is none.
    """
    if not isinstance(value, Mapping):
        # No TypeError: the file is wrong, not the type of an argument.
        raise ValueError(f"{name}={value!r} must be an object.")  # noqa: TRY004
    return value


def check_strings(name: str, value: Any) -> tuple[str, ...]:
    """Reads a list of strings from a configuration.

    Args:
      name: Name of the field, for messages.
      value: What was found there.

    Returns:
      The strings.

    Raises:
      ValueError: If it is anything else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}={value!r} must be a list of strings.")
    return tuple(value)


# What a tensor lacks that most formats need: each of these gives the reason, to follow
# "... cannot hold it: ", or None where nothing is lacking.


def lacks_plain_groups(
    qt: QTensor, widths: Collection[int], *, stacks: bool = False
) -> str | None:
    """Whether a tensor is one matrix of one width, its groups runs of stored rows.

    With ``stacks``, it may be several.
    """
    if qt.batch and not stacks:
        return f"it stacks {qt.batch} matrices; write them one by one"
    if len(qt.segments) != 1:
        return "its rows have several widths; EXL2 holds those"
    if qt.grouping is not Grouping.ROWS:
        return f"it has {qt.grouping.value} groups"
    if qt.input_scale is not None:
        return "it has an input_scale, which it could hand on to the layer before it"
    if qt.segments[0].bits not in widths:
        return (
            f"{qt.segments[0].bits} bits are not among {tuple(widths)}; "
            "compressed-tensors holds 1 to 8, GPTQ's 'gptq_p' 2 to 8"
        )
    return None


def lacks_input_order(qt: QTensor) -> str | None:
    """Whether rows and their groups are in the order of the inputs."""
    if qt.row_group is not None or qt.order is not None:
        return "its groups are not runs of inputs (act-order); GPTQ holds those"
    return None


def lacks_integer_zeros(qt: QTensor) -> str | None:
    """Whether zeros are codes, or are not needed."""
    symmetric = qt.affine is Affine.CENTERED and qt.zero is None
    if symmetric or (qt.zero is not None and qt.zero.dtype == jnp.uint8):
        return lacks_narrow_zeros(qt)
    return f"{qt.affine.value} here does not have integer zeros; requantize it"


def lacks_narrow_zeros(qt: QTensor) -> str | None:
    """Whether integer zeros are codes; those of MPQ may be one more."""
    zero, bits = plain(qt.zero), qt.segments[0].bits
    if zero is None or zero.dtype != jnp.uint8 or not is_known(zero):
        return None
    if (most := int(jnp.max(zero))) < 2**bits:
        return None
    return f"its zeros reach {most}, and {bits} bits hold up to {2**bits - 1}"


def lacks_even_groups(qt: QTensor) -> str | None:
    """Whether as many rows are in each group, where a ``row_group`` says which are."""
    rows, size = qt.row_group, qt.segments[0].group_size
    if rows is None or not is_known(rows):
        return None
    counts = np.bincount(np.asarray(rows))
    if counts.min() == counts.max() == (size or qt.k):
        return None
    return f"its groups have {counts.min()} to {counts.max()} rows; GPTQ holds those"


def is_known(array: Any) -> bool:
    """Whether an array has values to look at, and not only a shape and a dtype."""
    return not isinstance(array, Tracer | jax.ShapeDtypeStruct)


def lacks_whole_groups(qt: QTensor) -> str | None:
    """Whether groups of rows are all of one size."""
    size = qt.segments[0].group_size
    if qt.k % (size or qt.k):
        return f"group_size={size} does not divide k={qt.k}; GPTQ holds a short group"
    return None


def lacks_own_columns(qt: QTensor) -> str | None:
    """Whether each column has its scales and zeros."""
    if any(p.shape[-1] != qt.n for p in (qt.scale, qt.zero) if p is not None):
        return "columns share scales or zeros"
    return None


def lacks_plain_scales(qt: QTensor) -> str | None:
    """Whether there is a scale for each whole group and column, or one in all."""
    if qt.zero is not None and qt.zero.shape != qt.scale.shape:
        return f"zeros {qt.zero.shape} and scales {qt.scale.shape} differ in shape"
    groups = qt.k // (qt.segments[0].group_size or qt.k)
    if qt.scale.shape not in ((groups, qt.n), (1, 1)):
        return "some columns share scales, or groups are not of one size"
    return None


def refusal(qt: QTensor, widths: Collection[int]) -> str | None:
    """Why a format of plain groups along k cannot hold a tensor, None if it can.

    Args:
      qt: Any tensor.
      widths: The widths of codes that the format has.

    Returns:
      The reason, for an error message.
    """
    return (
        lacks_plain_groups(qt, widths)
        or lacks_input_order(qt)
        or lacks_whole_groups(qt)
        or lacks_own_columns(qt)
    )


def group_size_of(k: int, groups: int) -> int | None:
    """How many rows share a scale, where a file only has the scales.

    Args:
      k: Number of rows.
      groups: Number of scales along them.

    Returns:
      The one power of two, which all sizes in use are, that cuts ``k`` so; ``k`` for
      one group; None if there is none.

    Example:
      >>> group_size_of(192, 2), group_size_of(192, 3), group_size_of(192, 7)
      (128, 64, None)
    """
    if groups == 1:
        return k
    powers = [2**i for i in range(k.bit_length())]
    return next((size for size in powers if -(-k // size) == groups), None)
