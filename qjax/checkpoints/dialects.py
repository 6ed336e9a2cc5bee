"""What `save` can write: the tensors of a matrix, and the config beside them."""

import collections
import dataclasses
import functools
import glob
import re
import types
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from qjax import tensor
from qjax.formats import (
    awq,
    bitnet,
    compressed_tensors,
    exl2,
    fp8,
    gptq,
    hqq,
    modelopt,
    quark,
)
from qjax.formats import compressed_tensors_floats as floats
from qjax.formats.block_scale import BlockScale
from qjax.formats.checks import lacks_even_groups, lacks_narrow_zeros
from qjax.formats.hqq_config import FIELDS
from qjax.formats.patterns import ends_path
from qjax.tensor import QTensor

# Matrices by the paths of their modules; the leaves may be abstract.
Matrices = Mapping[str, QTensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one kind of checkpoint is written.

    Attributes:
      tensors: Gives a matrix under the upstream's names; a ValueError says why not.
      describe: Makes the ``quantization_config`` of all matrices and of the paths of
        modules with a dense matrix.
      widths: Bits that a code of a quantizer may have; none where the format has scales
        of its own.
      quantizer: What rounds to its codes, where these are no whole numbers.
      scale_dtype: The dtype of scales that others who read these files expect; None for
        that of the dense weights.
      refusal: Says what the values of a matrix have against it, beyond `tensors`; of
        abstract leaves, what they might have.
      against: Says which matrices cannot stand beside the others, and why.
    """

    tensors: Callable[[QTensor], Mapping[str, Any]]
    describe: Callable[[Matrices, Sequence[str]], dict[str, Any]]
    widths: Collection[int] = ()
    quantizer: Callable[..., QTensor] | None = None
    scale_dtype: DTypeLike | None = None
    refusal: Callable[[QTensor], str | None] = lambda qt: None
    against: Callable[[Matrices, Sequence[str]], dict[str, str]] = lambda m, d: {}


def _gptq(checkpoint_format: gptq.Checkpoint) -> Dialect:
    return Dialect(
        tensors=functools.partial(gptq.to_tensors, checkpoint_format=checkpoint_format),
        describe=functools.partial(_describe_gptq, checkpoint_format),
        widths=gptq.WIDTHS[checkpoint_format],
        scale_dtype=jnp.float16,
        refusal=_odd_zeros if checkpoint_format == "gptq" else lacks_narrow_zeros,
    )


def _odd_zeros(qt: QTensor) -> str | None:
    zero = tensor.plain(qt.zero)
    if isinstance(zero, jax.ShapeDtypeStruct):
        return (
            "it has zeros, and GPTQ v1 cannot store those of 0; 'gptq_v2' holds all of "
            "them, and symmetric codes have none."
        )
    if zero is None or not (zero == 0).any():
        return lacks_narrow_zeros(qt)
    return (
        "it has zeros of 0, which GPTQ v1 stores as minus one, and which decoders read "
        "as 0 or as 2**bits; 'gptq_v2' holds them."
    )


def _describe_gptq(
    checkpoint_format: str, matrices: Matrices, dense: Sequence[str]
) -> dict[str, Any]:
    kinds = {name: _width(qt) for name, qt in matrices.items()}
    bits, size = _usual(kinds)
    # Loaders leave a head dense unless "lm_head" says otherwise.
    rules: dict[str, Any] = {
        f"-:{_exactly(name)}": {} for name in dense if name != "lm_head"
    }
    rules |= {
        f"+:{_exactly(name)}": {"bits": kind[0], "group_size": _or_all(kind[1])}
        for name, kind in kinds.items()
        if kind != (bits, size)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": _or_all(size),
        "desc_act": any(
            qt.row_group is not None or qt.order is not None for qt in matrices.values()
        ),
        "sym": all(qt.zero is None for qt in matrices.values()),
        "lm_head": "lm_head" in matrices,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qjax"]},
    } | ({"dynamic": rules} if rules else {})


def _describe_awq(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    _, size = _usual({name: _width(qt) for name, qt in matrices.items()})
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _or_all(size),
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(dense) or None,
    }


def _against_awq(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    kinds = {name: _width(qt) for name, qt in matrices.items()}
    _, size = _usual(kinds)
    reasons = {
        name: f"AWQ has one group size for all, here {size}, and it has {kind[1]}."
        for name, kind in kinds.items()
        if kind[1] != size
    }
    for name in matrices:
        for part in (part for part in dense if part in name):
            reasons[name] = (
                f"AWQ leaves modules dense by parts of their names, and {part}, which "
                "is dense, is a part of its."
            )
    return reasons


def _describe_fp8(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    config = _usual({name: fp8.config_of(qt) for name, qt in matrices.items()})
    size = config.block_size
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if size is None else list(size),
        "scale_fmt": config.scale_fmt,
        "modules_to_not_convert": list(dense) or None,
    }


def _against_fp8(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    configs = {name: fp8.config_of(qt) for name, qt in matrices.items()}
    usual = _usual(configs)
    reasons = {
        name: f"FP8 has scales of one kind for all, here {_of_fp8(usual)}, and it has "
        f"{_of_fp8(config)}; load with prepare=False, which keeps blocks."
        for name, config in configs.items()
        if config != usual
    }
    for name, qt in matrices.items():
        if configs[name].block_size is None and qt.scale.shape[-1] > 1:
            reasons[name] = (
                "it has a scale for each output, which loaders of FP8 do not read; "
                "compressed-tensors holds it."
            )
    return reasons | _against_ends("FP8", matrices, dense)


def _against_ends(
    title: str, matrices: Matrices, dense: Sequence[str]
) -> dict[str, str]:
    """Names the matrices that a loader would leave dense beside those that are."""
    return {
        name: f"{title} leaves modules dense by the ends of their paths, and {part}, "
        "which is dense, is that of its."
        for name in matrices
        for part in dense
        if ends_path(re.escape(part), name)
    }


def _of_fp8(config: fp8.Config) -> str:
    if config.block_size is None:
        return f"{config.scale_fmt} for columns"
    rows, columns = config.block_size
    return f"{config.scale_fmt} for blocks of {rows} x {columns}"


def _describe_bitnet(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    del matrices  # All are of one kind.
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(dense) or None,
    }


def _describe_modelopt(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    algorithms = {name: modelopt.algorithm_of(qt) for name, qt in matrices.items()}
    size = next(iter(matrices.values())).segments[0].group_size
    return {
        "quant_method": "modelopt",
        "quant_algo": _usual(algorithms),
        "group_size": size,
        "ignore": list(dense),
        "producer": {"name": "qjax"},
    }


def _against_modelopt(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    del dense  # Paths, which fit no others.
    algorithms = {name: modelopt.algorithm_of(qt) for name, qt in matrices.items()}
    usual = _usual(algorithms)
    return {
        name: "it has one scale for all, with which loaders of ModelOpt's files want "
        "one of the activations; compressed-tensors holds it."
        if algorithm == "FP8"
        else f"one algorithm is for all, here {usual}, and it has {algorithm}."
        for name, algorithm in algorithms.items()
        if algorithm == "FP8" or algorithm != usual
    }


def _describe_quark(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    schemes = {name: quark.scheme_of(qt) for name, qt in matrices.items()}
    usual = _usual(schemes)
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": usual.to_json(),
        "layer_type_quant_config": {},
        "layer_quant_config": {
            glob.escape(name): scheme.to_json()
            for name, scheme in schemes.items()
            if scheme != usual
        },
        "kv_cache_quant_config": {},
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": [glob.escape(name) for name in dense],
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        # The release whose files these are like.
        "version": "0.13",
    }


def _describe_compressed(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    kinds = {name: _scheme(qt) for name, qt in matrices.items()}
    usual = _usual(kinds)
    schemes = [
        usual,
        *(kind for kind in dict.fromkeys(kinds.values()) if kind != usual),
    ]
    formats = {scheme.format for scheme in schemes}
    groups = {
        f"group_{i}": {
            "format": scheme.format,
            "input_activations": None,
            "output_activations": None,
            # Paths go before classes.
            "targets": ["Linear"]
            if scheme == usual
            else [name for name, kind in kinds.items() if kind == scheme],
            "weights": {
                "actorder": scheme.actorder,
                "block_structure": scheme.block_size and list(scheme.block_size),
                "dynamic": False,
                "group_size": scheme.group_size,
                "num_bits": scheme.bits,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": scheme.strategy,
                "symmetric": scheme.symmetric,
                "type": "float" if scheme.is_float else "int",
            },
        }
        for i, scheme in enumerate(schemes)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # The last release that packs as `Dense` and reads weight_g_idx.
        "version": "0.19.0",
    }


@dataclasses.dataclass(frozen=True)
class _Scheme:
    bits: int
    group_size: int | None
    strategy: str
    symmetric: bool
    actorder: str | None
    format: str = "pack-quantized"
    block_size: tuple[int, int] | None = None
    is_float: bool = False


def _scheme(qt: QTensor) -> _Scheme:
    bits, size = _width(qt)
    whole = tuple(qt.scale.shape) == (1, 1) and qt.n > 1
    strategy = "tensor" if whole else "channel" if size is None else "group"
    if qt.affine is tensor.Affine.FLOAT:
        return _float_scheme(qt, strategy)
    sorted_ = qt.row_group is not None or qt.order is not None
    return _Scheme(
        bits=bits,
        group_size=size if strategy == "group" else None,
        strategy=strategy,
        symmetric=qt.zero is None,
        actorder="group" if sorted_ and strategy == "group" else None,
    )


def _float_scheme(qt: QTensor, strategy: str) -> _Scheme:
    (bits, size), format_ = _width(qt), floats.format_of(qt)
    block_size = None
    if isinstance(qt.scale, BlockScale):
        strategy, block_size = "block", (qt.scale.rows, qt.scale.columns)
    elif size is not None and qt.scale.shape[-1] < qt.n:
        strategy, block_size = "block", (qt.n, size)
    elif format_ == floats.NVFP4:
        strategy = "tensor_group"
    return _Scheme(
        bits=bits,
        group_size=size if strategy.endswith("group") else None,
        strategy=strategy,
        symmetric=True,
        actorder=None,
        format=format_,
        block_size=block_size,
        is_float=True,
    )


def _describe_exl2(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    del dense  # A module is quantized if its tensors are.
    body = {name: qt for name, qt in matrices.items() if name != "lm_head"} or matrices
    weights = sum(qt.k * qt.n for qt in body.values())
    mean = sum(qt.bits * qt.k * qt.n for qt in body.values()) / weights
    head = matrices.get("lm_head")
    return {
        "quant_method": "exl2",
        "bits": round(mean, 2),
        "head_bits": 16 if head is None else round(head.bits),
    }


def _odd_columns(qt: QTensor) -> str | None:
    if qt.n % 32 == 0:
        return None
    return (
        f"EXL2 pads n={qt.n} to a multiple of 32 and does not write how many columns "
        "there were."
    )


def _describe_hqq(matrices: Matrices, dense: Sequence[str]) -> dict[str, Any]:
    tagged = {hqq.tag_of(name): hqq.config_of(qt) for name, qt in matrices.items()}
    one, *others = dict.fromkeys(tagged.values())
    by_tag = {tag: config.to_json() for tag, config in tagged.items()}
    return {
        "quant_method": "hqq",
        "quant_config": by_tag if others else one.to_json(),
        # Transformers compares tags, not paths.
        "skip_modules": sorted({hqq.tag_of(name) for name in dense}),
    }


def _against_hqq(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    """Names the matrices that share a tag with others of another kind."""
    configs = {name: hqq.config_of(qt) for name, qt in matrices.items()}
    kinds: dict[str, dict[str, hqq.Config]] = {}
    for name, config in configs.items():
        kinds.setdefault(hqq.tag_of(name), {})[name] = config
    usual = {tag: _usual(kind) for tag, kind in kinds.items()}
    left = {hqq.tag_of(name): name for name in dense}
    reasons = {}
    for name, config in configs.items():
        tag = hqq.tag_of(name)
        # Transformers also looks for tags of dense modules in whole paths.
        if shared := [one for one in left if one == tag or one in name]:
            reasons[name] = (
                f"HQQ leaves modules dense by tags, and {shared[0]!r}, the tag of "
                f"{left[shared[0]]}, which is dense, is its or a part of its name."
            )
        elif config != usual[tag]:
            reasons[name] = (
                f"HQQ tells modules apart by tags, and most of {tag!r} have "
                f"{_said(usual[tag])}, where it has {_said(config)}."
            )
    return reasons


def _said(config: hqq.Config) -> str:
    return f"{config.nbits} bits in groups of {config.group_size} on axis {config.axis}"


def _width(qt: QTensor) -> tuple[int, int | None]:
    return qt.segments[0].bits, qt.segments[0].group_size


def _or_all(size: int | None) -> int:
    return -1 if size is None else size


def _usual(kinds: Mapping[str, Any]) -> Any:
    kinds_: Sequence[Hashable] = list(kinds.values())
    return collections.Counter(kinds_).most_common(1)[0][0]


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"


# By the name that `save` takes.
DIALECTS: Mapping[str, Dialect] = types.MappingProxyType(
    {
        "gptq": _gptq("gptq"),
        "gptq_v2": _gptq("gptq_v2"),
        "gptq_p": _gptq("gptq_p"),
        "awq": Dialect(
            tensors=awq.to_tensors,
            describe=_describe_awq,
            widths=awq.WIDTHS,
            scale_dtype=jnp.float16,
            refusal=lacks_narrow_zeros,
            against=_against_awq,
        ),
        "compressed-tensors": Dialect(
            tensors=lambda qt: compressed_tensors.to_tensors(
                qt, compressed_tensors.Dense()
            ),
            describe=_describe_compressed,
            widths=range(1, 9),
            refusal=lambda qt: lacks_narrow_zeros(qt) or lacks_even_groups(qt),
        ),
        "exl2": Dialect(
            tensors=exl2.to_tensors,
            describe=_describe_exl2,
            refusal=_odd_columns,
        ),
        "hqq": Dialect(
            tensors=hqq.to_tensors,
            describe=_describe_hqq,
            # Codes of 5 and 6 bits would take fields of 8.
            widths=FIELDS.keys() - {5, 6},
            against=_against_hqq,
        ),
        "fp8": Dialect(
            tensors=fp8.to_tensors,
            describe=_describe_fp8,
            widths=(8,),
            quantizer=fp8.quantize,
            against=_against_fp8,
        ),
        "bitnet": Dialect(
            tensors=bitnet.to_tensors,
            describe=_describe_bitnet,
            against=functools.partial(_against_ends, "BitNet"),
        ),
        "modelopt": Dialect(
            tensors=modelopt.to_tensors,
            describe=_describe_modelopt,
            against=_against_modelopt,
        ),
        "quark": Dialect(
            tensors=quark.to_tensors,
            describe=_describe_quark,
            widths=(4, 8),
            refusal=lacks_narrow_zeros,
        ),
    }
)


def centered(qt: Any) -> Any:
    """Leaves out zeros that are all the middle code, which is what symmetric means.

    Args:
      qt: A matrix with concrete leaves, or a dense weight.

    Returns:
      What was given, or a matrix that says the same without zeros.
    """
    if not isinstance(qt, QTensor):
        return qt
    if len(qt.segments) != 1 or qt.zero is None or qt.affine is not tensor.Affine.ZERO:
        return qt
    zero, middle = tensor.plain(qt.zero), 2 ** (qt.segments[0].bits - 1)
    if zero.dtype != jnp.uint8 or not (zero == middle).all():
        return qt
    return dataclasses.replace(qt, zero=None, affine=tensor.Affine.CENTERED)
