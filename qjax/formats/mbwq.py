"""MBWQ of bitorch-engine: 2, 4 or mixed bits with float zeros and an input scale.

``qweight`` holds each column as the bit stream of `qjax.bits`, at four bits

    bit 31                                                            bit 0
    | q[8i+7, j] | q[8i+6, j] | ...  | q[8i+2, j] | q[8i+1, j] | q[8i, j] |

With ``q_groups`` the rows have several widths, as `qjax.formats.q_groups` draws them;
without, all have 2 or 4 bits and groups of one size. The layer computes
``y = (x * channel_scale) @ W`` with

    W[q_perm[k], n] = q[k, n] * scales[g, n] - zeros[g, n]

rounded once to float16: `dequantize` gives ``channel_scale[:, None] * W``, and
`unpack_qweight` gives ``W``. A ``q_perm`` of zeros means the identity without
``q_groups``; with them the kernels upstream would write all rows to row 0. Zeros are
held negated (`Affine.OFFSET`). The buffers of double quantization that a layer saves
before it is prepared are never used by it, and are ignored here.

Source: GreenBitAI/bitorch-engine, bitorch_engine/layers/qlinear/nbit/cuda/utils.py,
mbwq_layer.py and mbwq_linear_cuda_kernel.cu, commit
0009b1f8178e86df6433383879c0005a49c0cc92; GreenBitAI/green-bit-llm,
green_bit_llm/common/model.py and utils.py, commit
71a575da60524c9f7b1b04f63ad397a7c7650309.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float16, Int16, Int32

from qjax import decode, tensor
from qjax.formats.checks import (
    Expected,
    check_finite,
    check_method,
    check_object,
    check_shapes,
    check_tensors,
    group_size_of,
)
from qjax.formats.gathering import of_whole
from qjax.formats.gptq import Stream
from qjax.formats.q_groups import (
    check_permutation,
    groups_of,
    join_words,
    read_groups,
    split_words,
    unwritable,
    write_groups,
)
from qjax.tensor import Affine, Grouping, QTensor, Segment

_EXPECTED = {
    "qweight": Expected((jnp.int32,), 2),
    "scales": Expected((jnp.float16,), 2),
    "zeros": Expected((jnp.float16,), 2),
    "q_perm": Expected((jnp.int16,), 1),
    "channel_scale": Expected((jnp.float16,), 3, optional=True),
    "q_groups": Expected((jnp.int16,), 1, optional=True),
    # Derived, or buffers of the base class that the layer deletes unused.
    "q_group_map": Expected((jnp.int16,), 1, optional=True),
    "g_idx": Expected((jnp.int32,), 1, optional=True),
    "wf": Expected((jnp.int32,), 2, optional=True),
    "qstatistic": Expected((jnp.uint8,), 3, optional=True),
    "qzeros_zeros": Expected((jnp.float16,), 3, optional=True),
    "qzeros_scales": Expected((jnp.float16,), 3, optional=True),
    "qscales_zeros": Expected((jnp.float16,), 3, optional=True),
    "qscales_scales": Expected((jnp.float16,), 3, optional=True),
}
TENSORS = tuple(_EXPECTED)
# What the kernels of one width handle; they read any smallest group as it is meant.
_BITS, _SMALLEST_GROUP, _KERNEL_ROWS = (2, 4), 32, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Bits and group size of a module; its shapes and ``q_groups`` say the rest.

    Attributes:
      bits: Width of a code without ``q_groups``; None takes it from the shapes.
      group_size: Rows that share a scale without ``q_groups``; None takes it from the
        shapes, as `checks.group_size_of` does.
      strategy: What ``quant_strategy.json`` says: (block, module, bits, group_size), of
        which bits 0 leaves a module dense.
    """

    bits: int | None = None
    group_size: int | None = None
    strategy: tuple[tuple[str, str, int, int], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads green-bit-llm's ``quant_strategy.json``, or bits and group size alone.

        Args:
          entry: The parsed JSON object: ``measurement`` maps blocks such as
            "model.layers.0" to modules such as "q_proj" (experts and routers under the
            names that green-bit-llm has for them), and these to ``bits`` and
            ``group_size``. Or ``bits`` and ``group_size`` of all modules.

        Returns:
          The configuration of modules without a strategy.

        Raises:
          ValueError: If a field has a wrong type or value.
        """
        check_method(entry, "mbwq")
        width, group_size = entry.get("bits"), entry.get("group_size")
        if width is not None and (type(width) is not int or width not in _BITS):
            raise ValueError(f"bits={width!r} must be one of {_BITS}.")
        if group_size is not None and (
            type(group_size) is not int or group_size < _SMALLEST_GROUP
        ):
            raise ValueError(
                f"group_size={group_size!r} must be at least {_SMALLEST_GROUP}."
            )
        strategy = []
        blocks = check_object("measurement", entry.get("measurement", {}))
        for block, modules in blocks.items():
            for module, one in check_object(block, modules).items():
                bits_and_size = _strategy(one, f"{block}.{module}")
                strategy.append((block, module, *bits_and_size))
        return cls(bits=width, group_size=group_size, strategy=tuple(strategy))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        for block, name, bits, group_size in self.strategy:
            path = module.removeprefix(f"{block}.")
            if path != module and name == _strategy_name(path):
                return Config(bits=bits, group_size=group_size) if bits else None
        return dataclasses.replace(self, strategy=())


def _strategy(one: Any, where: str) -> tuple[int, int]:
    """Width of the first rows, which is that of all in a layer mix, and group size."""
    match one:
        case {"desc": str(text)} if "Not quantized" in text:
            return 0, 0
        case {"bits": [int(bits), *_], "group_size": {**sizes}}:
            size = sizes.get(str(bits))
            if type(size) is int and size > 0:
                return bits, size
    raise ValueError(
        f"{where}={one!r} must have bits, a list, and group_size, which maps each of "
        "them to a positive integer."
    )


def _strategy_name(path: str) -> str:
    """What the strategy calls a module of a block: its last name, but for experts."""
    parents, _, last = path.rpartition(".")
    if parents.endswith("shared_experts"):
        return f"moe_shared_expert_{last}"
    if ".experts." in f"{parents}.":
        return f"moe_expert_{last}"
    return "moe_gate" if path == "mlp.gate" else last


def check(tensors: Mapping[str, Any], config: Config) -> None:
    """Checks names, dtypes and shapes of one module's tensors, and no values.

    Args:
      tensors: Arrays or anything with ``shape`` and ``dtype``, by upstream name:
        ``qweight`` int32 ``[rows of words, n]``, ``scales`` and ``zeros`` float16
        ``[groups, n]``, ``q_perm`` int16 ``[k]``; optionally ``channel_scale`` float16
        ``[1, 1, k]`` and, for mixed bits, ``q_groups`` int16 ``[2 * groups]``. The
        other `TENSORS` are ignored.
      config: The module's configuration.

    Raises:
      ValueError: Naming the tensor, what it has and what it should have.
    """
    check_tensors(tensors, _EXPECTED, "MBWQ")
    (height, n), (k,) = tensors["qweight"].shape, tensors["q_perm"].shape
    if not height or not n or not k:
        raise ValueError(f"qweight.shape={(height, n)} and k={k} must not be empty.")
    if "q_groups" in tensors:
        (pairs,) = tensors["q_groups"].shape
        if not pairs or pairs % 2:
            raise ValueError(f"q_groups.shape={(pairs,)} must be (2 * groups,).")
        groups, source = pairs // 2, f"q_groups.shape={(pairs,)}"
    else:
        segment = _uniform(tensors, config)
        groups = -(-k // (segment.group_size or k))
        source = f"bits={segment.bits}, group_size={segment.group_size}"
    check_shapes(
        tensors,
        {"scales": (groups, n), "zeros": (groups, n), "channel_scale": (1, 1, k)},
        f"qweight.shape={(height, n)}, k={k} and {source}",
    )


def _uniform(tensors: Mapping[str, Any], config: Config) -> Segment:
    """Width and group size where all rows have the same."""
    (height, _), (k,) = tensors["qweight"].shape, tensors["q_perm"].shape
    bits, rest = divmod(height * 32, k)
    if rest or k % 32 or bits not in _BITS or bits != (config.bits or bits):
        wanted = f"bits={config.bits}" if config.bits else f"bits in {_BITS}"
        raise ValueError(
            f"qweight.shape[0]={height} must be k * bits / 32 with k={k} a multiple of "
            f"32 and {wanted}; rows of several widths come with q_groups."
        )
    if config.group_size is not None:
        return Segment(bits, config.group_size)
    groups = tensors["scales"].shape[0]
    size = group_size_of(k, groups)
    if size is None or size < _SMALLEST_GROUP:
        raise ValueError(
            f"scales.shape[0]={groups} does not cut k={k} into groups of a power of "
            f"two, at least {_SMALLEST_GROUP}; the configuration must have group_size."
        )
    return Segment(bits, size)


def from_tensors(tensors: Mapping[str, Any], config: Config | None = None) -> QTensor:
    """Reads one quantized matrix.

    Args:
      tensors: Concrete arrays by upstream name, as `check` lists them.
      config: The module's configuration.

    Returns:
      ``[k, n]`` tensor in the layout `gptq.Stream` with ``zero`` the negated zeros.
      ``order`` is ``q_perm``, None where upstream has none; ``input_scale`` is
      ``channel_scale``, None where it is all ones.

    Raises:
      ValueError: As `check` and `q_groups.read_groups`; or if a number is not finite,
        ``q_perm`` is neither a permutation nor, without ``q_groups``, all zeros, or a
        ``g_idx`` has other groups than the shapes were taken for.
    """
    config = config or Config()
    check(tensors, config)
    check_finite(tensors, ("scales", "zeros", "channel_scale"))
    qweight = np.asarray(tensors["qweight"])
    if "q_groups" in tensors:
        groups = read_groups(tensors["q_groups"], qweight.shape[0])
        words, segments = split_words(qweight, groups)
        k = sum(groups.rows)
    else:
        words = [jnp.asarray(qweight.view(np.uint32))]
        k = tensors["q_perm"].shape[0]
        segments = [_uniform(tensors, config)]
        if config.group_size is None:
            _check_guess(tensors.get("g_idx"), segments[0].group_size or k)
    scale = np.asarray(tensors.get("channel_scale", 1)).reshape(-1)
    return tensor.build(
        words,
        jnp.asarray(tensors["scales"]),
        -jnp.asarray(tensors["zeros"]),
        layout=Stream(),
        segments=segments,
        affine=Affine.OFFSET,
        order=_read_perm(np.asarray(tensors["q_perm"]), k, "q_groups" in tensors),
        input_scale=None if (scale == 1).all() else jnp.asarray(scale),
    )


def _check_guess(g_idx: Any, group_size: int) -> None:
    """The layer has no use for ``g_idx``, but saves its groups in it."""
    if g_idx is not None:
        rows = np.arange(len(g_idx))
        if not np.array_equal(rows // group_size, g_idx):
            raise ValueError(
                f"g_idx does not have the groups of {group_size} rows that "
                "scales.shape[0] looks like; the configuration must have group_size."
            )


def _read_perm(q_perm: np.ndarray, k: int, mixed: bool) -> Int32[Array, " k"] | None:
    if not q_perm.any():
        if not mixed:
            return None
        raise ValueError(
            "q_perm is all zeros, which means no permutation only without q_groups; "
            "here every row would be row 0. Write arange(k) for the identity."
        )
    unsigned = q_perm.view(np.uint16).astype(np.int32)
    is_moved = check_permutation(unsigned, k, "q_perm")
    # Without q_groups no order is written as zeros, so that the identity must be kept.
    return jnp.asarray(unsigned) if is_moved or not mixed else None


@of_whole
def to_tensors(qt: QTensor, mixed: bool | None = None) -> dict[str, Array]:
    """Writes one quantized matrix under the upstream's names.

    Args:
      qt: A float16 matrix with float zeros that are added, or none: EXL2's middle codes
        become zeros without loss.
      mixed: Whether to write ``q_groups``; None does where the rows need it.

    Returns:
      ``qweight``, ``scales``, ``zeros``, ``q_perm``, ``channel_scale``, ``q_groups``.

    Raises:
      ValueError: If MBWQ cannot hold ``qt``, with the reason.
    """
    if mixed is None:
        mixed = len(qt.segments) > 1 or qt.bits not in _BITS
    _require_holdable(qt, mixed)
    scale, zero = tensor.plain(qt.scale), _zeros(qt)
    if qt.affine is Affine.CENTERED and not bool(jnp.isfinite(zero).all()):
        raise ValueError(
            f"MBWQ cannot hold {qt!r}: scale * 2**(bits-1) overflows float16."
        )
    tensors = {
        "qweight": join_words(qt, qt.n),
        "scales": scale,
        "zeros": zero,
        "q_perm": _q_perm(qt, mixed),
        "channel_scale": _channel_scale(qt),
    }
    return tensors | {"q_groups": write_groups(groups_of(qt))} if mixed else tensors


def _zeros(qt: QTensor) -> Float16[Array, "groups n"]:
    if qt.zero is not None:
        return -tensor.plain(qt.zero)
    counts = tensor.group_counts(qt)
    middle = [2.0 ** (segment.bits - 1) for segment in qt.segments]
    factor = np.repeat(middle, counts).astype(np.float16)
    return tensor.plain(qt.scale) * jnp.asarray(factor)[:, None]


def _q_perm(qt: QTensor, mixed: bool) -> Int16[Array, " k"]:
    if qt.order is None:
        order = jnp.arange(qt.k) if mixed else jnp.zeros(qt.k, jnp.int32)
    else:
        order = qt.order
    return jax.lax.bitcast_convert_type(order.astype(jnp.uint16), jnp.int16)


def _channel_scale(qt: QTensor) -> Float16[Array, "1 1 k"]:
    if qt.input_scale is None:
        return jnp.ones((1, 1, qt.k), jnp.float16)
    return qt.input_scale[None, None]


def _require_holdable(qt: QTensor, mixed: bool) -> None:
    """Says why MBWQ cannot hold the tensor, if it cannot."""
    reason, size = None, qt.segments[0].group_size or qt.k
    floats = (qt.scale, qt.zero, qt.input_scale)
    if qt.batch:
        reason = f"it stacks {qt.batch} matrices; write them one by one"
    elif qt.grouping is not Grouping.ROWS or qt.row_group is not None:
        reason = "its groups are not runs of stored rows"
    elif not (
        qt.affine is Affine.OFFSET or (qt.affine is Affine.CENTERED and qt.zero is None)
    ):
        reason = f"{qt.affine.value} here is not q * scale - zero; requantize it"
    elif any(leaf is not None and leaf.dtype != jnp.float16 for leaf in floats):
        reason = "scales, zeros and input scale must be float16"
    elif any(p.shape[-1] != qt.n for p in floats[:2] if p is not None):
        reason = "columns share scales or zeros"
    elif qt.k % 32 or qt.n % 4 or qt.k > 2**16:
        reason = f"k={qt.k} must be a multiple of 32 up to 65536, n={qt.n} one of 4"
    elif mixed:
        reason = unwritable(groups_of(qt))
    elif len(qt.segments) > 1 or qt.bits not in _BITS:
        reason = f"without q_groups its rows must all have one of {_BITS} bits"
    elif (_KERNEL_ROWS % size and size % _KERNEL_ROWS) or size < _SMALLEST_GROUP:
        reason = (
            f"it has groups of {size} rows, and upstream's kernels need 32, 64 or a "
            f"multiple of {_KERNEL_ROWS}; write it with mixed=True"
        )
    if reason:
        raise ValueError(f"MBWQ cannot hold {qt!r}: {reason}.")


def unpack_qweight(qt: QTensor) -> Float16[Array, "k n"]:
    """The weight that the layer multiplies ``x * channel_scale`` by.

    Args:
      qt: What `from_tensors` returned.

    Returns:
      ``[k, n]`` with the one rounding of the kernels; rows in the inputs' order.
    """
    return decode.dequantize(dataclasses.replace(qt, input_scale=None))
