"""How `jax.export` writes down a function that takes or returns `QTensor`.

It keeps the structure of arguments and results, and so has to know what is static of a
tensor: the metadata of `flattening`, in JSON. Importing this module registers that.
"""

import dataclasses
import json
import types
from collections.abc import Sequence
from typing import Any

from jax import export

from qjax.formats.bnb import Nested
from qjax.formats.flattening import ENCODINGS, describe, static_fields
from qjax.formats.flattening_metadata import Entries
from qjax.tensor import QTensor

# Widths and sizes of groups; no matrix has as many.
_MOST_SEGMENTS = 1024


def _static(kind: type) -> list[str]:
    """The static fields of a class, as `jax.tree_util.register_dataclass` has them."""
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.metadata.get("static")]


def _written(values: Sequence[Any]) -> bytes:
    static = dict(zip(_static(QTensor), values, strict=True))
    return json.dumps(describe(types.SimpleNamespace(**static))).encode()


def _read(data: bytes) -> tuple[Any, ...]:
    entries = Entries(json.loads(data))
    fields = static_fields(entries, _MOST_SEGMENTS)
    entries.close()
    return tuple(fields[name] for name in _static(QTensor))


export.register_pytree_node_serialization(
    QTensor,
    serialized_name="qjax.QTensor",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)
export.register_namedtuple_serialization(Nested, serialized_name="qjax.bnb.Nested")
for _name, _kind in ENCODINGS.items():
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"qjax.{_name}",
        # Flags, sizes and names.
        serialize_auxdata=lambda values: json.dumps(values).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )
