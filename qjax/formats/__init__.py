"""How the quantized-weight world packs: one format a file.

A format module has a `Layout` or two, and for checkpoints

* ``TENSORS``: the upstream's tensor names below a module's path, and ``JOINTS`` if
  other characters than a dot may join them to it,
* ``Config.from_json(entry)``, and ``config.of(module)``: None where it stays dense,
* if the header of the file says more about a weight, ``config.with_header(entry)``,
* ``check(tensors, config)``: names, dtypes and shapes, without reading any value,
* ``from_tensors(tensors, config)`` and ``to_tensors(qt, ...)``.
"""

import types
from collections.abc import Mapping

from qjax.formats import (
    awq,
    awq_v2,
    bnb,
    compressed_tensors,
    exl2,
    flexgen,
    gptq,
    hqq,
    mbwq,
    mpq,
    mxfp4,
    quanto,
    tinygemm,
    torchao,
)

__all__ = [
    "FORMATS",
    "awq",
    "awq_v2",
    "bnb",
    "compressed_tensors",
    "exl2",
    "flexgen",
    "gptq",
    "hqq",
    "mbwq",
    "mpq",
    "mxfp4",
    "quanto",
    "tinygemm",
    "torchao",
]

# By the ``quant_method`` of a checkpoint's quantization_config, or qjax's name for it.
FORMATS: Mapping[str, types.ModuleType] = types.MappingProxyType(
    {
        "gptq": gptq,
        "awq": awq,
        "exl2": exl2,
        "hqq": hqq,
        "bitsandbytes": bnb,
        "compressed-tensors": compressed_tensors,
        "torchao": torchao,
        "mbwq": mbwq,
        "mpq": mpq,
        "mxfp4": mxfp4,
    }
)
