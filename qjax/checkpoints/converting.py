"""A checkpoint directory into another format, without requantizing."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax import Array

from qjax.checkpoints import modules
from qjax.checkpoints.dialects import DIALECTS, centered
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.rewriting import Request, Weight, kept, rewrite
from qjax.checkpoints.shards import Stored
from qjax.checkpoints.writing import SHARD_BYTES, is_table
from qjax.decode import dequantize
from qjax.tensor import QTensor


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint directory in another format, without requantizing.

    Packed tables of embeddings, which MLX has, become dense where loaders of ``format``
    read no others.

    Every weight is read twice, one by one: to find what cannot be held before anything
    is written, and to write it. Tokenizer, generation config and whatever other files
    lie in the directory are copied; other weights and older descriptions of the
    quantization are not. Neither are directories in it, of which a warning tells, as
    nothing says whether they hold weights. Where ``target`` is ``source``, all of them
    stay.

    What is interrupted can be resumed: weights that are finished stay in
    ``.NAME.partial`` beside ``target``, and the same call goes on after them, once
    their checksums are right. If a file of ``source`` has another size or time of
    change since, or anything else is asked for, it starts from the beginning.

    Args:
      source: The directory to read, in any format that `load` knows.
      target: The directory to make, as in `save`.
      format: As in `save`.
      overwrite: As in `save`.
      shard_bytes: As in `save`.

    Raises:
      ValueError: As `load` and `save`.
      OSError: As `load` and `save`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     convert("examples/llm/checkpoint", f"{folder}/v2", format="gptq_v2")
      ...     config = qjax.checkpoints.read_config(f"{folder}/v2")
      >>> config["quantization_config"]["checkpoint_format"]
      'gptq_v2'
    """
    request = Request(
        target=target, format=format, overwrite=overwrite, shard_bytes=shard_bytes
    )
    dialect = DIALECTS.get(format)  # If there is none, the plan says so.
    has_tables = dialect is None or dialect.has_tables
    rewrite(source, request, lambda origin: _weights(origin, has_tables))


def _weights(directory: Path, has_tables: bool) -> Mapping[str, Weight]:
    weights = {}
    for name, part in modules.open_parts(directory).items():
        if isinstance(part, Matrix) and is_table(name) and not has_tables:
            weights[f"{name}.weight"] = _table(part)
        else:
            weights[name] = _weight(part)
    return weights


def _table(part: Matrix) -> Weight:
    """A packed table that becomes dense, ``[vocabulary, hidden]``."""
    return Weight(
        nbytes=part.nbytes,
        look=lambda: jax.eval_shape(_dense, part.read()),
        read=lambda: _dense(part.read()),
    )


def _dense(table: QTensor) -> Array:
    return dequantize(table).mT


def _weight(part: Matrix | Stored) -> Weight:
    """Looks at the values of matrices."""
    if isinstance(part, Stored):
        return kept(part)
    return Weight(
        nbytes=part.nbytes,
        look=lambda: centered(part.read()),
        read=lambda: centered(part.read()),
    )
