"""How the quantized-weight world packs: one format a file.

A format module has a `Layout` or two. Those of `FORMATS`, which checkpoints name, have

* ``TENSORS``: the upstream's tensor names below a module's path, and ``JOINTS`` if
  other characters than a dot may join them to it,
* ``Config.from_json(entry)``, and ``config.of(module)``: None where it stays dense,
* if the header of the file says more about a weight, ``config.with_header(entry)``, and
  if the shapes of its tensors do, ``config.with_tensors(tensors)``; if the model does,
  before ``of``, ``config.with_model(config.json, all tensors)``,
* ``check(tensors, config)``: names, dtypes and shapes, without reading any value,
* if a range of each tensor is a matrix by itself, ``axes(tensors, config)``,
* if a file of JSON says more about each module, its name ``SIDECAR``; the object is
  under that name in the entry that ``from_json`` is given,
* if a dense weight may have scales beside it, ``is_dense(tensors)``,
* ``from_tensors(tensors, config)``, where `bitnet`, `exl2`, `fp8`, `mbwq` and `mxfp4`
  can do without the configuration, and ``to_tensors(qt, ...)``, but of `sinq`.

`auto_round` is a configuration alone: its tensors are those of other formats. `mlx` is
described by "quantization" in config.json, and without a ``quant_method``. Each
tensor of a `gguf` file says what it is, and no directory names that format. No
checkpoint names the others, and what their tensors do not say comes from elsewhere:

* `tinygemm` reads with the ``Config`` that `torchao` makes of a file's header,
* ``awq_v2.from_tensors(tensors, group_size)`` is given that by `awq`,
* `flexgen`, of which there are no files, has ``from_compressed(packed, scale, bias)``
  and ``to_compressed(qt)``.
"""

import types
from collections.abc import Mapping

from qjax.formats import (
    auto_round,
    awq,
    awq_v2,
    bitnet,
    bnb,
    compressed_tensors,
    exl2,
    flexgen,
    fp8,
    gguf,
    gptq,
    hqq,
    mbwq,
    mlx,
    modelopt,
    mpq,
    mxfp4,
    quanto,
    quark,
    sinq,
    tinygemm,
    torchao,
)

__all__ = [
    "FORMATS",
    "auto_round",
    "awq",
    "awq_v2",
    "bitnet",
    "bnb",
    "compressed_tensors",
    "exl2",
    "flexgen",
    "fp8",
    "gguf",
    "gptq",
    "hqq",
    "mbwq",
    "mlx",
    "modelopt",
    "mpq",
    "mxfp4",
    "quanto",
    "quark",
    "sinq",
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
        "fp8": fp8,
        "fbgemm_fp8": fp8,
        "modelopt": modelopt,
        "modelopt_fp4": modelopt,
        "bitnet": bitnet,
        "quark": quark,
        "mlx": mlx,
        "metal": mlx,
        "quanto": quanto,
        "sinq": sinq,
        "gguf": gguf,
    }
)
