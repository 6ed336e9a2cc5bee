"""torchao: int8, intx and tiled int4 weights, as its safetensors files hold them.

``_weight_qdata[n, k]`` is one signed byte a code of torch's ``[N, K]`` weight, whatever
the width; codes of fewer bits are sign-extended:

    bit 7                bit 0
    | q - 2^(bits-1), int8 |

``_weight_scale`` and ``_weight_zero_point`` are ``[N, K / group]``. The weight is
``(q8 - zero_point) * scale`` of the signed values, rounded once; qjax adds
``2^(bits-1)`` to both, and keeps no zero where all zero points are 0. A float32 scale
stands beside a bfloat16 weight: ``qjax.dequantize(qt, jnp.bfloat16)`` is then what
torchao computes.

Its int4 tensors for CUDA, ``_weight_qdata`` with ``_weight_scale_and_zero``, are those
of `qjax.formats.tinygemm`; only the header of the file has their shape before padding.
How torchao finds all of these values is in `qjax.formats.torchao_affine`.

Source: pytorch/ao, torchao/prototype/safetensors/safetensors_support.py,
torchao/quantization/quantize_/workflows/int8/int8_tensor.py,
workflows/intx/intx_unpacked_to_int8_tensor.py and
workflows/int4/int4_tile_packed_to_4d_tensor.py, torchao/quantization/quant_api.py,
release 0.18.0; huggingface/transformers,
src/transformers/quantizers/quantizers_utils.py.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Integer, Shaped, UInt8

from qjax import tensor
from qjax.bits import transpose_codes
from qjax.formats import tinygemm
from qjax.formats.checks import (
    FLOATS,
    Expected,
    check_codes,
    check_finite,
    check_shapes,
    check_strings,
    check_tensors,
    check_words,
    lacks_input_order,
    lacks_integer_zeros,
    lacks_plain_groups,
    lacks_plain_scales,
    lacks_whole_groups,
)
from qjax.formats.patterns import check_pattern, matches
from qjax.tensor import Affine, QTensor, Segment

# The last three change the activations too; they are named so that they are refused.
TENSORS = (
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "_weight_scale_and_zero",
    "_weight_act_pre_scale",
    "_weight_act_quant_scale",
    "_weight_act_quant_zero_point",
)
_EXPECTED = {
    "_weight_qdata": Expected((jnp.int8,), 2),
    "_weight_scale": Expected(FLOATS, 2),
    "_weight_zero_point": Expected((jnp.int8,), 2, optional=True),
}
_INTX = ("IntxWeightOnlyConfig",)
_INT8 = ("Int8WeightOnlyConfig",)
_INT4 = ("Int4WeightOnlyConfig",)


@dataclasses.dataclass(frozen=True)
class Bytes(tensor.Layout):
    """One signed byte a code, in torch's orientation: words int8 ``[n, k]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> Int8[Array, "n k"]:
        """Packs ``[k, n]`` codes of 1 to 8 bits."""
        _check_bits(bits)
        check_codes(codes)
        return _signed(codes, bits)

    def unpack(self, words: Shaped[Array, "n k"], bits: int) -> UInt8[Array, "k n"]:
        """Unpacks int8 bytes; a byte out of the range of ``bits`` wraps around."""
        _check_bits(bits)
        check_words(words, 2, jnp.int8)
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
    fields = transpose_codes(codes) & jnp.uint8(2**bits - 1)
    return lax.bitcast_convert_type(fields - jnp.uint8(2 ** (bits - 1)), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _unsigned(words: Array, bits: int) -> Array:
    """Inverse of `_signed`."""
    fields = lax.bitcast_convert_type(words, jnp.uint8) + jnp.uint8(2 ** (bits - 1))
    return transpose_codes(fields & jnp.uint8(2**bits - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a torchao ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code, 1 to 8.
      group_size: Inputs that share a scale; None for one scale an output.
      per_tensor: Whether the whole weight shares one scale.
      tiled: Whether the tensors are tinygemm's, which `with_header` has to describe.
      overrides: Configurations by module or ``re:`` pattern, as torchao's
        ``FqnToConfig`` has them; None leaves a module dense.
      ignored: Modules that transformers left dense (``modules_to_not_convert``).
    """

    bits: int = 8
    group_size: int | None = None
    per_tensor: bool = False
    tiled: bool = False
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
            prefix = rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
            if module.endswith(pattern) or matches(prefix, module):
                return None
        if not self.overrides:
            return dataclasses.replace(self, ignored=())
        names, table = (f"{module}.weight", module), dict(self.overrides)
        for name in names:
            if name in table:
                return table[name]
        for name in names:
            for pattern, config in self.overrides:
                if pattern[:3] == "re:" and matches(pattern[3:], name, whole=True):
                    return config
        return table.get("_default")

    def with_header(
        self, entry: Mapping[str, Any] | None
    ) -> "Config | tinygemm.Config":
        """Adds what the safetensors header says about one weight.

        Args:
          entry: The parsed JSON of the weight's entry in the header's metadata, or None
            if there is none.

        Returns:
          The configuration of that weight.

        Raises:
          ValueError: If the header is needed and says nothing, or something else than
            the configuration.
        """
        if not self.tiled:
            return self
        if entry is None:
            raise ValueError(
                "the weight is padded, and the metadata in the safetensors header, "
                "which would tell its shape, does not name it; save the model anew."
            )
        if entry.get("_type") != "Int4TilePackedTo4dTensor":
            raise ValueError(
                f"_type={entry.get('_type')!r} in the safetensors header must be "
                "'Int4TilePackedTo4dTensor', from quant_type."
            )
        config = tinygemm.Config.from_json(_data(entry))
        if config.group_size != self.group_size:
            raise ValueError(
                f"block_size=[1, {config.group_size}] in the safetensors header must "
                f"be [1, {self.group_size}], from quant_type."
            )
        return config


def _check_patterns(name: str, patterns: Any) -> None:
    for pattern in check_strings(name, patterns):
        check_pattern(name, pattern)


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
    if kind in _INT4:
        return _int4(data)
    if kind not in _INT8 + _INTX:
        raise ValueError(
            f"quant_type {kind!r} is not supported; known: {[*_INT8, *_INTX, *_INT4]}, "
            "alone or in FqnToConfig."
        )
    bits = _intx_bits(data) if kind in _INTX else 8
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


def _intx_bits(data: Mapping[str, Any]) -> int:
    dtype = data.get("weight_dtype")
    name = dtype.get("_data") if isinstance(dtype, Mapping) else None
    if name not in [f"int{width}" for width in range(1, 9)]:
        raise ValueError(f"weight_dtype={dtype!r} must be torch.int1 to int8.")
    _check_packing(data, "intx_packing_format", "unpacked_to_int8", optional=True)
    return int(name[3:])


def _int4(data: Mapping[str, Any]) -> Config:
    _check_packing(data, "int4_packing_format", "tile_packed_to_4d")
    tile, size = data.get("int4_tile_packed_ntile", 8), data.get("group_size")
    if tile != 8:
        raise ValueError(
            f"int4_tile_packed_ntile={tile!r} must be 8: AMD GPUs, which have 16, "
            "store another order of the same words."
        )
    if type(size) is not int or size not in tinygemm.GROUP_SIZES:
        raise ValueError(
            f"group_size={size!r} must be one of {tinygemm.GROUP_SIZES}, for int4."
        )
    return Config(bits=4, group_size=size, tiled=True)


def _check_packing(
    data: Mapping[str, Any], name: str, wanted: str, optional: bool = False
) -> None:
    """An enumeration is an object with the name of a member, or its value."""
    packing = data.get(name)
    packing = packing.get("_data") if isinstance(packing, Mapping) else packing
    known = (wanted, wanted.upper(), *((None,) if optional else ()))
    if packing not in known:
        raise ValueError(f"{name}={packing!r} must be {wanted!r}.")


def check(tensors: Mapping[str, Any], config: Config | tinygemm.Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``_weight_qdata`` int8 ``[N, K]``, ``_weight_scale`` float ``[N, K / group]``
        (``[1, 1]`` for one scale in all), and optionally ``_weight_zero_point`` int8 of
        the same shape. Of int4 weights those that `tinygemm.check` lists.
      config: The module's configuration; of int4 weights what `Config.with_header` made
        of it.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    if isinstance(config, tinygemm.Config):
        tinygemm.check(tensors, config)
        return
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


def from_tensors(
    tensors: Mapping[str, Any], config: Config | tinygemm.Config
) -> QTensor:
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
    if isinstance(config, tinygemm.Config):
        return tinygemm.from_tensors(tensors, config)
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
        "_weight_qdata": Bytes().pack(tensor.codes(qt), bits),
        "_weight_scale": scale.T,
    }
    if qt.zero is not None:
        tensors["_weight_zero_point"] = _signed(tensor.plain(qt.zero), bits)
    elif zero_point:
        tensors["_weight_zero_point"] = jnp.zeros(scale.T.shape, jnp.int8)
    return tensors


def _check_holdable(qt: QTensor) -> None:
    reason = (
        lacks_plain_groups(qt, range(1, 9))
        or lacks_input_order(qt)
        or lacks_integer_zeros(qt)
        or lacks_whole_groups(qt)
        or lacks_plain_scales(qt)
    )
    if reason:
        raise ValueError(f"torchao cannot hold {qt!r}: {reason}.")
