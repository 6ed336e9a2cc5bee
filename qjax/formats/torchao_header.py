"""What torchao's safetensors files say of a weight in their headers.

The metadata of a header has a text of JSON for each tensor of the model, and lists
their names under ``tensor_names``; each file of several has all of them. A plain tensor
is ``{"_type": "Tensor"}``. Of a quantized one, ``_type`` is its class, ``_data`` the
attributes of that, and ``_tensor_data_names`` the tensors it is made of: "qdata" of the
"weight" of a module is there as ``_weight_qdata``. This says all that a file does not
say by itself, and torchao looks at nothing else.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_support.py and
safetensors_utils.py, release 0.18.0.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.formats.checks import check_choice, check_object, check_strings

INT8, INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"
INT4, TILED = "Int4Tensor", "Int4TilePackedTo4dTensor"
FLOAT8, MX, NVFP4 = "Float8Tensor", "MXTensor", "NVFP4Tensor"

# Attributes by class. How activations are quantized, and by which kernels, is read
# over; an attribute that is not here may change what the others mean.
_ATTRIBUTES: Mapping[str, set[str]] = types.MappingProxyType(
    {
        INT8: {"block_size", "dtype", "act_quant_kwargs", "reduce_range"},
        INTX: {"target_dtype", "block_size", "dtype", "activation_quantization"},
        INT4: {"block_size", "shape", "activation_dtype"},
        TILED: {"block_size", "shape"},
        FLOAT8: {"block_size", "dtype", "mm_config", "act_quant_kwargs"}
        | {"kernel_preference", "hp_value_lb", "hp_value_ub"},
        MX: {"elem_dtype", "block_size", "orig_dtype", "kernel_preference"}
        | {"act_quant_kwargs", "is_swizzled_scales"},
        NVFP4: {"block_size", "orig_dtype", "is_swizzled_scales", "act_quant_kwargs"}
        | {"use_triton_kernel"},
    }
)
# Why a class that torchao stores has no place here, and what to do.
_DECLINED = {
    "Int4PlainInt32Tensor": "Intel's and Ascend's devices pack other words each, and "
    "the file does not say whose they are; quantize with int4_packing_format 'plain'"
}
AUTO = {"_type": "KernelPreference", "_data": "AUTO"}
_DTYPES = ("float16", "bfloat16", "float32")
# Bits of the elements of an MXTensor.
_ELEMENTS = {"float8_e4m3fn": 8, "float4_e2m1fn_x2": 4}


def attributes(entry: Any) -> Mapping[str, Any]:
    """Returns the attributes of an object that torchao wrote."""
    data = entry.get("_data") if isinstance(entry, Mapping) else None
    if not isinstance(data, Mapping):
        raise ValueError(  # noqa: TRY004
            f"{entry!r} must be an object with '_type' and '_data'."
        )
    return data


def names(entry: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the names of a weight's tensors, or None where a header has none.

    Raises:
      ValueError: If these are no strings.
    """
    if "_tensor_data_names" not in entry:
        return None
    found = check_strings("_tensor_data_names", entry["_tensor_data_names"])
    return tuple(sorted(f"_weight_{name}" for name in found))


def check_names(tensors: Mapping[str, Any], wanted: Sequence[str] | None) -> None:
    """Checks that a weight has the tensors that the header lists.

    Raises:
      ValueError: If one is missing, or there are others.
    """
    if wanted is not None and sorted(tensors) != sorted(wanted):
        raise ValueError(
            f"the tensors {sorted(tensors)} must be {sorted(wanted)}, from the "
            "safetensors header."
        )


def read(entry: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Reads what a header says about one weight.

    Args:
      entry: The parsed JSON of its entry.
      kinds: The classes that ``quant_type`` makes.

    Returns:
      Fields of `torchao_config.Config`: ``kind``, ``names``, ``bits``, ``block``,
      ``weight_dtype``, ``shape`` and ``swizzled``, as far as the class has them.

    Raises:
      ValueError: If the class is none of ``kinds``, or an attribute is missing, unknown
        or wrong.
    """
    kind: Any = entry.get("_type")
    if reason := _DECLINED.get(str(kind)):
        raise ValueError(f"_type={kind!r} in the safetensors header: {reason}.")
    if kind not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(
            f"_type={kind!r} in the safetensors header must be {wanted}, from "
            "quant_type."
        )
    data = attributes(entry)
    if unknown := sorted(data.keys() - _ATTRIBUTES[kind]):
        raise ValueError(
            f"{kind} in the safetensors header has {unknown}, which torchao 0.18 does "
            f"not write; known: {sorted(_ATTRIBUTES[kind])}."
        )
    return {"kind": kind, "names": names(entry)} | _FIELDS[kind](data)


def _integers(data: Mapping[str, Any]) -> dict[str, Any]:
    bits = 8
    if "target_dtype" in data:
        name = _dtype_name("target_dtype", data)
        check_choice("target_dtype", name, [f"int{width}" for width in range(1, 9)])
        bits = int(name[3:])
    return {"bits": bits, "block": _block(data), "weight_dtype": _dtype("dtype", data)}


def _plain_int4(data: Mapping[str, Any]) -> dict[str, Any]:
    shape = data.get("shape")
    return {"bits": 4, "block": _block(data), "shape": _pair("shape", shape, "[N, K]")}


def _float8(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"bits": 8, "block": _block(data), "weight_dtype": _dtype("dtype", data)}


def _mx(data: Mapping[str, Any]) -> dict[str, Any]:
    element, size = data.get("elem_dtype"), data.get("block_size")
    if isinstance(element, Mapping):
        element = element.get("_data")
    check_choice("elem_dtype", element, _ELEMENTS)
    if type(size) is not int or not 0 < size < 2**31:
        raise ValueError(f"block_size={size!r} must be a positive integer below 2**31.")
    dtype = _dtype("orig_dtype", data)
    # float16 could not hold the scales by which torchao multiplies in that dtype.
    check_choice("orig_dtype", dtype, ("bfloat16", "float32"))
    said = {"block": (1, size), "weight_dtype": dtype, "swizzled": _swizzled(data)}
    return {"bits": _ELEMENTS[str(element)]} | said


def _nvfp4(data: Mapping[str, Any]) -> dict[str, Any]:
    check_choice("block_size", data.get("block_size"), (16,))
    dtype, swizzled = _dtype("orig_dtype", data), _swizzled(data)
    said = {"block": (1, 16), "weight_dtype": dtype, "swizzled": swizzled}
    return {"bits": 4} | said


_FIELDS = {
    INT8: _integers,
    INTX: _integers,
    INT4: _plain_int4,
    TILED: lambda data: {"bits": 4},  # for `tinygemm_config` to read
    FLOAT8: _float8,
    MX: _mx,
    NVFP4: _nvfp4,
}


def _block(data: Mapping[str, Any]) -> tuple[int, int]:
    return _pair("block_size", data.get("block_size"), "outputs and inputs")


def _pair(name: str, value: Any, what: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in value)
    ):
        raise ValueError(
            f"{name}={value!r} must be {what}, two positive integers below 2**31; "
            "stacks of matrices are not read."
        )
    return value[0], value[1]


def _dtype(name: str, data: Mapping[str, Any]) -> str:
    found = _dtype_name(name, data)
    check_choice(name, found, _DTYPES)
    return found


def _dtype_name(name: str, data: Mapping[str, Any]) -> Any:
    return check_object(name, data.get(name)).get("_data")


def _swizzled(data: Mapping[str, Any]) -> bool:
    found = data.get("is_swizzled_scales", False)
    check_choice("is_swizzled_scales", found, (False, True))
    return bool(found)


def to_json(
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    *,
    bits: int,
    weight_dtype: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """Says of a weight what torchao reads; but for MX, activations stay as they are.

    Args:
      kind: Its class.
      shape: torch's ``(N, K)``.
      block: Outputs and inputs that share a scale.
      bits: Width of a code.
      weight_dtype: Name of the dtype that it had.
      names: Its tensors, as ``_weight_qdata``.

    Returns:
      The entry, for JSON.
    """
    of_weight = dtype_to_json(weight_dtype)
    data: dict[str, Any] = {"block_size": list(block)}
    if kind == INT8:
        data |= {"dtype": of_weight, "act_quant_kwargs": None, "reduce_range": False}
    elif kind == INTX:
        data |= {"dtype": of_weight, "activation_quantization": None}
        data |= {"target_dtype": dtype_to_json(f"int{bits}")}
    elif kind == INT4:
        data |= {"shape": list(shape), "activation_dtype": dtype_to_json("bfloat16")}
    elif kind == TILED:
        data |= {"shape": list(shape)}
    elif kind == FLOAT8:
        data |= {"dtype": of_weight, "mm_config": None, "act_quant_kwargs": None}
        data |= {"kernel_preference": AUTO}
    else:
        data = {"block_size": block[1], "orig_dtype": of_weight}
        data |= {"act_quant_kwargs": None, "is_swizzled_scales": True}
        data |= _of_mx(bits) if kind == MX else {"use_triton_kernel": False}
    stored = [name.removeprefix("_weight_") for name in names]
    return {"_type": kind, "_data": data, "_tensor_data_names": stored}


def _of_mx(bits: int) -> dict[str, Any]:
    """What an MXTensor says more. It multiplies no activations but its own kind."""
    said = {
        "elem_dtype": dtype_to_json(element_of(bits)),
        "kernel_preference": AUTO,
    }
    rule = {"_type": "ScaleCalculationMode", "_data": "RCEIL"}
    of_inputs = {"block_size": 32, "scaling_mode": rule, "is_swizzled_scales": True}
    inputs = {"_type": "QuantizeTensorToMXKwargs", "_data": said | of_inputs}
    return {**said, "act_quant_kwargs": inputs}


def element_of(bits: int) -> str:
    """The dtype that torchao names for MX elements of a width."""
    return next(name for name, width in _ELEMENTS.items() if width == bits)


def dtype_to_json(name: str) -> dict[str, str]:
    """How torchao writes one of torch's dtypes."""
    return {"_type": "torch.dtype", "_data": name}
