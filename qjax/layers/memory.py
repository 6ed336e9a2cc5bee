"""What the weights of a model take on their devices: `memory_report`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array
from rich.table import Table

from qjax.layers.linen.variables import QUANTIZED, to_params
from qjax.layers.nnx.wrapped import packed_weights
from qjax.layers.report import in_text, path_column, path_name
from qjax.tensor import QTensor, readable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What one weight takes.

    Attributes:
      path: Where it is, such as "layers/0/mlp/up_proj/kernel".
      shape: Its shape; of a packed weight ``(*stack, k, n)``.
      bits: Bits a code, or None for an array.
      format: Group size and layout of a packed weight, or the dtype of an array.
      nbytes: Bytes on all devices that this process sees; what others hold in common
        with it is counted once.
      dense_nbytes: Bytes of the same numbers in bfloat16, on one device.
    """

    path: str
    shape: tuple[int, ...]
    bits: int | float | None
    format: str
    nbytes: int
    dense_nbytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the weights of a model take, one by one. It prints as a table.

    Attributes:
      entries: One for each weight, and each other array.
    """

    entries: tuple[Usage, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that all would take in bfloat16."""
        return sum(entry.dense_nbytes for entry in self.entries)

    def __rich__(self) -> Table:
        """The table, for `rich.print`."""
        title = f"{readable(self.nbytes)}; {readable(self.dense_nbytes)} in bfloat16"
        table = Table(path_column(), "shape", "bits", "format", title=title)
        for name in ("bytes", "in bfloat16"):
            table.add_column(name, justify="right")
        for entry in self.entries:
            table.add_row(
                entry.path,
                "x".join(map(str, entry.shape)),
                "" if entry.bits is None else f"{entry.bits:.4g}",
                entry.format,
                readable(entry.nbytes),
                readable(entry.dense_nbytes),
            )
        return table

    def __str__(self) -> str:
        """The table in plain text."""
        return in_text(self.__rich__())


def memory_report(model: Any) -> Memory:
    """Reports what every weight of a model takes on its devices.

    Args:
      model: An nnx model, variables of linen (``{"params": ..., "quantized": ...}``),
        or any tree of arrays and `QTensor`s. Of abstract arrays is told what they will
        take.

    Returns:
      A value with ``entries``, ``nbytes`` and ``dense_nbytes``, whose text is a table.
      The bytes are those of the buffers: a replicated array counts on every device.

    Example:
      >>> w = qjax.quantize(jnp.ones((256, 64)), bits=4, group_size=128)
      >>> report = memory_report({"norm": jnp.ones(64, jnp.bfloat16), "up": w})
      >>> [(entry.path, entry.nbytes, entry.dense_nbytes) for entry in report.entries]
      [('norm', 128, 128), ('up', 8832, 32768)]
    """
    if isinstance(model, nnx.Module):
        leaves = _of_nnx(model)
    elif isinstance(model, Mapping) and QUANTIZED in model:
        rest = {k: v for k, v in model.items() if k not in ("params", QUANTIZED)}
        leaves = _of_tree({"params": to_params(model), **rest})
    else:
        leaves = _of_tree(model)
    seen: set[int] = set()
    return Memory(tuple(_usage(path, leaf, seen) for path, leaf in leaves))


def _of_nnx(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    packed = {
        path_name((*path, name)): weight
        for path, module in nnx.iter_modules(model)
        for name, weight in packed_weights(module).items()
    }
    yield from ((path, nnx.as_pure(weight)) for path, weight in packed.items())
    inside = {
        id(leaf)
        for weight in packed.values()
        for leaf in jax.tree.leaves(weight, is_leaf=_is_variable)
    }
    for path, node in nnx.to_flat_state(nnx.state(model)):
        if id(node) not in inside:
            value = node.get_raw_value() if _is_variable(node) else node
            yield from _of_tree(value, path_name(path))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _of_tree(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    is_leaf = lambda leaf: isinstance(leaf, QTensor | nn.meta.AxisMetadata)  # noqa: E731
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        is_box = isinstance(leaf, nn.meta.AxisMetadata)
        value = jax.tree.leaves(leaf)[0] if is_box else leaf
        if hasattr(value, "shape"):
            yield "/".join(filter(None, (prefix, path))), value


def _usage(path: str, leaf: Any, seen: set[int]) -> Usage:
    nbytes = 0
    for array in jax.tree.leaves(leaf):
        nbytes += 0 if id(array) in seen else _on_devices(array)
        seen.add(id(array))
    size = math.prod(leaf.shape)
    if isinstance(leaf, QTensor):
        groups = {segment.group_size or "column" for segment in leaf.segments}
        group = "group " + ",".join(map(str, groups))
        about = f"{group}, {type(leaf.layout).__name__}, {leaf.dtype} scale"
        return Usage(
            path=path,
            shape=leaf.shape,
            bits=leaf.bits,
            format=about,
            nbytes=nbytes,
            dense_nbytes=2 * size,
        )
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return Usage(
        path=path,
        shape=tuple(leaf.shape),
        bits=None,
        format=str(leaf.dtype),
        nbytes=nbytes,
        dense_nbytes=2 * size if floating else nbytes,
    )


def _on_devices(array: Any) -> int:
    """Bytes of the buffers of an array, which may be abstract."""
    if isinstance(array, Array) and not isinstance(array, Tracer):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        shards = array.addressable_shards
        return sum(shard.data.on_device_size_in_bytes() for shard in shards)
    return math.prod(array.shape) * array.dtype.itemsize
