"""compressed-tensors "pack-quantized": a bit stream along each row of torch's weight.

``weight_packed[n, i]`` of four bits holds eight inputs of one output,

    bit 31                                                            bit 0
    | q[n, 8i+7] | q[n, 8i+6] | ...  | q[n, 8i+2] | q[n, 8i+1] | q[n, 8i] |

where the field ``q`` is the signed code plus ``2^(bits-1)``. Since release 0.18 every
width is a continuous stream, as `qjax.bits` has it (`Dense`). Before, a word held
``32 // bits`` whole fields, its upper bits unused (`Aligned`): for 1, 2, 4 and 8 bits
the same words, for 3, 5, 6 and 7 others, without a mark in the file. Fields beyond K
are 0. ``weight_zero_point`` holds the zero points in the same way along N,
``weight_shape`` is ``(N, K)``, and ``weight_g_idx``, which older writers had, the
group of each input; a -1 in it says that it is not used. The weight is
``(q - zero) * scale``, rounded once to the dtype of the scale.

Source: vllm-project/compressed-tensors, src/compressed_tensors/compressors/
pack_quantized, quantization/lifecycle/forward.py and utils/match.py, release 0.20.0
(`Dense` since commit 66e631f6); neuralmagic/compressed-tensors, src/compressed_tensors/
compressors/quantized_compressors/pack_quantized.py, commit
52792be02ec09e59f3517104e755a02d0e003fbb (`Aligned`, ``weight_g_idx``).
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8, UInt32

from qjax import decode, tensor
from qjax.bits import WORD, block, pack_fields, unpack_fields
from qjax.formats.checks import Expected, check_finite, check_shapes, check_tensors
from qjax.tensor import Affine, QTensor, Segment

TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)
Strategy = Literal["group", "channel", "tensor"]
_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)
_DENSE_SINCE = (0, 18)


@dataclasses.dataclass(frozen=True)
class Dense(tensor.Layout):
    """One stream a row: words uint32 ``[n, ceil(k * bits / 32)]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "n words"]:
        """Packs ``[k, n]`` codes; fields beyond k are 0."""
        return pack_dense(codes, bits, axis=0, transpose=True)

    def unpack(
        self, words: Integer[Array, "n words"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks as many whole fields as the words have."""
        return unpack_dense(words, bits, axis=1, transpose=True)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(words * 32 // bits, n)``."""
        return shape[1] * WORD // bits, shape[0]


@dataclasses.dataclass(frozen=True)
class Aligned(tensor.Layout):
    """``32 // bits`` whole fields a word: words uint32 ``[n, ceil(k / that)]``."""

    def pack(self, codes: Integer[Array, "k n"], bits: int) -> UInt32[Array, "n words"]:
        """Packs ``[k, n]`` codes; fields beyond k and bits beyond the fields are 0."""
        return pack_aligned(codes, bits, axis=0, transpose=True)

    def unpack(
        self, words: Integer[Array, "n words"], bits: int
    ) -> UInt8[Array, "k n"]:
        """Unpacks ``32 // bits`` fields a word."""
        return unpack_aligned(words, bits, axis=1, transpose=True)

    def extents(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Returns ``(words * (32 // bits), n)``."""
        return shape[1] * (WORD // bits), shape[0]


@functools.partial(jax.jit, static_argnames=("bits", "axis", "transpose"))
def pack_dense(
    codes: Integer[Array, "a b"], bits: int, axis: int, transpose: bool = False
) -> UInt32[Array, "c d"]:
    """Packs codes into a stream along ``axis`` (0 or 1) that ends within a word."""
    length, words = codes.shape[axis], _dense_words(codes.shape[axis], bits)
    whole = pack_fields(_pad(codes, -length % block(bits)[0], axis), bits, axis)
    packed = jax.lax.slice_in_dim(whole, 0, words, axis=axis)
    return packed.T if transpose else packed


@functools.partial(jax.jit, static_argnames=("bits", "axis", "transpose"))
def unpack_dense(
    words: Integer[Array, "c d"], bits: int, axis: int, transpose: bool = False
) -> UInt8[Array, "a b"]:
    """Inverse of `pack_dense`, with all whole fields of the words."""
    length = words.shape[axis]
    codes = unpack_fields(_pad(words, -length % block(bits)[1], axis), bits, axis)
    codes = jax.lax.slice_in_dim(codes, 0, length * WORD // bits, axis=axis)
    return codes.T if transpose else codes


@functools.partial(jax.jit, static_argnames=("bits", "axis", "transpose"))
def pack_aligned(
    codes: Integer[Array, "a b"], bits: int, axis: int, transpose: bool = False
) -> UInt32[Array, "c d"]:
    """Packs codes along ``axis`` (0 or 1), ``32 // bits`` a word from bit 0 up."""
    block(bits)  # refuses other widths
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes.dtype={codes.dtype} must be an integer dtype.")
    per_word = WORD // bits
    wide = jnp.moveaxis(codes, axis, -1).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    whole = _pad(wide, -wide.shape[1] % per_word, 1)
    fields = whole.reshape(whole.shape[0], -1, per_word)
    shifts = jnp.arange(per_word, dtype=jnp.uint32) * jnp.uint32(bits)
    words = (fields << shifts[None, None]).sum(-1, dtype=jnp.uint32)
    packed = jnp.moveaxis(words, -1, axis)
    return packed.T if transpose else packed


@functools.partial(jax.jit, static_argnames=("bits", "axis", "transpose"))
def unpack_aligned(
    words: Integer[Array, "c d"], bits: int, axis: int, transpose: bool = False
) -> UInt8[Array, "a b"]:
    """Inverse of `pack_aligned`, with the fields of padding."""
    block(bits)  # refuses other widths
    if words.dtype not in (jnp.int32, jnp.uint32):
        raise ValueError(f"words.dtype={words.dtype} must be int32 or uint32.")
    last = jnp.moveaxis(jax.lax.bitcast_convert_type(words, jnp.uint32), axis, -1)
    shifts = jnp.arange(WORD // bits, dtype=jnp.uint32) * jnp.uint32(bits)
    fields = last[..., None] >> shifts[None, None] & jnp.uint32(2**bits - 1)
    codes = fields.astype(jnp.uint8).reshape(last.shape[0], -1)
    codes = jnp.moveaxis(codes, -1, axis)
    return codes.T if transpose else codes


def _pad(x: Array, count: int, axis: int) -> Array:
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(2)])


def _dense_words(length: int, bits: int) -> int:
    return -(-length * bits // WORD)


def _aligned_words(length: int, bits: int) -> int:
    return -(-length // (WORD // bits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a compressed-tensors ``quantization_config`` says about one module.

    Attributes:
      bits: Width of a code, 1 to 8.
      strategy: One scale a "group" of inputs and output, a "channel" (output), or in
        all ("tensor").
      group_size: Inputs of a group; None unless the strategy is "group".
      symmetric: Whether there are no zero points.
      act_order: Whether groups are of inputs sorted by activation (``actorder`` of
        "group" or "dynamic"), so that ``weight_g_idx`` must be there.
      aligned: Whether the writer was older than 0.18 and left bits unused; what counts
        where the shapes of 3, 5, 6 or 7 bits do not tell.
      groups: (targets, configuration) of each group, in the file's order.
      ignore: Names, patterns and classes that stay dense.
    """

    bits: int = 4
    strategy: Strategy = "group"
    group_size: int | None = 128
    symmetric: bool = True
    act_order: bool = False
    aligned: bool = False
    groups: tuple[tuple[tuple[str, ...], "Config"], ...] = ()
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` that llm-compressor writes.

        Schemes that also quantize activations are read for their weights.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of the whole checkpoint; `of` gives that of a module.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for a
            variant that this format does not cover.
        """
        sparsity = entry.get("sparsity_config") or {}
        if sparsity and sparsity.get("format", "dense") != "dense":
            raise ValueError(f"sparsity_config={sparsity!r} must be dense.")
        if entry.get("transform_config"):
            raise ValueError(
                "transform_config rotates weights, which is not supported."
            )
        groups = entry.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"config_groups={groups!r} must map names to schemes.")
        aligned = _version(entry.get("version")) < _DENSE_SINCE
        read = tuple(
            _group(name, group, entry.get("format"), aligned)
            for name, group in groups.items()
        )
        ignore = entry.get("ignore") or []
        _check_targets("ignore", ignore)
        return dataclasses.replace(read[0][1], groups=read, ignore=tuple(ignore))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        A target is a module's path, a pattern behind "re:", or a class, of which
        every module is taken to be a "Linear"; they go before each other in that order.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        if any(_matches(target, module) for target in self.ignore):
            return None
        if not self.groups:
            return dataclasses.replace(self, ignore=())
        found = [
            (_matches(target, module), target, config)
            for targets, config in self.groups
            for target in targets
        ]
        rank = min(found, key=lambda match: (match[0] or 4, match[1]))
        return rank[2] if rank[0] else None


def _matches(target: str, module: str) -> int:
    """0: no match; 1, 2, 3: as a path, a pattern, a class."""
    if target == module:
        return 1
    if target.startswith("re:"):
        return 2 if re.match(target[3:], module) else 0
    return 3 if target in ("Linear", "Module") else 0


def _check_targets(name: str, targets: Any) -> None:
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"{name}={targets!r} must be a list of strings.")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as error:
            if target.startswith("re:"):
                raise ValueError(
                    f"{name}: {target!r} is no pattern: {error}."
                ) from None


def _version(text: Any) -> tuple[int, ...]:
    """A release as numbers; one that is not there is taken for the newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return tuple(map(int, numbers.groups())) if numbers else _DENSE_SINCE


def _group(
    name: str, group: Any, format_: Any, aligned: bool
) -> tuple[tuple[str, ...], Config]:
    """Reads one entry of ``config_groups``."""
    where = f"config_groups[{name!r}]"
    if isinstance(group, list):  # a preset by name
        bits = re.fullmatch(r"W([2-8])A16(_ASYM)?", name.upper())
        if not bits:
            raise ValueError(f"{where} is no preset that is known; write its weights.")
        _check_targets(where, group)
        symmetric = bits[2] is None
        return tuple(group), Config(
            bits=int(bits[1]), symmetric=symmetric, aligned=aligned
        )
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        # No TypeError, here and below: the file is wrong, not the type of an argument.
        raise ValueError(  # noqa: TRY004
            f"{where}.weights={weights!r} must be an object."
        )
    format_ = group.get("format") or format_
    if format_ != "pack-quantized":
        raise ValueError(f"{where}: format={format_!r} must be 'pack-quantized'.")
    _check_targets(f"{where}.targets", group.get("targets"))
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if type(bits) is not int or not 1 <= bits <= 8 or kind != "int":
        raise ValueError(f"{where}: {bits!r} bits of {kind!r} must be 1 to 8 of 'int'.")
    if weights.get("dynamic"):
        raise ValueError(f"{where}: dynamic={weights['dynamic']!r} must be false.")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ValueError(  # noqa: TRY004
            f"{where}: symmetric={symmetric!r} must be true or false."
        )
    actorder = weights.get("actorder")
    if actorder not in (None, True, False, "weight", "static", "group", "dynamic"):
        raise ValueError(f"{where}: actorder={actorder!r} is not known.")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy not in ("group", "channel", "tensor"):
        raise ValueError(
            f"{where}: strategy={strategy!r} must be 'group', 'channel' or 'tensor'."
        )
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ValueError(f"{where}: group_size={size!r} must be positive.")
    return tuple(group["targets"]), Config(
        bits=bits,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        symmetric=symmetric,
        act_order=actorder is True or actorder in ("group", "dynamic"),
        aligned=aligned,
    )


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``weight_packed`` int32 ``[N, words]``, ``weight_scale`` float
        ``[N, K / group]``, ``[N, 1]`` or ``[1]`` by strategy, ``weight_shape`` int64 or
        int32 ``[2]``; for asymmetric weights ``weight_zero_point`` int32
        ``[words, K / group]`` (int8 ``[1]`` with one in all); optionally
        ``weight_g_idx`` int32 ``[K]``.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    if (config.strategy == "group") != (config.group_size is not None):
        raise ValueError(
            f"group_size={config.group_size} must be given with strategy 'group' and "
            f"only with it; found {config.strategy!r}."
        )
    whole, grouped = config.strategy == "tensor", config.strategy == "group"
    expected = {
        "weight_packed": Expected((jnp.int32,), 2),
        "weight_scale": Expected(_FLOATS, 1 if whole else 2),
        "weight_shape": Expected((np.int64, np.int32), 1),
    }
    if not config.symmetric:
        zeros = Expected((jnp.int8,), 1) if whole else Expected((jnp.int32,), 2)
        expected["weight_zero_point"] = zeros
    if grouped:
        optional = not config.act_order
        expected["weight_g_idx"] = Expected((jnp.int32,), 1, optional=optional)
    check_tensors(tensors, expected, f"{config}")
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    if not all(shapes["weight_packed"]):
        raise ValueError(
            f"weight_packed.shape={shapes['weight_packed']} must not be empty."
        )
    n = shapes["weight_packed"][0]
    groups = shapes["weight_scale"][1] if grouped else 1
    k = groups * (config.group_size or 1)
    wanted = (1,) if whole else (n, groups)
    fixed = {"weight_scale": wanted, "weight_shape": (2,), "weight_g_idx": (k,)}
    check_shapes(tensors, fixed, f"weight_packed.shape={shapes['weight_packed']}")
    if grouped:
        _require_words(shapes["weight_packed"], k, config)
    if "weight_zero_point" in shapes:
        words = (_dense_words(n, config.bits), _aligned_words(n, config.bits))
        allowed = [(1,)] if whole else [(count, groups) for count in words]
        _require("weight_zero_point.shape", shapes["weight_zero_point"], allowed)


def _require(name: str, found: Any, allowed: Iterable[Any]) -> None:
    allowed = list(dict.fromkeys(allowed))
    if found not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ValueError(f"{name}={found} must be {wanted}.")


def _require_words(shape: tuple[int, ...], k: int, config: Config) -> None:
    words = (_dense_words(k, config.bits), _aligned_words(k, config.bits))
    _require(
        f"weight_packed.shape of K={k}, {config.bits} bits",
        shape,
        [(shape[0], count) for count in words],
    )


def _layout(
    words: tuple[int, ...], zeros: tuple[int, ...] | None, k: int, config: Config
) -> tensor.Layout:
    """Tells the two generations apart, by the shapes and else by the writer."""
    pairs = [(words[1], k)] if zeros is None else [(words[1], k), (zeros[0], words[0])]
    dense = all(_dense_words(length, config.bits) == count for count, length in pairs)
    aligned = all(
        _aligned_words(length, config.bits) == count for count, length in pairs
    )
    if not dense and not aligned:
        raise ValueError(
            f"weight_packed.shape={words} and weight_zero_point.shape={zeros} are of "
            f"two generations of {config.bits}-bit packing."
        )
    # Where a word has no bits to spare both are the same words.
    if dense and (not aligned or WORD % config.bits == 0 or not config.aligned):
        return Dense()
    return Aligned()


def from_tensors(tensors: Mapping[str, Any], config: Config) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the file's layout; uint8 zeros, or none if symmetric;
      ``row_group`` holds a ``weight_g_idx`` that is used and not simply in order.

    Raises:
      ValueError: As `check`; or if ``weight_shape`` is another, a scale is not finite,
        or ``weight_g_idx`` does not give every group its ``group_size`` inputs.
    """
    check(tensors, config)
    packed, scale = tensors["weight_packed"], np.asarray(tensors["weight_scale"])
    n, k = (int(size) for size in np.asarray(tensors["weight_shape"]))
    if n != packed.shape[0] or k < 1 or k % (config.group_size or k):
        raise ValueError(
            f"weight_shape={(n, k)} must be (N, K) with N={packed.shape[0]} and K a "
            f"positive multiple of group_size={config.group_size}."
        )
    _require_words(tuple(packed.shape), k, config)
    groups = k // (config.group_size or k)
    if config.strategy == "group":
        _require("weight_scale.shape", scale.shape, [(n, groups)])
    check_finite(tensors, ["weight_scale"])
    points = tensors.get("weight_zero_point")
    packed_points = None if points is None or points.ndim == 1 else points
    shape = None if packed_points is None else tuple(packed_points.shape)
    layout = _layout(tuple(packed.shape), shape, k, config)
    padding = layout.extents(packed.shape, config.bits)[0] - k
    zero = None if points is None else _read_zeros(points, n, config.bits, layout)
    return tensor.build(
        (jnp.asarray(np.asarray(packed).view(np.uint32)),),
        jnp.asarray(scale.reshape(-1, groups).T),
        zero,
        layout=layout,
        segments=(Segment(config.bits, config.group_size, padding),),
        affine=Affine.CENTERED if zero is None else Affine.ZERO,
        row_group=_row_group(tensors.get("weight_g_idx"), groups, config),
    )


def _read_zeros(
    points: Any, n: int, bits: int, layout: tensor.Layout
) -> UInt8[Array, "groups n"]:
    if points.ndim == 1:  # one in all, which is not packed
        value = np.asarray(points).astype(np.int16) + 2 ** (bits - 1)
        if value.min() < 0 or value.max() >= 2**bits:
            raise ValueError(
                f"weight_zero_point={int(points[0])} does not fit {bits} bits."
            )
        return jnp.asarray(value.astype(np.uint8)[None])
    unpack = unpack_aligned if layout == Aligned() else unpack_dense
    zeros = unpack(jnp.asarray(points), bits, axis=0, transpose=True)
    return zeros[:, :n]


def _row_group(g_idx: Any, groups: int, config: Config) -> Array | None:
    """The group of each row, or None where it is simply ``row // group_size``."""
    if g_idx is None or (np.asarray(g_idx) == -1).any():
        return None
    index, size = np.asarray(g_idx), config.group_size or 1
    in_range = index.min() >= 0 and index.max() < groups
    if not in_range or (np.bincount(index, minlength=groups) != size).any():
        raise ValueError(
            f"weight_g_idx from {index.min()} to {index.max()} must give each of "
            f"{groups} groups {size} inputs, or be -1."
        )
    in_order = (index == np.arange(index.size) // size).all()
    return None if in_order else jnp.asarray(index)


def to_tensors(qt: QTensor, layout: tensor.Layout | None = None) -> dict[str, Any]:
    """Writes one quantized matrix under the upstream's names.

    A ``weight_g_idx`` is written only where rows are not in the order of their groups;
    releases from 0.20 on do not read it.

    Args:
      qt: A matrix of one width, with integer zeros or symmetric, groups of rows.
      layout: `Dense` or `Aligned`. None keeps that of ``qt``, and takes `Dense` for
        others.

    Returns:
      ``weight_packed``, ``weight_scale``, ``weight_shape`` (NumPy's int64), and where
      they are needed ``weight_zero_point`` and ``weight_g_idx``.

    Raises:
      ValueError: If compressed-tensors cannot hold ``qt``, with the reason.
    """
    if layout is None:
        layout = qt.layout if qt.layout == Aligned() else Dense()
    _check_holdable(qt, layout)
    return _write(qt, layout) | {"weight_shape": np.array([qt.n, qt.k], np.int64)}


@functools.partial(jax.jit, static_argnums=1)
def _write(qt: QTensor, layout: tensor.Layout) -> dict[str, Array]:
    """Everything but ``weight_shape``, which JAX cannot hold in 64 bits."""
    (bits, size, _), q, scale = qt.segments[0], decode.codes(qt), tensor.plain(qt.scale)
    g_idx = qt.row_group
    if qt.order is not None:
        if g_idx is None and size is not None:
            g_idx = jnp.arange(qt.k, dtype=jnp.int32) // size
        inverse = jnp.argsort(qt.order)
        q, g_idx = q[inverse], None if g_idx is None else g_idx[inverse]
    whole = scale.shape == (1, 1) and qt.n > 1
    tensors = {
        "weight_packed": jax.lax.bitcast_convert_type(layout.pack(q, bits), jnp.int32),
        "weight_scale": scale[0] if whole else scale.T,
    }
    if qt.zero is not None:
        zero = tensor.plain(qt.zero)
        pack = pack_aligned if layout == Aligned() else pack_dense
        tensors["weight_zero_point"] = (
            (zero[0].astype(jnp.int16) - 2 ** (bits - 1)).astype(jnp.int8)
            if whole
            else jax.lax.bitcast_convert_type(pack(zero.T, bits, axis=0), jnp.int32)
        )
    if g_idx is not None:
        tensors["weight_g_idx"] = g_idx
    return tensors


def _check_holdable(qt: QTensor, layout: tensor.Layout) -> None:
    reason, size = None, qt.segments[0].group_size
    if layout not in (Dense(), Aligned()):
        reason = f"layout={layout!r} must be Dense() or Aligned()"
    elif qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif len(qt.segments) != 1:
        reason = "its rows have several widths; EXL2 holds those"
    elif qt.grouping is not tensor.Grouping.ROWS or qt.input_scale is not None:
        reason = f"it has {qt.grouping.value} groups or an input scale"
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
        reason = "some columns share scales, or its groups are not of one size"
    if reason:
        raise ValueError(f"compressed-tensors cannot hold {qt!r}: {reason}.")
