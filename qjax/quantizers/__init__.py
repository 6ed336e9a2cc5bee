"""Quantizers that look further than rounding to nearest.

Each has a function ``quantize`` that is called like `qjax.quantize` and returns a
`QTensor` that every layer, product and file format takes like any other:

* `clip`: ranges narrowed to where the error is least; no data.
* `hqq`: float zeros that fit most weights well and some not at all; no data.
* `awq`: rows that large inputs meet are rounded more finely, at the cost of others.
* `gptq`: each row makes up for the rounding of those before it, as far as the inputs
  that the layer sees let it.

A quantizer goes into a `qjax.Spec`, and so into `qjax.quantize_model` and
`checkpoints.quantize`. What `awq` and `gptq` have to know of inputs, `gram` computes of
those at hand, and `grams` of all that the weights of a model see; `calibrated` makes
rules of them. `output_error` says what a quantization costs, and `allocate` which
widths a model of many weights should have for a given size.
"""

from qjax.quantizers import awq, clip, gptq, hqq
from qjax.quantizers.budget import Option, allocate
from qjax.quantizers.calibration import calibrated, grams
from qjax.quantizers.error import gram, output_error

__all__ = [
    "Option",
    "allocate",
    "awq",
    "calibrated",
    "clip",
    "gptq",
    "gram",
    "grams",
    "hqq",
    "output_error",
]
