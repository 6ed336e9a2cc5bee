"""`qjax quantize`: a dense checkpoint in few bits."""

import contextlib
import dataclasses
import enum
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, SupportsFloat

import numpy as np
import typer

from qjax import checkpoints, rtn
from qjax.checkpoints import dialects, modules
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import Stored
from qjax.cli import faults
from qjax.cli.arguments import Overwrite, ShardGb, Source, Target, shard_bytes
from qjax.quantizers import clip, hqq, output_error
from qjax.rules import Spec

# Formats whose scales a quantizer makes.
_PACKINGS = [name for name, one in dialects.DIALECTS.items() if one.widths]
Packing = enum.StrEnum("Packing", list(_PACKINGS))


class Method(enum.StrEnum):
    """How codes are found."""

    RTN = "rtn"
    CLIP = "clip"
    HQQ = "hqq"


_MIN_BITS = 2
# Formats that add an offset to codes times scales.
_OF_OFFSETS = ("mlx", "metal")

# What arguments of Python are called here.
_OPTIONS = {
    "head=True": "--head",
    "rules has the pattern ": "--rule=",
    "skip=": "--skip=",
    "(skip)": "(--skip)",
    "group_size=": "--group-size=",
    "blocksize=": "--group-size=",
    "None for one group a column": "-1 for all inputs",
    ", or pad w": "",
    "w.shape[-2]=": "inputs k=",
    "a wider scale_dtype would hold it": "try --to compressed-tensors, whose scales "
    "have the dtype of the weights",
    " (checkpoints.convert)": "",
}

_QUANTIZERS = {"rtn": rtn.quantize, "clip": clip.quantize, "hqq": hqq.quantize}


def run(
    source: Source,
    target: Target,
    to: Annotated[
        Packing,
        typer.Option(
            "--to",
            metavar="FORMAT",
            show_default=False,
            help=f"Format to write: {', '.join(Packing)}.",
        ),
    ],
    bits: Annotated[
        int | None,
        typer.Option(
            min=_MIN_BITS,
            max=8,
            show_default=False,
            help="Width of a code. [default: 4, or 8 for fp8]",
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 for all of them.")
    ] = 128,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            show_default=False,
            help="Whether zero is the middle code, or each group has its own. "
            "[default: symmetric, but not for awq, hqq, mlx and metal]",
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="Round to nearest; also search the range of each group (80 times the "
            "work); or fit float zeros as HQQ does, for --to hqq."
        ),
    ] = Method.RTN,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS[,GROUP]",
            help="Another width, and group size, for modules whose whole path matches "
            "this regular expression. May be given several times; the first that "
            "matches decides, and --bits and --group-size where none does.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave modules dense whose whole path matches this regular "
            "expression, whatever --rule says. May be given several times.",
        ),
    ] = None,
    head: Annotated[
        bool, typer.Option("--head", help="Quantize lm_head, too.")
    ] = False,
    overwrite: Overwrite = False,
    shard_gb: ShardGb = 5.0,
) -> None:
    r"""Quantize the linear layers of a dense checkpoint.

    A matrix at a time, without data and without PyTorch. Embeddings, routers of a
    mixture (gate, router, shared_expert_gate) and lm_head stay dense, and tensors that
    are no matrices, such as fused experts. If a matrix cannot be quantized so, all such
    matrices are listed with the reason, and nothing is written. DST appears only when
    it is complete; until then, what is done is in .DST.partial, and the same command
    goes on after an interruption. Tokenizer and generation config are copied.

    It prints the bits of a weight, scales and zeros included, and the error of the
    weights, relative to their norm and averaged over the matrices. It runs on the CPU;
    `JAX_PLATFORMS=cuda qjax quantize ...` takes the GPU.

    **Examples**

    * For vLLM: `qjax quantize llama llama-ct --to compressed-tensors`
    * Ranges that cost little at three bits:
      `qjax quantize llama llama-3 --to gptq --bits 3 --group-size 64 --method clip`
    * Two bits, but more where they are worth it:
      `qjax quantize llama llama-mixed --to gptq --bits 2 --group-size 64
      --rule '.*\.layers\.[01]\..*=4' --rule '.*\.(v_proj|down_proj)=3,32'`
    * HQQ: `qjax quantize llama llama-hqq --to hqq --method hqq --group-size 64`
    * For Apple's GPUs: `qjax quantize llama llama-mlx --to mlx --group-size 64`
    * FP8 in blocks of 128 x 128: `qjax quantize llama llama-fp8 --to fp8`
    * NF4, or LLM.int8() with `--bits 8`:
      `qjax quantize llama llama-nf4 --to bitsandbytes --group-size 64`
    * Attention dense:
      `qjax quantize mixtral mixtral-awq --to awq --skip '.*\.self_attn\..*'`
    """
    with faults.on_stderr():
        recipe = _Recipe(
            to=to.value,
            bits=bits or (8 if to.value == "fp8" else 4),
            group_size=group_size,
            symmetric=symmetric,
            method=method.value,
        )
        rules = [*map(recipe.rule, rule or ()), (".*", recipe.spec())]
        size = shard_bytes(shard_gb)
        before, errors = _dense(source), []
        with faults.resumable(), _said_as_options():
            checkpoints.quantize(
                source,
                target,
                format=to.value,
                rules=rules,
                skip=skip or (),
                head=head,
                overwrite=overwrite,
                shard_bytes=size,
                watch=lambda _, w, packed: errors.append(output_error(w, packed)),
            )
        said = _summary(target, before, errors)
    typer.echo(f"{target}: {to.value}, {said}")


@contextlib.contextmanager
def _said_as_options() -> Iterator[None]:
    """Errors about arguments as errors about options."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for argument, option in _OPTIONS.items():
            text = text.replace(argument, option)
        raise ValueError(text) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What options ask for."""

    to: str
    bits: int
    group_size: int
    symmetric: bool | None
    method: str

    def rule(self, text: str) -> tuple[str, Spec]:
        """Reads a ``--rule``; a ValueError if it is none, or not possible."""
        # A pattern may have an equals sign of its own, in (?=...).
        found = re.fullmatch(r"(.+)=(\d+)(?:,(-?\d+))?", text, re.DOTALL)
        if found is None:
            raise ValueError(
                f"--rule={text!r} must be PATTERN=BITS or PATTERN=BITS,GROUP, such as "
                "'.*down_proj=8,64'."
            )
        pattern, bits, size = found.groups()
        size = self.group_size if size is None else int(size)
        other = dataclasses.replace(self, bits=int(bits), group_size=size)
        try:
            return pattern, other.spec()
        except ValueError as error:
            raise ValueError(f"--rule={text!r}: {error}") from None

    def spec(self) -> Spec:
        """How a matrix is quantized; a ValueError if options do not go together."""
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = self.to not in ("awq", "hqq", *_OF_OFFSETS)
        if reason := self._against(symmetric):
            raise ValueError(reason)
        dialect = dialects.DIALECTS[self.to]
        # Offsets are found by MLX's own rule, which has no symmetric codes.
        own = None if self.to in _OF_OFFSETS and symmetric else dialect.quantizer
        return Spec(
            bits=self.bits,
            group_size=None if self.group_size == -1 else self.group_size,
            symmetric=symmetric,
            scale_dtype=dialect.scale_dtype,
            quantizer=own or _QUANTIZERS[self.method],
        )

    def _against(self, symmetric: bool) -> str | None:
        if self.group_size < 1 and self.group_size != -1:
            return f"--group-size={self.group_size} must be positive, or -1."
        if self.method == "hqq" and self.to != "hqq":
            return (
                f"--method=hqq finds float zeros, which --to={self.to} cannot hold; "
                "write --to hqq, or take --method clip."
            )
        if self.method == "hqq" and symmetric:
            return (
                "--method=hqq finds zeros, and --symmetric leaves none; leave it out, "
                "or take --method clip."
            )
        if self.to == "hqq" and self.bits in (5, 6):
            return (
                f"--bits={self.bits} would take the room of 8 in HQQ's words; take "
                "--bits 4 or 8."
            )
        own = dialects.DIALECTS[self.to].quantizer and self.to not in _OF_OFFSETS
        if own and self.method != "rtn":
            return (
                f"--method={self.method} finds whole numbers; --to={self.to} has a "
                "rounding of its own."
            )
        if self.to in ("fp8", "bitsandbytes") and not symmetric:
            return f"--to={self.to} is symmetric; leave out --asymmetric."
        if self.to in _OF_OFFSETS and self.method != "rtn" and not symmetric:
            return (
                f"--method={self.method} finds zeros, and --to={self.to} cannot hold "
                "all of their products with scales; add --symmetric."
            )
        widths = dialects.DIALECTS[self.to].widths
        if self.bits not in widths:
            held = ", ".join(str(one) for one in sorted(widths) if one >= _MIN_BITS)
            return f"--bits={self.bits} must be one of {held} for --to {self.to}."
        if self.to == "awq" and symmetric:
            return "--to=awq is asymmetric; leave out --symmetric."
        if self.to == "gptq" and not symmetric:
            return (
                "--to=gptq (v1) cannot store every zero of --asymmetric codes; write "
                "--to gptq_v2, or leave out --asymmetric."
            )
        return None


def _dense(directory: Path) -> list[Stored]:
    parts = modules.open_parts(directory).values()
    return [part for part in parts if isinstance(part, Stored)]


def _summary(
    target: Path, before: Sequence[Stored], errors: Sequence[SupportsFloat]
) -> str:
    parts = modules.open_parts(target).values()
    packed = [part.nbytes for part in parts if isinstance(part, Matrix)]
    nbytes = [sum(part.nbytes for part in some) for some in (before, parts)]
    # Dense tensors are the same in both.
    dense = [part for part in parts if isinstance(part, Stored)]
    weights = _weights(before) - _weights(dense)
    said = (
        f"{len(packed)} matrices of {8 * sum(packed) / weights:.3f} bits a weight, "
        f"{nbytes[0] / 1e6:.2f} MB before, {nbytes[1] / 1e6:.2f} MB after"
    )
    if errors:
        said += f", mean relative error {np.mean([float(e) for e in errors]):.4f}"
        # After an interruption, nothing is known of the others.
        said += f" of the {len(errors)} now" if len(errors) < len(packed) else ""
    return said


def _weights(tensors: Sequence[Stored]) -> int:
    return sum(math.prod(one.shape) for one in tensors)
