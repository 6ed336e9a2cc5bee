"""What `save` can write: the tensors of a matrix, and the config beside them."""

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from qjax import tensor
from qjax.checkpoints import describing
from qjax.checkpoints.describing import Matrices
from qjax.formats import (
    awq,
    bitnet,
    bnb,
    compressed_tensors,
    exl2,
    fp8,
    gptq,
    hqq,
    mlx,
    modelopt,
    quanto,
    quark,
    torchao,
)
from qjax.formats.checks import lacks_even_groups, lacks_narrow_zeros
from qjax.formats.hqq_config import FIELDS
from qjax.formats.mlx_config import FIELDS as FIELDS_OF_MLX
from qjax.formats.mlx_config import METAL_WIDTHS, MODES
from qjax.formats.patterns import ends_path
from qjax.tensor import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one kind of checkpoint is written.

    Attributes:
      tensors: Gives a matrix under the upstream's names; a ValueError says why not.
      describe: Makes the ``quantization_config`` of all matrices and of the paths of
        modules with a dense matrix.
      fields: Where in ``config.json`` that goes.
      beside: A file that has it, without ``quant_method``.
      widths: Bits that a code of a quantizer may have; none where the format has scales
        of its own.
      quantizer: What rounds to its codes, where these are no whole numbers.
      scale_dtype: The dtype of scales that others who read these files expect; None for
        that of the dense weights.
      refusal: Says what the values of a matrix have against it, beyond `tensors`; of
        abstract leaves, what they might have.
      encoded: Where values decide on the shapes of tensors or on what is described:
        gives a matrix whose values are known the scales of a file, which say so.
      against: Says which matrices cannot stand beside the others, and why.
      has_tables: Whether loaders read packed tables of embeddings.
      metadata: What the headers of files say of them, and of other tensors by name.
    """

    tensors: Callable[[QTensor], Mapping[str, Any]]
    describe: Callable[[Matrices, Sequence[str]], dict[str, Any]]
    fields: Collection[str] = ("quantization_config",)
    beside: str | None = None
    widths: Collection[int] = ()
    quantizer: Callable[..., QTensor] | None = None
    scale_dtype: DTypeLike | None = None
    refusal: Callable[[QTensor], str | None] = lambda qt: None
    encoded: Callable[[QTensor], QTensor] | None = None
    against: Callable[[Matrices, Sequence[str]], dict[str, str]] = lambda m, d: {}
    has_tables: bool = False
    metadata: Callable[[Matrices, Sequence[str]], dict[str, str]] = lambda m, d: {}


def _gptq(checkpoint_format: gptq.Checkpoint) -> Dialect:
    return Dialect(
        tensors=functools.partial(gptq.to_tensors, checkpoint_format=checkpoint_format),
        describe=functools.partial(describing.of_gptq, checkpoint_format),
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


def _against_awq(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    kinds = {name: describing.width(qt) for name, qt in matrices.items()}
    _, size = describing.most_common(kinds)
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


def _against_fp8(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    configs = {name: fp8.config_of(qt) for name, qt in matrices.items()}
    usual = describing.most_common(configs)
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


def _against_bitsandbytes(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    kinds = describing.kinds_of_bitsandbytes(matrices)
    usual = describing.most_common(kinds)
    reasons = {
        name: "bitsandbytes has one kind of codes for all, stored alike, here "
        f"{' in '.join(usual)}, and it has {' in '.join(kind)}."
        for name, kind in kinds.items()
        if kind != usual
    }
    return reasons | _against_ends("bitsandbytes", matrices, dense)


def _of_fp8(config: fp8.Config) -> str:
    if config.block_size is None:
        return f"{config.scale_fmt} for columns"
    rows, columns = config.block_size
    return f"{config.scale_fmt} for blocks of {rows} x {columns}"


def _against_modelopt(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    del dense  # Paths, which fit no others.
    algorithms = {name: modelopt.algorithm_of(qt) for name, qt in matrices.items()}
    usual = describing.most_common(algorithms)
    return {
        name: "it has one scale for all, with which loaders of ModelOpt's files want "
        "one of the activations; compressed-tensors holds it."
        if algorithm == "FP8"
        else f"one algorithm is for all, here {usual}, and it has {algorithm}."
        for name, algorithm in algorithms.items()
        if algorithm == "FP8" or algorithm != usual
    }


def _against_mlx(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    del dense
    return {
        name: f"MLX has paths beside {', '.join(FIELDS_OF_MLX)}, which are no paths."
        for name in matrices.keys() & {*FIELDS_OF_MLX, "quant_method"}
    }


def _against_metal(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    configs = {name: mlx.config_of(qt, "metal") for name, qt in matrices.items()}
    kinds = {name: (one.bits, one.group_size) for name, one in configs.items()}
    usual = describing.most_common(kinds)
    reasons = {
        name: "transformers has one width and group size for all, here "
        f"{usual[0]} bits in groups of {usual[1]}, and it has {kind[0]} and {kind[1]}."
        for name, kind in kinds.items()
        if kind != usual
    }
    if not dense:
        # Where nothing is said to stay dense, transformers leaves the head so.
        heads = [name for name in matrices if name.rpartition(".")[2] == "lm_head"]
        reasons |= dict.fromkeys(heads, "transformers would leave it dense.")
    return reasons | _against_ends("transformers", matrices, dense)


def _odd_columns(qt: QTensor) -> str | None:
    if qt.n % 32 == 0:
        return None
    return (
        f"EXL2 pads n={qt.n} to a multiple of 32 and does not write how many columns "
        "there were."
    )


def _against_hqq(matrices: Matrices, dense: Sequence[str]) -> dict[str, str]:
    """Names the matrices that share a tag with others of another kind."""
    configs = {name: hqq.config_of(qt) for name, qt in matrices.items()}
    kinds: dict[str, dict[str, hqq.Config]] = {}
    for name, config in configs.items():
        kinds.setdefault(hqq.tag_of(name), {})[name] = config
    usual = {tag: describing.most_common(kind) for tag, kind in kinds.items()}
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


# By the name that `save` takes.
DIALECTS: Mapping[str, Dialect] = types.MappingProxyType(
    {
        "gptq": _gptq("gptq"),
        "gptq_v2": _gptq("gptq_v2"),
        "gptq_p": _gptq("gptq_p"),
        "awq": Dialect(
            tensors=awq.to_tensors,
            describe=describing.of_awq,
            widths=awq.WIDTHS,
            scale_dtype=jnp.float16,
            refusal=lacks_narrow_zeros,
            against=_against_awq,
        ),
        "compressed-tensors": Dialect(
            tensors=lambda qt: compressed_tensors.to_tensors(
                qt, compressed_tensors.Dense()
            ),
            describe=describing.of_compressed,
            widths=range(1, 9),
            refusal=lambda qt: lacks_narrow_zeros(qt) or lacks_even_groups(qt),
        ),
        "exl2": Dialect(
            tensors=exl2.to_tensors,
            describe=describing.of_exl2,
            refusal=_odd_columns,
        ),
        "hqq": Dialect(
            tensors=hqq.to_tensors,
            describe=describing.of_hqq,
            # Codes of 5 and 6 bits would take fields of 8.
            widths=FIELDS.keys() - {5, 6},
            against=_against_hqq,
        ),
        "fp8": Dialect(
            tensors=fp8.to_tensors,
            describe=describing.of_fp8,
            widths=(8,),
            quantizer=fp8.quantize,
            against=_against_fp8,
        ),
        "bitsandbytes": Dialect(
            tensors=bnb.to_tensors,
            describe=describing.of_bitsandbytes,
            widths=(4, 8),
            quantizer=bnb.quantize,
            encoded=bnb.encoded,
            against=_against_bitsandbytes,
        ),
        "bitnet": Dialect(
            tensors=bitnet.to_tensors,
            describe=describing.of_bitnet,
            against=functools.partial(_against_ends, "BitNet"),
        ),
        "modelopt": Dialect(
            tensors=modelopt.to_tensors,
            describe=describing.of_modelopt,
            against=_against_modelopt,
        ),
        "quanto": Dialect(
            tensors=quanto.to_tensors,
            describe=describing.of_quanto,
            fields=(),
            beside="quanto_qmap.json",
            widths=(2, 4, 8),
            refusal=quanto.unloadable,
        ),
        "quark": Dialect(
            tensors=quark.to_tensors,
            describe=describing.of_quark,
            widths=(4, 8),
            refusal=lacks_narrow_zeros,
        ),
        "mlx": Dialect(
            tensors=mlx.to_tensors,
            describe=describing.of_mlx,
            fields=("quantization", "quantization_config"),
            widths=MODES["affine"].widths,
            quantizer=mlx.quantize,
            refusal=mlx.lacks_exact_offsets,
            against=_against_mlx,
            has_tables=True,
        ),
        "metal": Dialect(
            tensors=functools.partial(mlx.to_tensors, method="metal"),
            describe=describing.of_metal,
            widths=METAL_WIDTHS,
            quantizer=mlx.quantize,
            refusal=mlx.lacks_exact_offsets,
            against=_against_metal,
        ),
        "torchao": Dialect(
            tensors=torchao.to_tensors,
            describe=describing.of_torchao,
            widths=range(1, 9),
            refusal=lacks_narrow_zeros,
            against=functools.partial(_against_ends, "torchao"),
            metadata=torchao.metadata,
            has_tables=True,
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
