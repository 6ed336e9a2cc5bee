"""Weights that are cut over devices, written as files have them: whole."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from qjax.meshes import whole
from qjax.sharding import joined
from qjax.tensor import QTensor, check_packed

Writer = TypeVar("Writer", bound=Callable[..., Any])


def of_whole(write: Writer) -> Writer:
    """Has a writer see a weight whole, where its pieces are a part of its type.

    Packings take codes and scales apart, which has no type on a mesh of explicit axes.
    Every device then has the whole of what is written. On automatic axes nothing moves
    but what XLA moves.

    Args:
      write: A function of a `QTensor`, as ``to_tensors`` of a format.

    Returns:
      The same function, for a weight that `qjax.shard` has cut in any way, too.

    Example:
      >>> mesh = jax.make_mesh((2,), ("model",))
      >>> w = qjax.quantize(jnp.ones((64, 32)), bits=4, group_size=32)
      >>> w = qjax.shard(w, mesh, jax.sharding.PartitionSpec(None, "model"))
      >>> of_whole(lambda w: w.words[0].sharding.is_fully_replicated)(w)
      True
    """

    @functools.wraps(write)
    def writing(qt: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(qt, QTensor):
            check_packed(qt, "qt")
            qt = joined(whole(qt))
        return write(qt, *args, **kwargs)

    return writing  # pyright: ignore[reportReturnType]
