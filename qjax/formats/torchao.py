"""torchao: int8 and intx weights, a byte a code, as its safetensors files hold them.

``_weight_qdata[n, k]`` is one signed byte a code of torch's ``[N, K]`` weight, whatever
the width; codes of fewer bits are sign-extended:

    bit 7                bit 0
    | q - 2^(bits-1), int8 |

``_weight_scale`` and ``_weight_zero_point`` are ``[N, K / group]``. The weight is
``(q8 - zero_point) * scale`` of the signed values, rounded once; qjax adds
``2^(bits-1)`` to both, and keeps no zero where all zero points are 0. A float32 scale
stands beside a bfloat16 weight: ``qjax.dequantize(qt, jnp.bfloat16)`` is then what
torchao computes.

How torchao finds these values is in `qjax.formats.torchao_affine`; its int4 tensors for
CUDA are `qjax.formats.tinygemm`.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_support.py,
torchao/quantization/quantize_/workflows/int8/int8_tensor.py and
workflows/intx/intx_unpacked_to_int8_tensor.py, torchao/quantization/quant_api.py,
release 0.18.0; huggingface/transformers,
src/transformers/quantizers/quantizers_utils.py.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Integer, Shaped, UInt8

from qjax import decode, tensor
from qjax.formats.checks import Expected, check_finite, check_shapes, check_tensors
from qjax.tensor import Affine, QTensor, Segment

# The last three change the activations too; they are named so that they are refused.
TENSORS = (
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "_weight_act_pre_scale",
    "_weight_act_quant_scale",
    "_weight_act_quant_zero_point",
)
_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)
_EXPECTED = {
    "_weight_qdata": Expected((jnp.int8,), 2),
    "_weight_scale": Expected(_FLOATS, 2),
    "_weight_zero_point": Expected((jnp.int8,), 2, optional=True),
}
_INTX = ("IntxWeightOnlyConfig",)
_INT8 = ("Int8WeightOnlyConfig",)


@dataclasses.dataclass(frozen=True)
class Bytes(tensor.Layout):
    """One signed byte a code, in torch's orientation: words int8 ``[n, k]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Int8[Array, "n k"]:
        """Packs ``[k, n]`` codes of 1 to 8 bits."""
        _check_bits(bits)
        return _signed(codes, bits)

    def unpack(self, words: Shaped[Array, "n k"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks int8 bytes; a byte out of the range of ``bits`` wraps around."""
        _check_bits(bits)
        if words.dtype != jnp.int8:
            raise ValueError(f"words.dtype={words.dtype} must be int8.")
        return _unsigned(words, bits)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(k, n)``."""
        del bits
        return shape[1], shape[0]


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be an integer from 1 to 8.")


@functools.partial(jax.jit, static_argnums=1)
def _signed(codes: Array, bits: int) -> Array:
    """Codes, cut to ``bits``, as int8 values around 0, transposed."""
    fields = codes.T.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    return lax.bitcast_convert_type(fields - jnp.uint8(2 ** (bits - 1)), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _unsigned(words: Array, bits: int) -> Array:
    """Inverse of `_signed`."""
    fields = lax.bitcast_convert_type(words, jnp.uint8) + jnp.uint8(2 ** (bits - 1))
    return (fields & jnp.uint8(2**bits - 1)).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a torchao ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code, 1 to 8.
      group_size: Inputs that share a scale; None for one scale an output.
      per_tensor: Whether the whole weight shares one scale.
      overrides: Configurations by module or ``re:`` pattern, as torchao's
        ``FqnToConfig`` has them; None leaves a module dense.
      ignored: Modules that transformers left dense (``modules_to_not_convert``).
    """

    bits: int = 8
    group_size: int | None = None
    per_tensor: bool = False
    overrides: tuple[tuple[str, "Config | None"], ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object, as transformers writes it beside safetensors.

        Returns:
          The configuration of the whole checkpoint; `of` gives that of a module.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for a
            kind of tensor that this format does not cover.
        """
        kind = entry.get("quant_type")
        if not isinstance(kind, Mapping) or not isinstance(
            kind.get("default"), Mapping
        ):
            # No TypeError, here and below: the file is wrong, not an argument's type.
            raise ValueError(  # noqa: TRY004
                f"quant_type={kind!r} must be an object with 'default', as newer "
                "transformers write it beside safetensors files; save the model anew."
            )
        ignored = entry.get("modules_to_not_convert") or []
        _check_patterns("modules_to_not_convert", ignored)
        table = _data(kind["default"])
        if kind["default"].get("_type") not in ("FqnToConfig", "ModuleFqnToConfig"):
            return dataclasses.replace(_one(kind["default"]), ignored=tuple(ignored))
        by_name = table.get("fqn_to_config") or table.get("module_fqn_to_config")
        if not isinstance(by_name, Mapping) or not by_name:
            raise ValueError(f"fqn_to_config={by_name!r} must map modules to objects.")
        patterns = [name[3:] for name in by_name if name.startswith("re:")]
        _check_patterns("fqn_to_config", patterns)
        overrides = tuple(
            (name, None if one is None else _one(one)) for name, one in by_name.items()
        )
        return cls(overrides=overrides, ignored=tuple(ignored))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        for pattern in self.ignored:
            # A pattern ends at a dot or at the end of the name, as transformers has it.
            prefix = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
            if prefix or module.endswith(pattern):
                return None
        if not self.overrides:
            return dataclasses.replace(self, ignored=())
        names, table = (f"{module}.weight", module), dict(self.overrides)
        for name in names:
            if name in table:
                return table[name]
        for name in names:
            for pattern, config in self.overrides:
                if pattern.startswith("re:") and re.fullmatch(pattern[3:], name):
                    return config
        return table.get("_default")


def _check_patterns(name: str, patterns: Any) -> None:
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name}={patterns!r} must be a list of strings.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name}: {pattern!r} is no pattern: {error}.") from None


def _data(entry: Any) -> Mapping[str, Any]:
    """The fields of an object that torchao wrote as ``{"_type", "_data"}``."""
    data = entry.get("_data") if isinstance(entry, Mapping) else None
    if not isinstance(data, Mapping):
        raise ValueError(  # noqa: TRY004
            f"{entry!r} must be an object with '_type' and '_data'."
        )
    return data


def _one(entry: Any) -> Config:
    """Reads the configuration of one kind of tensor."""
    data, kind = _data(entry), entry.get("_type")
    if kind in ("Int4WeightOnlyConfig", "Int4WeightOnlyOpaqueTensorConfig"):
        raise ValueError(
            f"{kind} pads the weight, and only the safetensors header knows its shape: "
            "read the tensors with qjax.formats.tinygemm."
        )
    if kind not in _INT8 + _INTX:
        raise ValueError(
            f"quant_type {kind!r} is not supported; known: {list(_INT8 + _INTX)}, "
            "alone or in FqnToConfig."
        )
    bits = 8
    if kind in _INTX:
        dtype = data.get("weight_dtype") or {}
        name = dtype.get("_data") if isinstance(dtype, Mapping) else None
        if name not in [f"int{width}" for width in range(1, 9)]:
            raise ValueError(f"weight_dtype={dtype!r} must be torch.int1 to int8.")
        bits = int(name[3:])
        packing = data.get("intx_packing_format")
        packing = packing.get("_data") if isinstance(packing, Mapping) else packing
        if packing not in (None, "UNPACKED_TO_INT8", "unpacked_to_int8"):
            raise ValueError(
                f"intx_packing_format={packing!r} must be 'unpacked_to_int8'."
            )
    if data.get("group_size") is not None:
        raise ValueError(
            f"group_size={data['group_size']!r} is of version 1 of torchao's {kind}, "
            "which no safetensors file has; it must be null."
        )
    granularity = data.get("granularity", {"_type": "PerRow", "_data": {}})
    fields, name = _data(granularity), granularity.get("_type")
    if name == "PerGroup":
        size = fields.get("group_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"group_size={size!r} must be a positive integer.")
        return Config(bits=bits, group_size=size)
    if name == "PerTensor":
        return Config(bits=bits, per_tensor=True)
    rows = name == "PerRow" and fields.get("dim", -1) in (-1, 1)
    if not rows and not (name == "PerAxis" and fields.get("axis", 0) == 0):
        raise ValueError(
            f"granularity={granularity!r} must be PerRow, PerAxis(0), PerGroup or "
            "PerTensor."
        )
    return Config(bits=bits)


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``_weight_qdata`` int8 ``[N, K]``, ``_weight_scale`` float ``[N, K / group]``
        (``[1, 1]`` for one scale in all), and optionally ``_weight_zero_point`` int8 of
        the same shape.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    # Tensors of activations ("_weight_act_...") have no place here.
    check_tensors(tensors, _EXPECTED, "torchao's weight-only matrices")
    shape = tuple(tensors["_weight_qdata"].shape)
    if not shape[0] or not shape[1]:
        raise ValueError(f"_weight_qdata.shape={shape} must be [N, K], not empty.")
    n, k = shape
    size = config.group_size or k
    if k % size:
        raise ValueError(
            f"_weight_qdata.shape={shape}: K must be a multiple of group_size={size}."
        )
    wanted = (1, 1) if config.per_tensor else (n, k // size)
    source = f"_weight_qdata.shape={shape} and group_size={config.group_size}"
    names = ("_weight_scale", "_weight_zero_point")
    check_shapes(tensors, dict.fromkeys(names, wanted), source)


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; uint8 zeros, none where all are 0.

    Raises:
      ValueError: As `check`; or if a scale is not finite, or a code or zero point does
        not fit the width.

    Example:
      >>> qdata = np.array([[-128, 0, 127]], np.int8)
      >>> scale = np.array([[0.5]], np.float32)
      >>> qt = from_tensors({"_weight_qdata": qdata, "_weight_scale": scale}, Config())
      >>> qjax.dequantize(qt)[:, 0]
      Array([-64. ,   0. ,  63.5], dtype=float32)
    """
    check(tensors, config)
    check_finite(tensors, ["_weight_scale"])
    middle = 2 ** (config.bits - 1)
    for name in ("_weight_qdata", "_weight_zero_point"):
        values = np.asarray(tensors.get(name, np.int8(0)))
        low, high = int(values.min()), int(values.max())
        if low < -middle or high >= middle:
            raise ValueError(
                f"{name} from {low} to {high} must lie in {-middle} to {middle - 1}, "
                f"the range of {config.bits} bits."
            )
    points, zero = np.asarray(tensors.get("_weight_zero_point", np.int8(0))), None
    if points.any():
        zero = jnp.asarray((points.T.astype(np.int16) + middle).astype(np.uint8))
    return tensor.build(
        (jnp.asarray(tensors["_weight_qdata"]),),
        jnp.asarray(np.asarray(tensors["_weight_scale"]).T),
        zero,
        layout=Bytes(),
        segments=(Segment(config.bits, config.group_size),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
    )


def to_tensors(qt: QTensor, *, zero_point: bool = True) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows.
      zero_point: Whether to write zero points of 0 for a symmetric matrix, as torchao
        0.16 and later do.

    Returns:
      ``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``.

    Raises:
      ValueError: If torchao cannot hold ``qt``, with the reason.
    """
    _check_holdable(qt)
    return _write(qt, zero_point)


@functools.partial(jax.jit, static_argnums=1)
def _write(qt: QTensor, zero_point: bool) -> dict[str, Array]:
    bits, scale = qt.segments[0].bits, tensor.plain(qt.scale)
    tensors = {
        "_weight_qdata": Bytes().pack(decode.codes(qt), bits),
        "_weight_scale": scale.T,
    }
    if qt.zero is not None:
        tensors["_weight_zero_point"] = _signed(tensor.plain(qt.zero), bits)
    elif zero_point:
        tensors["_weight_zero_point"] = jnp.zeros(scale.T.shape, jnp.int8)
    return tensors


def _check_holdable(qt: QTensor) -> None:
    reason, size = None, qt.segments[0].group_size
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif len(qt.segments) != 1:
        reason = "its rows have several widths; EXL2 holds those"
    elif qt.grouping is not tensor.Grouping.ROWS or qt.input_scale is not None:
        reason = f"it has {qt.grouping.value} groups or an input scale"
    elif qt.row_group is not None or qt.order is not None:
        reason = "its rows have an order, and torchao knows none; GPTQ does"
    elif not (
        (qt.affine is Affine.CENTERED and qt.zero is None)
        or (qt.zero is not None and qt.zero.dtype == jnp.uint8)
    ):
        reason = f"{qt.affine.value} here does not have integer zeros; requantize it"
    elif qt.k % (size or qt.k):
        reason = f"k={qt.k} is not a multiple of the group size {size}"
    elif qt.zero is not None and qt.zero.shape != qt.scale.shape:
        reason = f"zeros {qt.zero.shape} and scales {qt.scale.shape} differ in shape"
    elif qt.scale.shape not in ((qt.k // (size or qt.k), qt.n), (1, 1)):
        reason = "some columns share scales"
    if reason:
        raise ValueError(f"torchao cannot hold {qt!r}: {reason}.")
