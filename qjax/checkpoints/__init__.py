"""Checkpoints: directories of safetensors and JSON files, and GGUF files.

`load` reads one, dense or quantized in a format of `qjax.formats.FORMATS`, without
PyTorch and without pickles; `lazy` reads a weight when it is asked for. `save` writes a
directory as Hugging Face hosts them, `quantize` makes a quantized one of a dense one,
and `convert` moves one to another format without requantizing; `compare` says how far
two of one model are apart. A checkpoint is data from elsewhere: all of its headers are
checked against each other and against the format before any weight is read, and
`verify` looks at every value, too.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from qjax import ops, progress
from qjax.checkpoints import cutting, modules, shards
from qjax.checkpoints.checking import verify
from qjax.checkpoints.comparing import compare
from qjax.checkpoints.config import read_config
from qjax.checkpoints.converting import convert
from qjax.checkpoints.differences import Comparison, Difference
from qjax.checkpoints.gguf import read_metadata
from qjax.checkpoints.hub import download, locate
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.quantizing import quantize
from qjax.checkpoints.writing import save
from qjax.tensor import QTensor

__all__ = [
    "Comparison",
    "Difference",
    "compare",
    "convert",
    "download",
    "lazy",
    "load",
    "locate",
    "quantize",
    "read_config",
    "read_metadata",
    "save",
    "verify",
]


Sharding = Callable[[str], NamedSharding | Sequence[NamedSharding]]


def load(
    path: str | os.PathLike[str],
    *,
    prepare: bool = True,
    sharding: Sharding | None = None,
) -> dict[str, QTensor | Array]:
    """Loads the weights of a checkpoint directory or a GGUF file.

    Matrices are read one by one, so that host memory holds the model and a few times
    its largest matrix; with ``sharding``, of the model only what the devices of this
    process hold.

    Args:
      path: The directory: ``config.json`` beside ``model.safetensors``, or beside the
        shards that ``model.safetensors.index.json`` lists, or where neither is, beside
        one other safetensors file, or a numbered set. Quantization is described by
        ``quantization_config`` in ``config.json``, or by "quantization" there, which
        MLX has and which goes first; else by the first that is there of
        green-bit-llm's ``quant_strategy.json``, AutoGPTQ's ``quantize_config.json``,
        AutoAWQ's ``quant_config.json``, ModelOpt's ``hf_quant_config.json`` and
        optimum-quanto's ``quanto_qmap.json``; else, for EXL2, MBWQ and the float zeros
        of MPQ, by names and shapes of the tensors alone. Or a file of llama.cpp, with
        the suffix ``.gguf``; of split ones any.
      prepare: Whether `qjax.prepare` gives each matrix the form that this device
        multiplies fastest. False keeps the layout of the file, which `qjax.formats`
        writes back bit for bit.
      sharding: Says of a name, of those that are returned, where the weight goes: for a
        quantized matrix a spec of ``(*stack, k, n)``, as in `qjax.shard`, and for every
        other tensor one of its own axes. Of several, the first is taken that cuts the
        weight evenly, prepared for this device or, if none does, as a
        `formats.gptq.Stream`. The mesh may span processes: each reads, of GPTQ, AWQ,
        GGUF, FP8, MLX and of dense tensors, the bytes that its devices hold. Of an
        act-order matrix that is cut along k it reads whole columns, and of other
        formats, and where pieces would be no whole blocks, whole matrices; of a stack
        in one tensor that is cut along its matrices, all of them.

    Returns:
      Quantized matrices, ``[k, n]``, under the paths of their modules
      ("model.layers.0.mlp.up_proj"). Every other tensor as an array under its full name
      ("model.layers.0.mlp.up_proj.bias", "model.norm.weight"), with the dtype and the
      orientation of the file: a dense ``weight`` is ``[n, k]``. GGUF has other names:
      "blk.0.ffn_up" is a matrix, "token_embd", too, "output_norm.weight" an array.
      Integers and bools that are no weights, such as masks, are arrays as well; those
      of 64 bits have 32 without ``jax_enable_x64``.

    Raises:
      FileNotFoundError: If the directory, a JSON file, a shard or the file is missing.
      TypeError: If ``sharding`` is no function.
      ValueError: If anything in the checkpoint is not sound, or is not what the
        quantization says, with the file and the tensor; or if ``sharding`` gives no
        sharding, or none that cuts a weight evenly, with its name. Nothing is
        returned of a checkpoint of which only a part is sound.
      NotImplementedError: If Quark or MLX wrote the checkpoint in a way that is not
        read.

    Example:
      >>> weights = load("examples/llm/checkpoint")
      >>> (
      ...     weights["model.layers.0.mlp.up_proj"].shape,
      ...     weights["model.norm.weight"].shape,
      ... )
      ((256, 640), (256,))

      Over the devices of a mesh, matrices by columns:

      >>> mesh = jax.make_mesh((2,), ("model",))
      >>> def place(name):
      ...     is_packed = name.endswith("_proj")
      ...     spec = jax.P(None, "model") if is_packed else jax.P()
      ...     return NamedSharding(mesh, spec)
      >>> weights = load("examples/llm/checkpoint", sharding=place)
      >>> scale = weights["model.layers.0.mlp.up_proj"].scale
      >>> scale.shape, [shard.data.shape for shard in scale.addressable_shards]
      ((2, 640), [(2, 320), (2, 320)])
    """
    found = _Lazy(modules.open_parts(path), prepare, _checked(sharding))
    weights: dict[str, QTensor | Array] = {}
    total = sum(part.nbytes for part in found.parts.values())
    with progress.bar(total) as advance:
        for name, weight in found.items():
            weights[name] = weight
            advance(found.parts[name].nbytes)
    return weights


def lazy(
    path: str | os.PathLike[str],
    *,
    prepare: bool = True,
    sharding: Sharding | None = None,
) -> Mapping[str, QTensor | Array]:
    """Opens a checkpoint, and reads each weight when it is asked for.

    For models that do not fit in memory, or of which only a part is wanted. All headers
    are checked before this returns.

    Args:
      path: As in `load`.
      prepare: As in `load`.
      sharding: As in `load`.

    Returns:
      The names and weights of `load`, of which nothing is kept: ``weights[name]`` reads
      anew, and ``weights.items()`` one after another.

    Raises:
      FileNotFoundError: As `load`.
      TypeError: As `load`.
      ValueError: As `load`; for values that are not sound when they are reached.
      NotImplementedError: As `load`.

    Example:
      >>> weights = lazy("examples/llm/checkpoint", prepare=False)
      >>> len(weights), weights["model.norm.weight"].shape
      (30, (256,))
    """
    return _Lazy(modules.open_parts(path), prepare, _checked(sharding))


def _checked(sharding: Sharding | None) -> Sharding | None:
    if sharding is not None and not callable(sharding):
        raise TypeError(
            f"sharding={sharding!r} must be a function from the name of a weight to "
            "its sharding: lambda name: NamedSharding(mesh, spec)."
        )
    return sharding


class _Lazy(Mapping[str, QTensor | Array]):
    """Weights that are read when they are asked for."""

    def __init__(
        self,
        parts: Mapping[str, Matrix | shards.Stored],
        prepare: bool,
        sharding: Sharding | None,
    ):
        self.parts, self._prepare, self._sharding = parts, prepare, sharding

    def __getitem__(self, name: str) -> QTensor | Array:
        part = self.parts[name]
        if self._sharding is not None:
            weight = cutting.read(name, part, self._sharding(name), self._prepare)
        else:
            is_dense = isinstance(part, shards.Stored)
            weight = jax.device_put(part.narrowed() if is_dense else part.read())
            weight = ops.prepare(weight) if self._prepare else weight
        # JAX works in the background: without waiting, the next matrices would be read
        # while buffers of this one are still alive.
        return jax.block_until_ready(weight)

    def __repr__(self) -> str:
        total = sum(part.nbytes for part in self.parts.values())
        return f"<{len(self.parts)} weights, {total} bytes in files, each read anew>"

    def __contains__(self, name: object) -> bool:
        # That of Mapping would read the weight.
        return name in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
